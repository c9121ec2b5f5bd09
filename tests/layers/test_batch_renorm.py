"""BatchRenorm: torch's BatchNorm when its limits are closed, the paper's formula when they are open."""

import contextlib
import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import BatchRenorm2d, BatchRenorm3d, plain_batch_statistics

CLASSES = {2: (BatchRenorm2d, nn.BatchNorm2d), 3: (BatchRenorm3d, nn.BatchNorm3d)}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def along_channels(vector, x):
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def formula(layer, x, r_max, d_max):
    """The definition, under autograd, from the layer's running statistics as they are now."""
    axes = [0, *range(2, x.dim())]
    mean, std = x.mean(axes), torch.sqrt(x.var(axes, unbiased=False) + layer.eps)
    running_std = torch.sqrt(layer.running_var.clone() + layer.eps)
    r = (std / running_std).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / running_std).clamp(-d_max, d_max).detach()
    y = (x - along_channels(mean, x)) / along_channels(std, x) * along_channels(r, x) + along_channels(d, x)
    return y if layer.weight is None else y * along_channels(layer.weight, x) + along_channels(layer.bias, x)


def drawn(layer):
    """Affine parameters other than ones and zeros."""
    if layer.weight is not None:
        nn.init.uniform_(layer.weight, -2, 2)
        nn.init.uniform_(layer.bias, -2, 2)
    return layer


def gradients(y, x, layer):
    torch.manual_seed(1)
    return torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (4, 3, 3, 4, 5), (1, 2, 2, 1, 3)])
def test_closed_limits_are_batch_norm_and_its_buffers_to_the_last_bit(shape, affine):
    torch.manual_seed(0)
    renorm_class, norm_class = CLASSES[len(shape) - 2]
    renorm = drawn(renorm_class(shape[1], affine=affine, r_max=1, d_max=0))
    norm = norm_class(shape[1], affine=affine, momentum=0.01)
    norm.load_state_dict(renorm.state_dict())
    for step in range(4):
        x = (torch.randn(shape) * (step + 1) + step).requires_grad_()
        mine, theirs = renorm(x), norm(x)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(gradients(mine, x, renorm), gradients(theirs, x, norm))
        for name in BUFFERS:
            assert torch.equal(getattr(renorm, name), getattr(norm, name)), (name, step)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (4, 3, 3, 4, 5), (1, 2, 2, 1, 3), (3, 1, 1, 2)])
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.1, 0.2), (1.0, 2.0), (2.0, 0.0)])
def test_open_limits_are_the_formula_forward_and_backward(shape, affine, limits):
    torch.manual_seed(0)
    r_max, d_max = limits
    layer = CLASSES[len(shape) - 2][0](
        shape[1], affine=affine, momentum=0.3, r_max=r_max, d_max=d_max, warmup_steps=0, ramp_steps=0
    )
    drawn(layer.double())
    for step in range(4):
        x = (torch.randn(shape, dtype=torch.double) * (0.5 + step) + step**2).requires_grad_()
        expected = formula(layer, x, r_max, d_max)
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients(y, x, layer), gradients(expected, x, layer), rtol=0, atol=1e-10)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_gradients_are_right_when_some_are_not_needed(frozen):
    torch.manual_seed(0)
    layer = drawn(BatchRenorm2d(3, warmup_steps=0, ramp_steps=0).double())
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=frozen != "input")
    if frozen != "input":
        getattr(layer, frozen).requires_grad_(False)
    wanted = [t for t in (x, layer.weight, layer.bias) if t.requires_grad]
    expected = formula(layer, x, 3, 5)
    y = layer(x)
    out = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, out), torch.autograd.grad(expected, wanted, out), rtol=0, atol=1e-10
    )


@given(warmup=st.integers(0, 20), ramp=st.integers(0, 20), r_max=st.floats(1, 5), d_max=st.floats(0, 9))
@settings(max_examples=50, deadline=None)
def test_limits_open_gradually_from_batch_norm_to_their_end_points(warmup, ramp, r_max, d_max):
    layer = BatchRenorm2d(1, r_max=r_max, d_max=d_max, warmup_steps=warmup, ramp_steps=ramp)
    seen = []
    for step in range(warmup + ramp + 2):
        layer.num_batches_tracked.fill_(step)
        seen.append([limit.item() for limit in layer.limits()])
    assert all(limits == [1, 0] for limits in seen[:warmup])
    assert seen[warmup + ramp] == seen[-1] == pytest.approx([r_max, d_max])
    steps = [after[0] - before[0] for before, after in itertools.pairwise(seen)]
    assert max(steps, default=0) <= (r_max - 1) / (ramp + 1) + 1e-5  # no jump


