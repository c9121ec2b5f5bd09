"""estimate_population_statistics: the statistics of everything, however it is cut; nothing else in the network changes."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_norm.errors import StatisticsError
from nnunet_norm.layers import NORMS, FrozenBatchNorm, convert_norm, find_norms, tracks_statistics
from nnunet_norm.statistics import estimate_population_statistics

TRACKING = ("batch_norm", "batch_renorm", "ghost_batch_norm", "frozen_batch_norm", "instance_norm_tracked")
SPLITS = st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def population(count, seed=0, channels=1, shape=(16, 16)):
    """Images whose means and deviations differ, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *shape, generator=generator, dtype=torch.float64)
    scale, shift = torch.rand(2, count, channels, 1, 1, generator=generator, dtype=torch.float64)
    return x * (scale * 3 + 0.2) + shift * 8 - 2


def unet(norm="batch_norm"):
    """nnU-Net's own, in which every norm is registered twice and the encoder too; weights of no special size."""
    torch.manual_seed(0)
    network = PlainConvUNet(
        1,
        3,
        [3, 5, 6],
        nn.Conv2d,
        3,
        [1, 2, 2],
        2,
        3,
        1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        dropout_op=nn.Dropout2d,
        dropout_op_kwargs={"p": 0.5},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return convert_norm(network, norm).double()


def estimate(network, batches, **options):
    estimate_population_statistics(network, batches, progress=False, **options)
    return statistics(network)


def statistics(network):
    norms = [norm for norm in find_norms(network).values() if tracks_statistics(norm)]
    return [statistic.clone() for norm in norms for statistic in (norm.running_mean, norm.running_var)]


def in_one_batch(x):
    """The oracle: torch's BatchNorm in train mode on everything at once, with momentum 1 and the biased variance."""
    network = unet("batch_norm").eval()
    counts = {}
    for norm in find_norms(network).values():
        norm.train()
        norm.momentum = 1.0
        norm.register_forward_pre_hook(
            lambda module, given: counts.update({module: given[0].numel() / given[0].size(1)})
        )
    with torch.no_grad():
        network(x)
    for norm, count in counts.items():
        norm.running_var.mul_((count - 1) / count)
    return statistics(network)


def left(network):
    """Everything that an estimation may leave behind, but for the values of running statistics."""
    flags = [module.training for module in network.modules()]
    pointers = {name: value.data_ptr() for name, value in network.state_dict().items()}
    values = {name: value.clone() for name, value in network.state_dict().items() if "running" not in name}
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    return flags, pointers, hooks, values


def equal(before, after):
    assert before[:3] == after[:3]
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())


def assert_untouched(network, state):
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@given(SPLITS, st.integers(0, 50), st.booleans())
@settings(max_examples=50, deadline=None)
def test_of_one_norm_they_are_the_closed_form_for_any_split(sizes, seed, exact):
    """E[m_B] and E[m_B^2 + v_B] - E[m_B]^2 by element counts are mean and variance of everything; empty batches count 0."""
    x = population(sum(sizes), seed, channels=2, shape=(3, 4))
    norm = nn.BatchNorm2d(2).double()
    mean, var = estimate(norm, list(x.split(sizes)), exact=exact)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, x.var((0, 2, 3), correction=0), rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any))
