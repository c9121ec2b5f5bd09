"""Forwards of one optimizer step count as one batch, and repetitions for nothing."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import (
    BatchNorm2d,
    BatchRenorm2d,
    FrozenBatchNorm,
    GhostBatchNorm2d,
    TrackedInstanceNorm2d,
    TrackedInstanceNorm3d,
    convert_norm,
    fit_for_steps,
    one_step,
    repeated,
    tracking_norms,
)

NORMS = {
    "renorm": lambda: BatchRenorm2d(3, warmup_steps=1, ramp_steps=2, momentum=0.3),
    "renorm, mean of all": lambda: BatchRenorm2d(3, warmup_steps=0, ramp_steps=1, momentum=None),
    "closed": lambda: BatchRenorm2d(3, r_max=1, d_max=0, momentum=0.3),
    "batch": lambda: BatchNorm2d(3),
    "batch, mean of all": lambda: BatchNorm2d(3, momentum=None),
    "ghost": lambda: GhostBatchNorm2d(3, normalization_batch_size=2),
    "ghost, mean of all": lambda: GhostBatchNorm2d(3, momentum=None),
    "instance": lambda: TrackedInstanceNorm2d(3, momentum=0.3),
}
every_norm = pytest.mark.parametrize("kind", NORMS)


def batch(step=0, samples=5):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 3, 4, 3, generator=generator, dtype=torch.float64)
    return x * torch.arange(1, samples + 1).view(-1, 1, 1, 1) * (1 + step) + step


def make(kind):
    torch.manual_seed(0)
    norm = NORMS[kind]()
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm.double()


def buffers(module):
    return torch.cat([buffer.double().flatten() for buffer in module.buffers()])


def close(mine, expected, tolerance=1e-11):
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@every_norm
def test_a_step_with_one_forward_is_a_forward_without_a_step(kind):
    """Outputs, gradients of input and parameters, running statistics and their count, over steps in which limits open."""
    alone, stepping = make(kind), make(kind)
    for step in range(4):
        found = []
        for norm in (alone, stepping):
            x = batch(step).requires_grad_()
            norm.zero_grad()
            if norm is stepping:
                with one_step(norm):
                    y = norm(x)
                    (y**3).sum().backward()
            else:
                y = norm(x)
                (y**3).sum().backward()
            found.append((y.detach(), x.grad, *(p.grad for p in norm.parameters()), buffers(norm)))
        close(found[1], found[0])


@given(
    st.sampled_from(sorted(NORMS)),
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_a_batch_are_taken_in_as_the_whole_batch(kind, steps):
    """Whatever the parts: running statistics and their count are those of a layer that got all at once."""
    whole, parts = make(kind), make(kind)
    for step, sizes in enumerate(steps):
        x = batch(step, sum(sizes))
        whole(x)
        with one_step(parts):
            for part in x.split(sizes):
                parts(part)
        close(buffers(parts), buffers(whole))


def test_the_running_variance_has_the_variance_between_the_parts():
    """Two constant samples of 0 and 8 with 4 values each: 16 in all, times 8/7; of instance statistics none."""
    expected = {BatchNorm2d: 16 * 8 / 7, TrackedInstanceNorm2d: 0}
    for kind, variance in expected.items():
        norm = kind(1, momentum=1.0).double()
        with one_step(norm):
            for value in (0.0, 8.0):
                norm(torch.full((1, 1, 2, 2), value, dtype=torch.float64))
        assert norm.running_mean.item() == pytest.approx(4)
        assert norm.running_var.item() == pytest.approx(variance)


def test_correction_and_limits_are_those_of_the_beginning_of_the_step():
    """Every part is normalized as the first forward of a step would be, also the one after others."""
    norm = NORMS["renorm"]().double()
    for step in range(4):
        with one_step(norm):
            before = copy.deepcopy(norm)
            before.collected = None  # a layer without a step
            for part in batch(step).split(2):
                close(norm(part), copy.deepcopy(before)(part))


@every_norm
def test_a_repetition_gives_the_same_and_counts_for_nothing(kind):
    once, again = make(kind), make(kind)
    for step in range(2):
        with one_step(once), one_step(again):
            for part in batch(step).split(2):
                first = again(part)
                assert torch.equal(first, once(part))
                with repeated(again), repeated(again):
                    assert torch.equal(again(part), first)
                with repeated(again):
                    again(part + 1)
        assert torch.equal(buffers(again), buffers(once))
        assert not again.repeating


@every_norm
def test_after_an_exception_nothing_is_taken_in(kind):
    norm = make(kind)
    norm(batch())
    before = buffers(norm)
    with pytest.raises(RuntimeError, match="stop"), one_step(norm):  # noqa: PT012
        norm(batch(1))
        raise RuntimeError("stop")
    assert torch.equal(buffers(norm), before)
    assert norm.collected is None
    norm(batch(1))
    assert not torch.equal(buffers(norm), before)


@every_norm
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_part_that_is_not_finite_is_not_taken_in(kind, bad):
    """Wherever the part comes; the next step is."""
    norm = make(kind)
    norm(batch())
    before = buffers(norm)
    for place in range(2):
        parts = [part.clone() for part in batch(1).split(3)]
        parts[place][0, 0, 0, 0] = bad
        with one_step(norm):
            for part in parts:
                norm(part)
        assert torch.equal(buffers(norm), before)
    with one_step(norm):
        norm(batch(1))
    assert buffers(norm).isfinite().all()
    assert not torch.equal(buffers(norm), before)


def test_norms_that_saw_nothing_are_left_alone():
    """One that the forward does not use, one in eval mode, and all in a step without a forward."""
    used, unused, evaluated = BatchRenorm2d(3).double(), BatchNorm2d(3), BatchNorm2d(3).double().eval()
    network = nn.ModuleList([used, unused, evaluated])
    with one_step(network):
        pass
    assert used.num_batches_tracked == 0
    with one_step(network):
        used(batch())
        evaluated(batch())
    assert [norm.num_batches_tracked.item() for norm in network] == [1, 0, 0]
    for norm in (unused, evaluated):
        assert torch.equal(norm.running_mean, torch.zeros(3))
        assert torch.equal(norm.running_var, torch.ones(3))


def test_a_step_inside_a_step_is_our_mistake():
    norm = BatchNorm2d(3)
    with one_step(norm), pytest.raises(AssertionError, match="a step inside a step"), one_step(norm):
        pass


class Block(nn.Module):
    """As nnU-Net's, it has its norm under two names."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm(4)
        self.all_modules = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), self.norm)

    def forward(self, x):
        return self.all_modules(x)