def test_the_schedule_is_applied_as_limits_says():
    torch.manual_seed(0)
    layer = BatchRenorm3d(4, warmup_steps=2, ramp_steps=3).double()
    for step in range(8):
        x = torch.randn(2, 4, 3, 3, 3, dtype=torch.double) * 7 + 3 * step
        limits = [limit.item() for limit in layer.limits()]
        expected = formula(layer, x, *limits)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)  # the limits above are single precision
        assert layer.num_batches_tracked == step + 1


def test_a_continued_training_continues_the_schedule_exactly():
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 4, 4) * (i + 1) for i in range(9)]
    straight = BatchRenorm2d(3, warmup_steps=2, ramp_steps=4)
    for x in batches[:4]:
        straight(x)
    continued = BatchRenorm2d(3, warmup_steps=2, ramp_steps=4)
    continued.load_state_dict(straight.state_dict())
    for x in batches[4:]:
        assert torch.equal(straight(x), continued(x))


def test_running_statistics_do_not_remember_their_initial_values():
    torch.manual_seed(0)
    layer = BatchRenorm2d(2, momentum=0.01)
    batches = [torch.randn(4, 2, 8, 8) * 3 + 50 for _ in range(20)]
    for x in batches:
        layer(x)
    # Fewer steps than 1 / momentum: the plain mean of what was seen.
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))


def test_running_statistics_become_an_exponential_average():
    layer = BatchRenorm2d(1, momentum=0.25).double()
    expected = 0.0
    for step in range(12):
        x = torch.randn(2, 1, 3, 3, dtype=torch.double) + step
        weight = max(0.25, 1 / (step + 1))
        expected = (1 - weight) * expected + weight * x.mean().item()
        layer(x)
    assert layer.running_mean.item() == pytest.approx(expected, abs=1e-12)


def test_momentum_none_is_the_mean_of_all_batches():
    layer = BatchRenorm2d(1, momentum=None).double()
    batches = [torch.randn(2, 1, 3, 3, dtype=torch.double) + i for i in range(30)]
    for x in batches:
        layer(x)
    assert layer.running_mean.item() == pytest.approx(torch.stack(batches).mean().item(), abs=1e-12)


def test_eval_mode_is_batch_norms_and_changes_nothing():
    torch.manual_seed(0)
    layer, norm = drawn(BatchRenorm3d(4)), nn.BatchNorm3d(4)
    layer(torch.randn(2, 4, 5, 5, 5) * 4 + 2)
    norm.load_state_dict(layer.state_dict(), strict=True)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, 4, 1, 1, 1)
    assert torch.equal(layer.eval()(x), norm.eval()(x))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
def test_state_dict_is_batch_norms_both_ways(affine):
    for renorm_class, norm_class in CLASSES.values():
        layer, norm = renorm_class(3, affine=affine), norm_class(3, affine=affine)
        assert list(layer.state_dict()) == list(norm.state_dict())
        layer.load_state_dict(norm.state_dict(), strict=True)
        norm.load_state_dict(layer.state_dict(), strict=True)


def test_affine_off_has_no_parameters():
    assert list(BatchRenorm2d(3, affine=False).parameters()) == []


def test_it_is_no_batch_norm_that_ddp_would_convert():
    layer = BatchRenorm3d(4, r_max=2.5)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer


def test_one_value_per_channel_is_refused_and_not_taken_in():
    layer = BatchRenorm3d(4)
    with pytest.raises(
        LayerError, match=r"more than 1 value per channel when training, got input size \(1, 4, 1, 1, 1\)"
    ):
        layer(torch.randn(1, 4, 1, 1, 1))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_batch_that_is_not_finite_leaves_the_statistics_as_they_were(bad, closed):
    layer = BatchRenorm2d(2, r_max=1, d_max=0) if closed else BatchRenorm2d(2)
    layer(torch.randn(2, 2, 4, 4))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 2, 4, 4)
    x[0, 1, 2] = bad
    layer(x)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    layer(torch.randn(2, 2, 4, 4))
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_input_are_single(dtype):
    torch.manual_seed(0)
    layer, reference = (
        drawn(BatchRenorm3d(3, warmup_steps=0, ramp_steps=0)),
        BatchRenorm3d(3, warmup_steps=0, ramp_steps=0),
    )
    reference.load_state_dict(layer.state_dict())
    x = (torch.randn(2, 3, 16, 16, 16) + 100).to(dtype)  # a mean that half precision could not sum
    y = layer(x.requires_grad_())
    expected = reference(x.detach().float())
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.02)
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32


def test_under_autocast_the_statistics_are_single():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 4, 3), BatchRenorm2d(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = conv(torch.randn(2, 1, 16, 16))
        y = norm(hidden)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, hidden.float().mean((0, 2, 3)))
    y.float().sum().backward()
    assert conv.weight.grad.isfinite().all()


