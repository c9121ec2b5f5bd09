"""Running statistics per domain: the averages of each domain's batches alone, exchanged in place."""

import copy
import math

import pytest
import torch
from torch import nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import find_norms, fit_for_steps, one_step
from nnunet_norm.layers.domains import DomainStatistics, get_domain_statistics

NAMES = ("plate_1", "plate_2", "plate_3")


class Network(nn.Module):
    """Two norms, one of them under two names, as in nnU-Net's blocks."""

    def __init__(self, momentum):
        super().__init__()
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), self.norm, nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, momentum=momentum))

    def forward(self, x):
        return self.second(self.first(x))


def network(momentum=0.1, names=NAMES):
    torch.manual_seed(0)
    net = Network(momentum)
    net.domain_statistics = DomainStatistics(names, net)
    return net


def listening(**kwargs):
    net = network(**kwargs)
    net.domain_statistics.listen(net)
    return net.train()


def flat(net, name):
    return torch.cat([getattr(norm, name) for norm in find_norms(net).values()])


def batch_statistics(net, x):
    """Mean and unbiased variance of every norm's input, from the definition, by hooks."""
    found = []
    hooks = [
        norm.register_forward_pre_hook(
            lambda _, inputs: found.append((inputs[0].mean((0, 2, 3)), inputs[0].var((0, 2, 3))))
        )
        for norm in find_norms(net).values()
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    means, variances = zip(*found, strict=True)
    return torch.cat(means).detach(), torch.cat(variances).detach()


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_each_domain_keeps_the_weighted_average_of_its_own_batches(momentum):
    """The newest of a domain's t batches has the weight max(momentum, 1 / t), whatever comes between."""
    net = listening(momentum=momentum)
    order = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    expected = {}
    count = [0, 0]
    for step, domain in enumerate(order):
        x = torch.randn(3, 1, 8, 8) * (1 + domain) + 10 * domain + step
        mean, var = batch_statistics(net, x)  # runs the batch, as a training step does
        net.domain_statistics.keep(net, NAMES[domain])
        count[domain] += 1
        weight = max(momentum or 0, 1 / count[domain])
        old = expected.get(domain, (mean, var))
        expected[domain] = tuple(o + weight * (n - o) for o, n in zip(old, (mean, var), strict=True))
    for domain, (mean, var) in expected.items():
        torch.testing.assert_close(net.domain_statistics.mean[domain], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net.domain_statistics.var[domain], var, rtol=1e-4, atol=1e-4)
    assert net.domain_statistics.num_batches.tolist() == [*count, 0]


def test_weights_affine_parameters_and_gradients_are_those_of_plain_batch_norm():
    """Listening changes what is remembered, never what a training step computes."""
    plain, net = network().train(), listening()
    x = torch.randn(4, 1, 8, 8)
    for model in (plain, net):
        model(x).square().sum().backward()
    net.domain_statistics.keep(net, "plate_1")
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), net.parameters(), strict=True))


def test_selected_statistics_are_in_the_norms_own_tensors_and_evaluate_as_a_network_of_that_domain_alone():
    net, alone = listening(), listening(names=["plate_2"])
    pointers = [buffer.data_ptr() for norm in find_norms(net).values() for buffer in norm.buffers()]
    for step in range(6):
        x = torch.randn(3, 1, 8, 8) + 5 * (step % 2)
        net(x)
        net.domain_statistics.keep(net, NAMES[step % 2])
        if step % 2:
            alone(x)
            alone.domain_statistics.keep(alone, "plate_2")
    net.domain_statistics.select(net, "plate_2")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net.eval()(x), alone.eval()(x))
    assert pointers == [buffer.data_ptr() for norm in find_norms(net).values() for buffer in norm.buffers()]
    net.domain_statistics.select(net, "plate_1")
    assert not torch.equal(net(x), alone(x))