def test_norms_that_share_their_statistics_count_once():
    """Conversion to SyncBatchNorm makes two modules of one with two names, of which the forward uses one."""
    torch.manual_seed(3)
    stock = nn.Sequential(Block(nn.BatchNorm2d), nn.Conv2d(4, 3, 1), Block(nn.BatchNorm2d)).double()
    reference = copy.deepcopy(stock)
    network = fit_for_steps(nn.SyncBatchNorm.convert_sync_batchnorm(stock))
    assert [type(network[0].norm), type(network[0].all_modules[1])] == [BatchNorm2d] * 2
    for step in range(3):
        x = batch(step, 4)
        reference(x)
        with one_step(network):
            network(x)
        close(
            torch.cat([buffers(norm) for norm in tracking_norms(network)]),
            torch.cat([buffers(norm) for norm in tracking_norms(reference)]),
        )
    assert network[2].norm.num_batches_tracked == 3


def test_fitting_keeps_tensors_momentum_and_names():
    """Every kind of torch's norms with running statistics, and nothing else."""
    stock = nn.ModuleDict(
        {
            "conv": nn.Conv3d(1, 3, 1),
            "batch": nn.BatchNorm3d(3, momentum=0.7, eps=1e-3),
            "synchronized": nn.SyncBatchNorm(3, momentum=None),
            "instance": nn.InstanceNorm3d(3, momentum=0.2, track_running_stats=True, affine=True),
            "plain instance": nn.InstanceNorm3d(3),
            "plain batch": nn.BatchNorm3d(3, track_running_stats=False),
            "frozen": FrozenBatchNorm(3),
            "ghost": GhostBatchNorm2d(3, momentum=0.4),
        }
    )
    stock["batch"].eval()
    before = dict(stock.state_dict(keep_vars=True))
    momenta = {name: norm.momentum for name, norm in stock.items() if name != "conv"}
    assert fit_for_steps(stock) is stock
    after = stock.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: norm.momentum for name, norm in stock.items() if name != "conv"} == momenta
    assert [type(norm).__name__ for norm in stock.values()][1:] == [
        *("BatchNorm3d", "BatchNorm3d", "TrackedInstanceNorm3d", "InstanceNorm3d", "BatchNorm3d", "FrozenBatchNorm"),
        "GhostBatchNorm2d",
    ]
    assert type(stock["plain batch"]) is nn.BatchNorm3d
    assert isinstance(stock["instance"], TrackedInstanceNorm3d)
    assert (stock["batch"].eps, stock["batch"].training, stock["batch"].sync) == (1e-3, False, "full")