def test_plain_batch_statistics_close_the_limits_for_a_while():
    torch.manual_seed(0)
    layer = BatchRenorm2d(3, warmup_steps=0, ramp_steps=0)
    x = torch.randn(2, 3, 4, 4) + 9
    layer(x)
    with contextlib.suppress(KeyError), plain_batch_statistics(nn.Sequential(layer)):
        torch.testing.assert_close(layer(x - 5), nn.functional.batch_norm(x - 5, None, None, training=True))
        raise KeyError
    assert (layer.r_max, layer.d_max) == (3.0, 5.0)


def test_correction_says_what_is_clipped_and_changes_nothing():
    layer = BatchRenorm2d(2, warmup_steps=0, ramp_steps=0).double()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 2, 16, 16, dtype=torch.double)
    x[:, 1] = x[:, 1] * 10 + 100
    correction = layer.correction(x)
    assert correction.clipped.tolist() == [False, True]
    assert correction.r[1].item() == pytest.approx(10, rel=0.1)
    assert correction.d[1].item() == pytest.approx(100, rel=0.1)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(
    ("argument", "value"), [("r_max", 0.5), ("d_max", -1.0), ("warmup_steps", -1), ("ramp_steps", -2)]
)
def test_arguments_out_of_range_are_refused(argument, value):
    with pytest.raises(LayerError, match=f"{argument}={value}"):
        BatchRenorm2d(3, **{argument: value})


def test_input_of_another_rank_is_refused():
    with pytest.raises(LayerError, match=r"expected 5D input .* got 4D"):
        BatchRenorm3d(3)(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("affine", [True, False])
def test_compiled_gradients_are_the_eager_ones_over_several_steps(affine):
    """The partitioner may recompute r from buffers that the forward pass has already updated: gradients would be wrong."""
    torch.manual_seed(0)
    torch.compiler.reset()
    layers = [nn.Conv2d(2, 4, 3), BatchRenorm2d(4, affine=affine, warmup_steps=1, ramp_steps=2), nn.LeakyReLU()]
    eager = nn.Sequential(
        *layers, nn.Conv2d(4, 3, 1), BatchRenorm2d(3, affine=affine, warmup_steps=1, ramp_steps=2)
    ).double()
    bare = copy.deepcopy(eager)
    compiled = torch.compile(bare)
    for step in range(6):
        x = torch.randn(2, 2, 9, 9, dtype=torch.double) * (step + 1) + step
        out = torch.randn(2, 3, 7, 7, dtype=torch.double)
        expected = torch.autograd.grad((eager(x) * out).sum(), list(eager.parameters()))
        mine = torch.autograd.grad((compiled(x) * out).sum(), list(bare.parameters()))
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dict(bare.named_buffers()), dict(eager.named_buffers()), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for p, q, g in zip(eager.parameters(), bare.parameters(), expected, strict=True):
                p.sub_(0.01 * g)
                q.sub_(0.01 * g)


def test_compiled_closed_limits_are_batch_norm_too():
    torch.compiler.reset()
    torch.manual_seed(0)
    layer, norm = BatchRenorm2d(3, r_max=1, d_max=0).double(), nn.BatchNorm2d(3, momentum=0.01).double()
    compiled = torch.compile(layer, backend="aot_eager")
    for step in range(3):
        x = torch.randn(2, 3, 4, 4, dtype=torch.double) + step
        torch.testing.assert_close(compiled(x), norm(x))
        torch.testing.assert_close(dict(layer.named_buffers()), dict(norm.named_buffers()))


def test_compiled_layers_refuse_and_guard_as_eager_ones():
    torch.compiler.reset()
    layer = BatchRenorm2d(2)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(torch.randn(2, 2, 4, 4))
    before = copy.deepcopy(layer.state_dict())
    compiled(torch.full((2, 2, 4, 4), float("nan")))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    with pytest.raises(LayerError, match="more than 1 value per channel"):
        compiled(torch.randn(1, 2, 1, 1))


def test_the_schedule_does_not_recompile():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = BatchRenorm2d(2, warmup_steps=2, ramp_steps=3)
    compiled = torch.compile(layer, backend=counter)
    for step in range(8):
        compiled(torch.randn(2, 2, 4, 4) + step).sum().backward()
    assert counter.frame_count == 1
    assert layer.num_batches_tracked == 8


def test_a_training_step_does_not_wait_for_the_device():
    """On the meta device any ``item()`` or data-dependent branch raises."""
    layer = BatchRenorm3d(2).to("meta")
    assert layer(torch.empty(2, 2, 4, 4, 4, device="meta")).shape == (2, 2, 4, 4, 4)
