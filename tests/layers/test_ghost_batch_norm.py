"""GhostBatchNorm: BatchNorm of each part of a batch, with running statistics of the whole, counted once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import GhostBatchNorm2d, GhostBatchNorm3d

CLASSES = {2: (GhostBatchNorm2d, nn.BatchNorm2d), 3: (GhostBatchNorm3d, nn.BatchNorm3d)}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def pair(shape, size, **options):
    """The layer and torch's, with the same affine parameters, other than ones and zeros."""
    ghost_class, norm_class = CLASSES[len(shape) - 2]
    ghost = ghost_class(shape[1], normalization_batch_size=size, **options)
    norm = norm_class(shape[1], **options)
    if ghost.affine:
        nn.init.uniform_(ghost.weight, -2, 2)
        nn.init.uniform_(ghost.bias, -2, 2)
    norm.load_state_dict(ghost.state_dict())
    return ghost, norm


def gradients(y, x, layer):
    torch.manual_seed(1)
    return torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (4, 3, 3, 4, 5), (1, 2, 2, 1, 3)])
def test_a_size_of_the_batch_or_more_is_batch_norm(shape, momentum, affine):
    torch.manual_seed(0)
    for size in (shape[0], shape[0] + 3):
        ghost, norm = pair(shape, size, momentum=momentum, affine=affine)
        for step in range(3):
            x = (torch.randn(shape) * (step + 1) + step).requires_grad_()
            mine, theirs = ghost(x), norm(x)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
            torch.testing.assert_close(gradients(mine, x, ghost), gradients(theirs, x, norm), rtol=0, atol=0)
            for name in BUFFERS:
                torch.testing.assert_close(getattr(ghost, name), getattr(norm, name), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([2, 3]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_each_part_is_normalized_as_batch_norm_does_and_the_whole_is_taken_in_once(batch, size, ndim, seed):
    """Outputs, gradients and buffers, for any batch and size; the last part may be smaller."""
    torch.manual_seed(seed)
    shape = (batch, 3, *[2, 3, 2][:ndim])
    ghost, norm = pair(shape, size, momentum=0.3)
    ghost, norm = ghost.double(), norm.double()
    parts = CLASSES[ndim][1](3).double()
    parts.load_state_dict(norm.state_dict())
    for step in range(2):
        x = (torch.randn(shape, dtype=torch.double) * (step + 1) + 5 * step).requires_grad_()
        expected = torch.cat([parts(part) for part in x.split(size)])
        y = ghost(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients(y, x, ghost), gradients(expected, x, parts), rtol=0, atol=1e-10)
        norm(x)
        for name in BUFFERS:
            torch.testing.assert_close(getattr(ghost, name), getattr(norm, name), rtol=1e-12, atol=1e-12)


def test_the_variance_between_the_parts_is_in_the_running_variance():
    """Two constant samples: no variance in either part, all of it between them."""
    layer = GhostBatchNorm2d(1, momentum=1.0)
    y = layer(torch.tensor([0.0, 8.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2).contiguous())
    assert torch.equal(y, torch.zeros(2, 1, 2, 2))
    assert layer.running_mean.item() == pytest.approx(4)
    assert layer.running_var.item() == pytest.approx(16 * 8 / 7)


def test_one_sample_each_is_instance_norm():
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(GhostBatchNorm2d(4)(x), nn.InstanceNorm2d(4)(x))


def test_momentum_none_is_the_mean_of_all_batches():
    layer = GhostBatchNorm2d(2, momentum=None, normalization_batch_size=2).double()
    batches = [torch.randn(5, 2, 3, 3, dtype=torch.double) * (i + 1) + i for i in range(4)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    assert layer.num_batches_tracked == 4


def test_eval_mode_is_batch_norms_and_changes_nothing():
    ghost, norm = pair((4, 3, 5, 5), 2)
    ghost(torch.randn(4, 3, 5, 5) * 3 + 1)
    norm.load_state_dict(ghost.state_dict())
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(ghost.eval()(x), norm.eval()(x))
    assert all(torch.equal(getattr(ghost, name), getattr(norm, name)) for name in BUFFERS)


@pytest.mark.parametrize("affine", [True, False])
def test_state_dict_is_batch_norms_both_ways(affine):
    for ghost_class, norm_class in CLASSES.values():
        ghost, norm = ghost_class(3, affine=affine), norm_class(3, affine=affine)
        assert list(ghost.state_dict()) == list(norm.state_dict())
        ghost.load_state_dict(norm.state_dict())
        norm.load_state_dict(ghost.state_dict())


def test_it_is_no_batch_norm_that_ddp_would_convert():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(GhostBatchNorm2d(3)))
    assert type(network[0]) is GhostBatchNorm2d


@pytest.mark.parametrize(("batch", "size", "parts"), [(1, 1, 1), (3, 1, 3), (3, 2, 2)])
def test_a_part_with_one_value_per_channel_is_refused_and_not_taken_in(batch, size, parts):
    layer = GhostBatchNorm2d(3, normalization_batch_size=size)
    message = (
        rf"more than 1 value per channel when training, got 1 for {parts} part\(s\) of input size \({batch}, 3, 1, 1\)"
    )
    with pytest.raises(LayerError, match=message):
        layer(torch.randn(batch, 3, 1, 1))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.eval()(torch.randn(batch, 3, 1, 1)).isfinite().all()


def test_an_empty_batch_is_refused():
    with pytest.raises(LayerError, match="got 0 for 1 part"):
        GhostBatchNorm2d(3)(torch.randn(0, 3, 4, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_leaves_the_statistics_as_they_were(bad):
    """Also where it is one part of several."""
    layer = GhostBatchNorm2d(2)
    x = torch.randn(3, 2, 4, 4)
    layer(x)
    before = {name: getattr(layer, name).clone() for name in BUFFERS}
    x[1, 0, 0, 0] = bad
    layer(x)
    assert all(torch.equal(getattr(layer, name), value) for name, value in before.items())


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(LayerError, match=f"normalization_batch_size={size}: must be at least 1"):
        GhostBatchNorm3d(3, normalization_batch_size=size)


def test_input_of_another_rank_is_refused():
    with pytest.raises(LayerError, match=r"expected 4D input .*got 5D"):
        GhostBatchNorm2d(3)(torch.randn(2, 3, 4, 4, 4))
    with pytest.raises(LayerError, match=r"expected 5D input .*got 4D"):
        GhostBatchNorm3d(3).eval()(torch.randn(2, 3, 4, 4))


def test_its_options_are_printed():
    assert "normalization_batch_size=2, sync=True" in repr(GhostBatchNorm2d(3, normalization_batch_size=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_statistics_are_single(dtype):
    """Running statistics are those of the half-precision input, in single precision arithmetic."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 1), GhostBatchNorm2d(3, momentum=1.0, normalization_batch_size=2))
    inputs = []
    network[1].register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    with torch.autocast("cpu", dtype):
        y = network(torch.randn(5, 1, 16, 16) + 20)
        y.float().square().sum().backward()
    assert inputs[0].dtype == y.dtype == dtype
    x = inputs[0].double()
    torch.testing.assert_close(network[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(network[1].running_var.double(), x.var((0, 2, 3)), rtol=1e-4, atol=0)
    assert network[1].running_mean.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_that_was_cast_as_a_whole_trains(dtype):
    """As with BatchNorm; close to single precision, whose statistics it uses."""
    torch.manual_seed(0)
    layer = GhostBatchNorm2d(3, momentum=1.0, normalization_batch_size=2).to(dtype)
    x = (torch.randn(4, 3, 8, 8) * 2 + 5).to(dtype)
    y = layer(x)
    y.float().pow(3).sum().backward()
    assert y.dtype == layer.weight.grad.dtype == layer.running_mean.dtype == dtype
    expected = GhostBatchNorm2d(3, normalization_batch_size=2)(x.float())
    torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer.running_mean.float(), x.float().mean((0, 2, 3)), rtol=0.01, atol=0)
    assert layer.weight.grad.isfinite().all()


def test_compiled_steps_are_the_eager_ones():
    """Outputs, gradients, buffers, over several steps."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    eager = GhostBatchNorm2d(3, normalization_batch_size=2)
    compiled_layer = GhostBatchNorm2d(3, normalization_batch_size=2)
    compiled_layer.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_layer, fullgraph=True)
    for step in range(3):
        x = (torch.randn(5, 3, 6, 4) * (step + 1) + step).requires_grad_()
        mine, theirs = compiled(x), eager(x)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(
            gradients(mine, x, compiled_layer), gradients(theirs, x, eager), rtol=1e-4, atol=1e-5
        )
        for name in BUFFERS:
            torch.testing.assert_close(getattr(compiled_layer, name), getattr(eager, name))
    assert compiled_layer.num_batches_tracked == 3