def test_one_spatial_axis_cannot_be_fitted_and_says_so():
    with pytest.raises(
        LayerError, match=r"takes the place of SyncBatchNorm exists for \[2, 3\] spatial axes, and '0' has 1"
    ):
        fit_for_steps(nn.Sequential(nn.SyncBatchNorm(3), nn.Conv1d(3, 3, 1)))


def test_repetitions_are_refused_where_they_would_count():
    """Norms of torch in train mode, and ours outside of a step; not in eval mode, not frozen, not without statistics."""
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    message = r"norm '1' \(torch's BatchNorm2d\) updates its running .* call fit_for_steps\(network\) first"
    with one_step(stock), pytest.raises(LayerError, match=message), repeated(stock):
        pass
    ours = nn.Sequential(BatchRenorm2d(3))
    message = r"norm '0' \(BatchRenorm2d\) is run again for the same step: run the step inside one_step\(network\)"
    with pytest.raises(LayerError, match=message), repeated(ours):
        pass
    for harmless in (stock.eval(), ours.eval(), FrozenBatchNorm(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)):
        with repeated(harmless):
            pass


def test_nothing_of_a_step_goes_into_the_state_dict():
    norm = BatchRenorm2d(3)
    keys = list(norm.state_dict())
    with one_step(norm):
        assert list(norm.state_dict()) == keys


def test_half_precision_is_collected_in_double_precision():
    """Values around 1000 with deviations of 1, under autocast and in a network that was cast as a whole."""
    x = 1000 + torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for norm in (
        BatchRenorm2d(3, momentum=1.0),
        GhostBatchNorm2d(3, momentum=1.0),
        TrackedInstanceNorm2d(3, momentum=1.0),
    ):
        with one_step(norm):
            for part in x.to(torch.bfloat16).split(3):
                norm(part)
        of_samples = x.to(torch.bfloat16).double()
        close(norm.running_mean.double(), of_samples.mean((0, 2, 3)), 1e-5)
        assert norm.running_var.isfinite().all()
    whole = BatchRenorm2d(3).to(torch.bfloat16)
    with one_step(whole):
        whole(x.to(torch.bfloat16))
    assert whole.running_mean.dtype == torch.bfloat16
    assert whole.num_batches_tracked == 1


COMPILED = {
    "inductor": lambda: [BatchRenorm2d(3, warmup_steps=0, ramp_steps=2, momentum=0.3), BatchNorm2d(3)],
    # The partition into forward and backward without the generation of code, which takes long.
    "aot_eager_decomp_partition": lambda: [GhostBatchNorm2d(3), TrackedInstanceNorm2d(3)],
}


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_steps_are_the_eager_ones(backend):
    """Gradients and running statistics over steps of two parts and their repetitions, in which BatchRenorm's limits open."""

    def network():
        torch.manual_seed(5)
        layers = [(nn.Conv2d(3, 3, 1, bias=False), norm, nn.LeakyReLU()) for norm in COMPILED[backend]()]
        return nn.Sequential(*itertools.chain(*layers))

    torch._dynamo.reset()
    eager, bare = network(), network()
    compiled = torch.compile(bare, backend=backend)
    for step in range(3):
        for module, run in ((eager, eager), (bare, compiled)):
            module.zero_grad()
            with one_step(module):
                for part in batch(step, 4).float().split(2):
                    (run(part) ** 3).sum().backward()
                    with repeated(module):
                        (run(part) ** 2).sum().backward()
        for mine, expected in zip(bare.parameters(), eager.parameters(), strict=True):
            scale = expected.grad.abs().max()
            torch.testing.assert_close(mine.grad / scale, expected.grad / scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(buffers(bare), buffers(eager), rtol=1e-5, atol=1e-5)


def test_conversion_in_the_middle_of_a_training_goes_on_from_the_same_statistics():
    """A network fitted for steps is frozen, and back, with the very same tensors."""
    network = fit_for_steps(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False)))
    tensors = dict(network.state_dict(keep_vars=True))
    for name in ("frozen_batch_norm", "batch_norm"):
        convert_norm(network, name)
        assert all(value is tensors[key] for key, value in network.state_dict(keep_vars=True).items())
    assert type(network[0]) is nn.BatchNorm2d