@settings(max_examples=10, deadline=None)
def test_exact_ones_of_a_unet_are_those_of_one_batch_for_any_split(sizes):
    """Twelve norms deep, and nothing hangs on the old statistics."""
    x = population(sum(sizes))
    network = unet()
    for norm in find_norms(network).values():
        nn.init.uniform_(norm.running_mean, -9, 9)
    for mine, theirs in zip(estimate(network, list(x.split(sizes)), exact=True), in_one_batch(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch_norm", "batch_renorm", "frozen_batch_norm"])
def test_one_pass_over_one_batch_is_exact(norm):
    """Batch statistics are then those of the population. BatchRenorm acts without its correction, whatever its schedule."""
    x = population(4)
    network = unet(norm)
    for layer in find_norms(network).values():
        layer.num_batches_tracked.fill_(100_000)
    for mine, theirs in zip(estimate(network, [x]), in_one_batch(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", TRACKING)
def test_every_norm_with_running_statistics_gets_the_exact_ones(norm):
    """Their eval modes are one function, so the exact statistics are the same for all."""
    x = population(5)
    network = unet(norm)
    before = left(network)
    found = estimate(network, list(x.split([2, 1, 2])), exact=True)
    equal(before, left(network))
    for mine, theirs in zip(found, in_one_batch(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_all_norms_with_running_statistics_are_known():
    """A new norm must be added to the list above."""
    with_statistics = {name for name, classes in NORMS.items() if tracks_statistics(classes[2](4))}
    assert with_statistics == set(TRACKING)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", TRACKING)
def test_only_the_values_of_running_statistics_change(norm, training, exact):
    """Same tensors, same parameters, same counters and training flags, no hooks left; no gradient is kept."""
    network = unet(norm).train(training)
    before, old = left(network), statistics(network)
    new = estimate(network, [population(2), population(3, 1)], exact=exact)
    equal(before, left(network))
    assert all(not torch.equal(mine, theirs) for mine, theirs in zip(new, old, strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("exact", [False, True])
def test_dropout_stays_off_in_a_network_in_train_mode(exact):
    batches = [population(2), population(2, 1)]
    network = unet().train()
    first = estimate(network, batches, exact=exact)
    assert all(torch.equal(a, b) for a, b in zip(first, estimate(network, batches, exact=exact), strict=True))


def test_in_one_pass_deeper_norms_see_what_batches_normalized():
    """The documented difference to exact=True: by hand for two norms and two batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)).double()
    batches = [population(2), population(3, 1)]
    inner = torch.cat(
        [nn.functional.relu(network[1](nn.functional.batch_norm(x, None, None, None, None, True))) for x in batches]
    ).detach()
    estimate(network, batches)
    torch.testing.assert_close(network[3].running_mean, inner.mean((0, 2, 3)))
    torch.testing.assert_close(network[3].running_var, inner.var((0, 2, 3), correction=0))


def test_the_variance_between_batch_means_is_counted_where_update_bn_leaves_it_out():
    """Drifting means: torch.optim.swa_utils.update_bn averages variances, and is far below the variance of the data."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 1, 16, 16, generator=generator) + shift for shift in (-2.0, -1.0, 0.0, 1.0, 5.0)]
    everything = torch.cat(batches).double()
    norm, by_torch = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    estimate(norm, batches)
    torch.optim.swa_utils.update_bn(batches, by_torch)
    torch.testing.assert_close(norm.running_mean.double(), everything.mean().view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), everything.var(correction=0).view(1), rtol=1e-6, atol=0)
    assert norm.running_var.item() > 6
    assert by_torch.running_var.item() == pytest.approx(1, rel=0.05)


def test_a_mean_far_from_zero_loses_no_digits_of_the_variance():
    x = population(6, shape=(8, 8)).float() + 1e4
    norm = nn.BatchNorm2d(1)
    estimate(norm, list(x.split(1)))
    torch.testing.assert_close(norm.running_var.double(), x.double().var(correction=0).view(1), rtol=1e-3, atol=0)


def test_mappings_other_types_and_sizes_of_batches_are_taken():
    """As nnU-Net's loaders give them; images of different shapes count by their elements."""
    small, large = population(1, shape=(4, 4)), population(2, 1, shape=(8, 6))
    norm = nn.BatchNorm2d(1)
    estimate(norm, [{"data": small, "target": None}, {"data": large.half()}])
    values = torch.cat([small.flatten(), large.half().double().flatten()])
    torch.testing.assert_close(norm.running_mean.double(), values.mean().view(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), values.var(correction=0).view(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shared", ["two names", "two uses"])
def test_a_norm_counts_once_and_every_use_of_it(shared):
    norm = nn.BatchNorm2d(1).double()
    network = nn.Sequential(norm, nn.Conv2d(1, 1, 1).double(), *([norm] if shared == "two uses" else []))
    network.alias = norm
    network.forward = (lambda x: network[1](network[0](x))) if shared == "two names" else network.forward
    if shared == "two uses":
        del network._modules["alias"]
    x = population(3)
    estimate(network, [x])
    normalized = nn.functional.batch_norm(x, None, None, None, None, True)
    seen = [x, network[1](normalized).detach()] if shared == "two uses" else [x]
    torch.testing.assert_close(norm.running_mean, torch.cat(seen).mean().view(1))
    torch.testing.assert_close(norm.running_var, torch.cat(seen).var(correction=0).view(1))


def test_a_norm_that_is_used_twice_has_no_exact_statistics():
    norm = nn.BatchNorm2d(1)
    network = nn.Sequential(norm, nn.Conv2d(1, 1, 1), norm).double()
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(StatisticsError, match="'0' is used 2 times in a pass: leave exact out"):
        estimate(network, [population(3)], exact=True)
    assert_untouched(network, state)


@pytest.mark.parametrize("exact", [False, True])
def test_a_norm_that_is_not_used_keeps_its_statistics(exact):
    network = nn.Sequential(nn.BatchNorm2d(1)).double()
    network[0].unused = nn.BatchNorm2d(7).double().requires_grad_(False)
    estimate(network, [population(3)], exact=exact)
    assert torch.equal(network[0].unused.running_mean, torch.zeros(7, dtype=torch.float64))
    assert network[0].running_mean.abs() > 0.1


class Counted:
    """Batches that can be iterated again, and what was drawn of them."""

    def __init__(self, batches):
        self.batches, self.drawn = batches, []

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            self.drawn.append(number)
            yield batch


@pytest.mark.parametrize("exact", [False, True])
def test_num_iters_takes_so_many_batches_and_draws_no_further_one(exact):
    x = population(5)
    batches = Counted(list(x.split(1)))
    norm = nn.BatchNorm2d(1).double()
    estimate(norm, batches, num_iters=3, exact=exact)
    assert max(batches.drawn) == 2
    torch.testing.assert_close(norm.running_mean, x[:3].mean((0, 2, 3)))
    estimate(norm, batches, num_iters=9, exact=exact)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


def test_a_generator_is_taken_for_one_pass_and_refused_for_several():
    x = population(4)
    norm = nn.BatchNorm2d(1).double()
    estimate(norm, (batch for batch in x.split(1)))
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    state = copy.deepcopy(norm.state_dict())
    with pytest.raises(StatisticsError, match="batches is a generator, which can be iterated once: give a list"):
        estimate(norm, (batch for batch in x.split(1)), exact=True)
    assert_untouched(norm, state)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 1, 16, 16)]], ids=["no batch", "no sample"])
def test_an_empty_population_is_refused(batches, exact):
    network = unet().train()
    estimate(network, [population(2)])
    state, before = copy.deepcopy(network.state_dict()), left(network)
    with pytest.raises(StatisticsError, match="the population is empty: give at least one batch"):
        estimate(network, batches, exact=exact)
    assert_untouched(network, state)
    equal(before, left(network))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("place", ["data", "weights"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_and_leave_the_network_as_it_was(bad, place, exact):
    """Bit for bit, also where norms before the bad one were settled already; the message names the norm."""
    network, batches = unet().train(), [population(2), population(2, 1)]
    estimate(network, batches)
    if place == "data":
        batches[1][1, 0, 3, 3] = bad
        name = "encoder.stages.0.0.convs.0.norm"
    else:
        with torch.no_grad():
            network.decoder.stages[0].convs[0].conv.weight[0, 0, 0, 0] = bad
        name = "decoder.stages.0.convs.0.norm"
    state, before = copy.deepcopy(network.state_dict()), left(network)
    with pytest.raises(StatisticsError, match=rf"before norm '{name}' is not finite: look for NaN") as refusal:
        estimate(network, batches, exact=exact)
    assert "\n" not in str(refusal.value)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)
    assert before[:3] == left(network)[:3]


def test_statistics_that_a_half_precision_buffer_cannot_hold_are_refused():
    norm = nn.BatchNorm2d(1).half()
    with pytest.raises(StatisticsError, match="the variance of 1 channels before norm '' is not finite"):
        estimate(norm, [torch.tensor([-600.0, 600.0]).view(2, 1, 1, 1)])
    assert norm.running_mean == 0


class Interrupted(list):
    """Raises at its last batch, in its n-th iteration."""

    def __init__(self, batches, iteration):
        super().__init__(batches)
        self.left = iteration

    def __iter__(self):
        self.left -= 1
        yield from self[:-1]
        if self.left == 0:
            raise KeyboardInterrupt
        yield self[-1]


@pytest.mark.parametrize(("exact", "iteration"), [(False, 1), (True, 2), (True, 5)])
def test_an_interruption_leaves_the_network_as_it_was(exact, iteration):
    network = unet("batch_renorm").train()
    state, before = copy.deepcopy(network.state_dict()), left(network)
    with pytest.raises(KeyboardInterrupt):
        estimate(network, Interrupted([population(2), population(2, 1)], iteration), exact=exact)
    assert_untouched(network, state)
    equal(before, left(network))


def test_a_network_without_running_statistics_is_refused_with_the_remedy():
    """InstanceNorm becomes BatchNorm with the same affine parameters, and then has the population's statistics."""
    network = unet("instance_norm")
    for norm in find_norms(network).values():
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    with pytest.raises(
        StatisticsError, match=r"no norm with running statistics: .* convert_norm\(network, 'batch_norm'\)"
    ):
        estimate(network, [population(2)])
    affine = dict(network.named_parameters())
    convert_norm(network, "batch_norm")
    assert all(parameter is affine[name] for name, parameter in network.named_parameters())
    x = population(4)
    estimate(network, list(x.split(1)), exact=True)
    train = copy.deepcopy(network).eval()
    for norm in find_norms(train).values():
        norm.train()
    torch.testing.assert_close(network.eval()(x), train(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("batch", [torch.zeros(2, 1, 1, 1), torch.zeros(1, 1, 1, 1)])
def test_one_value_per_channel_is_refused_in_one_pass_and_taken_one_after_another(batch):
    network = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1))
    if len(batch) == 1:
        with pytest.raises(StatisticsError, match=r"one value per channel .*\(1, 1, 1, 1\): give larger .* exact=True"):
            estimate(network, [batch])
        assert network[0].num_batches_tracked == 0
    estimate(network, [batch + 3], exact=True)
    assert network[0].running_mean == 3


def test_a_batch_that_is_no_tensor_is_refused():
    with pytest.raises(StatisticsError, match=r"batch 1 is list: give tensors \(N, C, \*spatial\), or mappings"):
        estimate(nn.BatchNorm2d(1), [torch.randn(2, 1, 3, 3), [1]])
    with pytest.raises(StatisticsError, match="batch 0 is dict: give tensors"):
        estimate(nn.BatchNorm2d(1), [{"image": torch.randn(2, 1, 3, 3)}])


def test_other_errors_of_the_network_pass_through_and_leave_it_as_it_was():
    network = unet().train()
    state, before = copy.deepcopy(network.state_dict()), left(network)
    with pytest.raises(RuntimeError, match="expected input"):
        estimate(network, [population(2), population(2, channels=3)])
    assert_untouched(network, state)
    equal(before, left(network))


def test_wrappers_are_taken_off():
    """torch.compile's wrapper and DataParallel's: the statistics arrive in the module inside."""
    x, norm = population(3), nn.BatchNorm2d(1).double()
    estimate(nn.DataParallel(torch.compile(norm)), [x])
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


@pytest.mark.parametrize("exact", [False, True])
def test_under_autocast_statistics_are_those_of_the_half_precision_values_in_single_precision(exact):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    x = population(4).float() + 50
    with torch.autocast("cpu", torch.bfloat16):
        estimate(network, list(x.split(2)), exact=exact)
        values = network[0](x).detach().double()
    torch.testing.assert_close(network[1].running_mean.double(), values.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(network[1].running_var.double(), values.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_progress_is_shown_unless_it_is_not_wanted(capsys):
    norm = nn.BatchNorm2d(1)
    estimate_population_statistics(norm, [torch.randn(2, 1, 3, 3)] * 4)
    assert "statistics: 100%" in capsys.readouterr().err
    estimate_population_statistics(nn.Sequential(norm, FrozenBatchNorm(1)), [torch.randn(2, 1, 3, 3)] * 4, exact=True)
    assert "8/8" in capsys.readouterr().err
    estimate(norm, [torch.randn(2, 1, 3, 3)] * 4)
    assert capsys.readouterr().err == ""