def test_pooled_statistics_are_those_of_all_data_where_each_domain_is_one_batch():
    """mean = E[m], var = E[m^2 + v] - E[m]^2: with equally large batches, the moments of all of them together."""
    net = nn.Sequential(nn.BatchNorm2d(5, momentum=None))
    net.domain_statistics = DomainStatistics(NAMES, net)
    net.domain_statistics.listen(net)
    torch.manual_seed(1)
    data = [torch.randn(8, 5, 16, 16) * (1 + d) + 7 * d for d in (0, 1, 1)]
    for domain, x in zip((0, 1, 1), data, strict=True):
        net.train()(x)
        net.domain_statistics.keep(net, NAMES[domain])
    net.domain_statistics.pooled(net)
    # plate_2 holds the averages over its two batches; plate_3 was never seen and weighs nothing.
    means = torch.stack([data[0].mean((0, 2, 3)), torch.stack([x.mean((0, 2, 3)) for x in data[1:]]).mean(0)])
    variances = torch.stack([data[0].var((0, 2, 3)), torch.stack([x.var((0, 2, 3)) for x in data[1:]]).mean(0)])
    weights = torch.tensor([1 / 3, 2 / 3])[:, None]
    mean = (weights * means).sum(0)
    torch.testing.assert_close(net[0].running_mean, mean, rtol=1e-5, atol=1e-5)
    expected = (weights * (means.square() + variances)).sum(0) - mean.square()
    torch.testing.assert_close(net[0].running_var, expected, rtol=1e-4, atol=1e-4)
    everything = torch.cat(data)
    torch.testing.assert_close(net[0].running_mean, everything.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    # Besides what the means of plate_2's two batches differ by, and Bessel's correction, this is the variance of all data.
    torch.testing.assert_close(net[0].running_var, everything.var((0, 2, 3)), rtol=1e-2, atol=1e-2)


def test_pooling_what_was_never_seen_leaves_the_norms_as_they_are():
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.domain_statistics.pooled(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.domain_statistics.mean[2] = math.nan  # nothing that an unseen domain holds counts
    listened = net.domain_statistics
    listened.listen(net)
    net.train()(torch.randn(2, 1, 8, 8))
    listened.keep(net, "plate_1")
    listened.pooled(net)
    assert torch.equal(flat(net, "running_mean"), listened.mean[0])


def test_a_batch_that_is_not_finite_is_not_taken_in_and_leaves_no_trace():
    net = listening()
    net(torch.randn(2, 1, 8, 8))
    net.domain_statistics.keep(net, "plate_1")
    before = {key: value.clone() for key, value in net.state_dict().items() if not key.endswith("tracked")}
    net(torch.full((2, 1, 8, 8), math.inf))
    net.domain_statistics.keep(net, "plate_1")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    x = torch.randn(2, 1, 8, 8)
    mean, _ = batch_statistics(net, x)
    net.domain_statistics.keep(net, "plate_2")
    torch.testing.assert_close(net.domain_statistics.mean[1], mean)
    assert net.domain_statistics.num_batches.tolist() == [1, 1, 0]


def test_norms_of_this_package_keep_the_same_statistics_over_steps_with_several_forwards():
    """As torch's with the whole batch in one forward (first norm), also around a batch that is not finite."""
    stock, fitted = listening(), network()
    fit_for_steps(fitted)
    fitted.domain_statistics.listen(fitted)
    fitted.train()
    for step, domain in enumerate(("plate_1", "plate_2", "plate_1", "plate_2")):
        x = torch.randn(4, 1, 9, 9, generator=torch.Generator().manual_seed(step)) * (step + 1)
        if step == 2:
            x[3] = math.nan
        stock(x)
        with one_step(fitted):
            for part in x.split(3):
                fitted(part)
        for net in (stock, fitted):
            net.domain_statistics.keep(net, domain)
        mine, expected = fitted.domain_statistics, stock.domain_statistics
        assert torch.equal(mine.num_batches, expected.num_batches)
        torch.testing.assert_close(mine.mean[:, :4], expected.mean[:, :4])
        torch.testing.assert_close(mine.var[:, :4], expected.var[:, :4])
    assert mine.num_batches.tolist() == [1, 2, 0]


def test_the_state_dict_has_three_keys_more_and_strict_loading_restores_everything():
    net = listening()
    plain = {key for key in network().state_dict() if not key.startswith("domain_statistics")}
    assert set(net.state_dict()) - plain == {f"domain_statistics.{key}" for key in ("mean", "var", "num_batches")}
    for name in NAMES[:2]:
        net(torch.randn(2, 1, 8, 8))
        net.domain_statistics.keep(net, name)
    other = network()
    other.load_state_dict(net.state_dict(), strict=True)
    for model in (net, other):
        model.domain_statistics.select(model, "plate_1")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net.eval()(x), other.eval()(x))
    assert [other.domain_statistics.has_seen(name) for name in (*NAMES, "plate_9")] == [True, True, False, False]


def test_it_holds_no_norms_of_its_own_and_is_found_through_wrappers():
    net = network()
    assert list(net.domain_statistics.children()) == []
    assert len(find_norms(net)) == 2
    assert get_domain_statistics(nn.Sequential(net)) is net.domain_statistics
    assert get_domain_statistics(nn.Sequential(nn.BatchNorm2d(2))) is None
    clone = copy.deepcopy(net)
    assert get_domain_statistics(clone) is not net.domain_statistics


def test_conversion_to_sync_batch_norm_keeps_the_order_of_the_channels():
    """nnU-Net converts under DDP, after the statistics were attached."""
    net = network()
    net.domain_statistics.mean[1] = torch.arange(6.0)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    converted.domain_statistics.select(converted, "plate_2")
    assert converted.first[1] is not converted.norm  # that conversion loses aliases; the tensors are still shared
    assert converted.norm.running_mean.tolist() == converted.first[1].running_mean.tolist() == [0.0, 1.0, 2.0, 3.0]
    converted.domain_statistics.listen(converted)
    assert {norm.momentum for norm in find_norms(converted).values()} == {1.0}
    assert converted.second[1].running_mean.tolist() == [4.0, 5.0]


def test_a_compiled_network_is_not_compiled_again_for_another_domain():
    torch._dynamo.reset()
    net = listening()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(3, 1, 8, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            compiled(x + step)
            net.domain_statistics.keep(net, NAMES[step % 3])
    assert net.domain_statistics.num_batches.tolist() == [2, 2, 2]
    torch._dynamo.reset()


def test_what_cannot_be_is_refused_with_the_choice():
    net = network()
    with pytest.raises(LayerError, match="domain 'plate_4' has no statistics of its own; there are plate_1, plate_2"):
        net.domain_statistics.select(net, "plate_4")
    with pytest.raises(LayerError, match=r"domains \['a', 'a'\]: give one name or more, each once"):
        DomainStatistics(["a", "a"], net)
    with pytest.raises(LayerError, match="without norms with running statistics"):
        DomainStatistics(["a"], nn.Sequential(nn.InstanceNorm2d(3)))
