import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.stages.graph import operator_of
from nnunet_norm.stages.operators import Place
from nnunet_norm.stages.regions import clip, crop, extent_of, index, whole

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}

# torch says once that it pads a copy for such kernels, which is what the comparison is about.
EVEN_KERNELS = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def numbers(axes, lowest, highest):
    return st.tuples(*[st.integers(lowest, highest)] * axes)


@st.composite
def modules(draw):
    """(module, extents of its input) of every kind that does more than look at one voxel."""
    axes = draw(st.integers(1, 3))
    extents = draw(numbers(axes, 7, {1: 30, 2: 14, 3: 10}[axes]))
    kind = draw(st.sampled_from(["conv", "same", "transposed", "avg", "max", "nearest", "linear"]))
    kernel, stride = draw(numbers(axes, 1, 4)), draw(numbers(axes, 1, 3))
    torch.manual_seed(draw(st.integers(0, 9)))
    if kind in ("nearest", "linear"):
        scale = tuple(float(s) for s in stride)
        return nn.Upsample(scale_factor=scale, mode="nearest" if kind == "nearest" else LINEAR[axes]), extents
    if kind in ("avg", "max"):
        padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
        return {"avg": AVERAGES, "max": MAXIMA}[kind][axes](kernel, stride, padding), extents
    dilation = tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(axes))
    groups, bias = draw(st.sampled_from([1, 2])), draw(st.booleans())
    options = {"dilation": dilation, "groups": groups, "bias": bias}
    if kind == "same":
        return CONVOLUTIONS[axes](2, 4, kernel, padding="same", **options), extents
    padding = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
    if kind == "conv":
        return CONVOLUTIONS[axes](2, 4, kernel, stride, padding, **options), extents
    stride = tuple(min(s, d * (k - 1) + 1) for s, d, k in zip(stride, dilation, kernel, strict=True))
    padding = tuple(min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    return TRANSPOSED[axes](2, 4, kernel, stride, padding, output_padding=extra, **options), extents


def part(operator, x, wanted):
    """What an operator makes of the part of its input that it says it needs."""
    extents = tuple(x.shape[2:])
    needed = tuple(operator.needs(axis, interval) for axis, interval in enumerate(wanted))
    held = clip(needed, extents)
    return operator.apply([crop(x, whole(extents), held)], Place([held], wanted, [extents]))


@EVEN_KERNELS
@given(modules(), st.data())
@settings(max_examples=250, deadline=None)
def test_a_part_of_the_output_is_what_torch_makes_of_everything(made, data):
    """Every operator, on any box of its output, from the voxels that it asks for: as in torch's whole result."""
    module, extents = made
    module = module.double()
    x = torch.randn((1, 2, *extents), dtype=torch.float64) - 1
    expected = module(x)
    operator = operator_of(module, len(extents))
    assert tuple(operator.length(axis, n) for axis, n in enumerate(extents)) == tuple(expected.shape[2:])
    assert operator.channels([2]) == expected.shape[1]
    wanted = []
    for n in expected.shape[2:]:
        start = data.draw(st.integers(0, n - 1))
        wanted.append((start, data.draw(st.integers(start + 1, n))))
    torch.testing.assert_close(part(operator, x, tuple(wanted)), expected[index(wanted)], rtol=1e-12, atol=1e-12)


@EVEN_KERNELS
@given(modules(), st.data())
@settings(max_examples=100, deadline=None)
def test_an_operator_needs_no_voxel_without_effect(made, data):
    """The gradient of a box with respect to the input reaches both ends of what is asked for: no halo is too wide."""
    module, extents = made
    module = module.double()
    assume(not isinstance(module, MAXIMA[len(extents)]))  # whose gradient goes to one voxel
    for parameter in module.parameters():
        parameter.data.abs_().add_(0.1)
    x = torch.rand((1, 2, *extents), dtype=torch.float64, requires_grad=True)
    y = module(x)
    operator = operator_of(module, len(extents))
    periods = [int(f) for f in getattr(module, "scale_factor", (1,) * len(extents))]
    wanted = []
    for n, period in zip(y.shape[2:], periods, strict=True):  # every tap of an interpolation has a weight in a period
        start = data.draw(st.integers(0, n // period - 1))
        wanted.append((start * period, data.draw(st.integers(start + 1, n // period)) * period))
    (gradient,) = torch.autograd.grad(y[index(wanted)].sum(), x)
    seen = (gradient[0] != 0).any(0)
    assume(seen.any())  # a box may lie in a transposed convolution's output padding
    for axis, (n, interval) in enumerate(zip(extents, wanted, strict=True)):
        start, stop = operator.needs(axis, interval)
        (places,) = torch.nonzero(seen[None].transpose(0, axis + 1).flatten(1).any(1), as_tuple=True)
        assert start <= places.min() <= places.max() < stop
        gaps = isinstance(module, TRANSPOSED[len(extents)]) and module.dilation[axis] > 1
        unweighted = getattr(module, "mode", "") in LINEAR.values() and periods[axis] == 1
        if start >= 0 and stop <= n and not gaps and not unweighted:
            assert (start, stop - 1) == (places.min(), places.max())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("wider", [0, 1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_transposed_convolution_needs_the_inputs_that_reach_its_box(stride, wider, padding):
    """By definition: input i adds to outputs i * stride - padding + k for every k of the kernel, and no other input."""
    kernel = stride + wider
    padding = min(padding, kernel - 1)
    operator = operator_of(nn.ConvTranspose1d(1, 1, kernel, stride, padding), 1)
    for start in range(12):
        for stop in range(start + 1, 14):
            box = range(start, stop)
            reaching = [i for i in range(-20, 20) if any(i * stride - padding + k in box for k in range(kernel))]
            assert operator.needs(0, (start, stop)) == (reaching[0], reaching[-1] + 1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(4, 6, (1, 3, 5), padding=(0, 1, 2)),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose3d(4, 6, (1, 2, 3), stride=(1, 2, 3)),
    ],
    ids=["conv", "strided groups", "transposed", "transposed anisotropic"],
)
def test_work_is_what_torch_counts(module):
    """Multiplications per output voxel times voxels are half of the floating-point operations that torch counts."""
    axes = len(module.kernel_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = module(torch.zeros((1, 4, *[12] * axes)))
    assert operator_of(module, axes).work([4]) * y[0, 0].numel() == counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "padding mode 'reflect'"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "padding that is not counted"),
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
        (nn.MaxPool2d(2, return_indices=True), "return_indices"),
        (nn.ConvTranspose2d(1, 1, 1, stride=2, output_padding=1), "a kernel that is smaller than the stride"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "upsampling in mode 'bicubic'"),
        (nn.Upsample(scale_factor=2, mode="nearest-exact"), "upsampling in mode 'nearest-exact'"),
        (nn.Upsample(scale_factor=1.5), "a factor that is not whole"),
        (nn.Upsample(size=(8, 8)), "to a given size"),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), "aligned corners"),
        (nn.LayerNorm(4), "a module of class LayerNorm"),
        (nn.AdaptiveAvgPool2d(1), "a module of class AdaptiveAvgPool2d"),
        (nn.MultiheadAttention(4, 1), "a module of class MultiheadAttention"),
        (nn.Softmax(1), "a module of class Softmax"),
        (nn.LocalResponseNorm(2), "a module of class LocalResponseNorm"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_run_in_blocks_is_refused(module, reason):
    """A module without a rule is refused, and the line says what about it."""
    with pytest.raises(ArchitectureError, match=reason) as caught:
        operator_of(module, 2)
    assert "\n" not in str(caught.value)


class CentredWeights(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


class NamedPooling(nn.MaxPool2d):
    """Torch's pooling under another name."""


def test_a_class_of_ones_own_counts_by_its_forward():
    """A subclass that keeps torch's forward is known whatever its name; one with its own forward is not."""
    x = torch.randn(1, 2, 8, 8)
    operator = operator_of(NamedPooling(2), 2)
    assert torch.equal(part(operator, x, ((1, 3), (0, 4))), nn.MaxPool2d(2)(x)[:, :, 1:3])
    with pytest.raises(ArchitectureError, match="a module of class CentredWeights"):
        operator_of(CentredWeights(2, 2, 3), 2)


def test_voxelwise_nonlinearities_of_torch_are_known():
    """Every activation that is taken for voxel-wise gives each voxel the value that it has by itself."""
    from nnunet_norm.stages.graph import VOXELWISE

    arguments = {nn.Threshold: (0.1, 3.0)}
    x = torch.randn(1, 3, 6, 6)
    for kind in VOXELWISE:
        module = kind(*arguments.get(kind, ())).eval()
        expected = module(x.clone())
        for wanted in (((2, 3), (4, 5)), ((0, 1), (0, 6))):
            result = part(operator_of(module, 2), x.clone(), wanted)
            assert extent_of(wanted) == tuple(result.shape[2:])
            torch.testing.assert_close(result, expected[index(wanted)], msg=kind.__name__)
