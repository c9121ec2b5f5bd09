"""The operators that look at neighbours or change the resolution: convolutions, pooling, upsampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvTransposeNd

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.stages.operators import Operator, Place
from nnunet_norm.stages.regions import Interval, crop, pad


class _Window(Operator):
    """What slides a window over its input: per axis kernel, stride, dilation, and padding before and after."""

    fill = 0.0

    def __init__(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[tuple[int, int]],
    ) -> None:
        self.kernel, self.stride, self.dilation, self.padding = kernel, stride, dilation, padding

    def ratio(self, axis: int) -> Fraction:
        """See ``Operator.ratio``."""
        return Fraction(self.stride[axis])

    def length(self, axis: int, n: int) -> int:
        """See ``Operator.length``."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (n + sum(self.padding[axis]) - reach) // self.stride[axis] + 1

    def needs(self, axis: int, interval: Interval) -> Interval:
        """See ``Operator.needs``."""
        stride, (before, _) = self.stride[axis], self.padding[axis]
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        return interval[0] * stride - before, (interval[1] - 1) * stride - before + reach + 1

    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """See ``Operator.apply``."""
        needed = tuple(self.needs(axis, interval) for axis, interval in enumerate(place.wanted))
        return self.slide(pad(inputs[0], place.given[0], needed, self.fill))

    @abstractmethod
    def slide(self, x: Tensor) -> Tensor:
        """The window over an input that is padded already."""


class Convolution(_Window):
    """A convolution, whose own zero padding is done where the map ends."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        if module.padding_mode != "zeros":
            raise ArchitectureError(f"padding mode {module.padding_mode!r}")
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if isinstance(module.padding, str):
            padding = [(r // 2, r - r // 2) if module.padding == "same" else (0, 0) for r in reach]
        else:
            padding = [(int(p), int(p)) for p in module.padding]
        super().__init__(module.kernel_size, module.stride, module.dilation, padding)
        self.module = module
        self.function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(module.kernel_size)]

    def channels(self, inputs: Sequence[int]) -> int:
        """See ``Operator.channels``."""
        if inputs[0] != self.module.in_channels:
            raise ArchitectureError(f"it takes {self.module.in_channels} channels and is given {inputs[0]}")
        return self.module.out_channels

    def work(self, inputs: Sequence[int]) -> int:
        """See ``Operator.work``."""
        return self.module.weight.numel()

    def slide(self, x: Tensor) -> Tensor:
        """See ``_Window.slide``."""
        m = self.module
        return self.function(x, m.weight, m.bias, self.stride, 0, self.dilation, m.groups)


class Pooling(_Window):
    """Average or maximum pooling."""

    KINDS: ClassVar = {
        1: (nn.AvgPool1d, nn.MaxPool1d),
        2: (nn.AvgPool2d, nn.MaxPool2d),
        3: (nn.AvgPool3d, nn.MaxPool3d),
    }

    def __init__(self, module: nn.Module) -> None:
        pool: Any = module
        average = isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
        axes = next(n for n, kinds in self.KINDS.items() if isinstance(module, kinds))
        kernel, stride, padding, dilation = (
            (value,) * axes if isinstance(value, int) else tuple(value)
            for value in (pool.kernel_size, pool.stride, pool.padding, 1 if average else pool.dilation)
        )
        if pool.ceil_mode or getattr(pool, "divisor_override", None) or getattr(pool, "return_indices", False):
            raise ArchitectureError("ceil_mode, divisor_override or return_indices")
        if average and any(padding) and not pool.count_include_pad:
            raise ArchitectureError("padding that is not counted")
        super().__init__(kernel, stride, dilation, [(p, p) for p in padding])
        self.fill = 0.0 if average else -torch.inf
        name = f"{'avg' if average else 'max'}_pool{axes}d"
        self.function: Callable[..., Tensor] = getattr(functional, name)
        self.options = {} if average else {"dilation": dilation}

    def slide(self, x: Tensor) -> Tensor:
        """See ``_Window.slide``."""
        return self.function(x, tuple(self.kernel), tuple(self.stride), 0, **self.options)


class TransposedConvolution(Operator):
    """A transposed convolution: output voxel o adds up weight k of input voxel i wherever o = i * stride - padding + k."""

    def __init__(self, module: _ConvTransposeNd) -> None:
        self.module = module
        axes = len(module.kernel_size)
        self.padding = [int(p) for p in module.padding]
        self.reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r < s - 1 for r, s in zip(self.reach, module.stride, strict=True)):
            raise ArchitectureError("a kernel that is smaller than the stride")
        transposed = [functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d]
        self.function: Callable[..., Tensor] = transposed[axes - 1]

    def channels(self, inputs: Sequence[int]) -> int:
        """See ``Operator.channels``."""
        if inputs[0] != self.module.in_channels:
            raise ArchitectureError(f"it takes {self.module.in_channels} channels and is given {inputs[0]}")
        return self.module.out_channels

    def work(self, inputs: Sequence[int]) -> int:
        """See ``Operator.work``."""
        strides = 1
        for stride in self.module.stride:
            strides *= stride
        return self.module.weight.numel() // strides

    def ratio(self, axis: int) -> Fraction:
        """See ``Operator.ratio``."""
        return Fraction(1, self.module.stride[axis])

    def length(self, axis: int, n: int) -> int:
        """See ``Operator.length``."""
        extra = int(self.module.output_padding[axis])
        return (n - 1) * self.module.stride[axis] - 2 * self.padding[axis] + self.reach[axis] + extra + 1

    def needs(self, axis: int, interval: Interval) -> Interval:
        """See ``Operator.needs``."""
        stride, padding = self.module.stride[axis], self.padding[axis]
        return -((self.reach[axis] - interval[0] - padding) // stride), (interval[1] - 1 + padding) // stride + 1

    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """See ``Operator.apply``."""
        m = self.module
        needed = tuple(self.needs(axis, interval) for axis, interval in enumerate(place.wanted))
        x = pad(inputs[0], place.given[0], needed, 0.0)
        y = self.function(x, m.weight, m.bias, m.stride, 0, 0, m.groups, m.dilation)
        starts = [lo * s - p for (lo, _), s, p in zip(needed, m.stride, self.padding, strict=True)]
        return crop(y, [(start, start + n) for start, n in zip(starts, y.shape[2:], strict=True)], place.wanted)


class Upsampling(Operator):
    """Interpolation by whole factors: nearest, or linear without aligned corners."""

    def __init__(self, factors: Sequence[int], mode: str) -> None:
        self.factors, self.mode = factors, mode

    @classmethod
    def of(cls, scale: Any, mode: str, axes: int, *, size: Any, align_corners: Any) -> Upsampling:
        """From the arguments of ``torch.nn.Upsample``.

        Raises:
            ArchitectureError: a size instead of factors, factors that are not whole, another mode, or aligned corners.
        """
        factors = (scale,) * axes if isinstance(scale, int | float) else tuple(scale or ())
        if size is not None or len(factors) != axes or any(f != int(f) or f < 1 for f in factors) or align_corners:
            raise ArchitectureError(
                "upsampling to a given size, by a factor that is not whole, or with aligned corners"
            )
        if mode not in ("nearest", "linear", "bilinear", "trilinear"):
            raise ArchitectureError(f"upsampling in mode {mode!r}")
        return cls([int(f) for f in factors], mode)

    def ratio(self, axis: int) -> Fraction:
        """See ``Operator.ratio``."""
        return Fraction(1, self.factors[axis])

    def length(self, axis: int, n: int) -> int:
        """See ``Operator.length``."""
        return n * self.factors[axis]

    def needs(self, axis: int, interval: Interval) -> Interval:
        """See ``Operator.needs``."""
        factor, (start, stop) = self.factors[axis], interval
        if self.mode == "nearest":
            return start // factor, (stop - 1) // factor + 1
        return (2 * start + 1 - factor) // (2 * factor), (2 * stop - 1 - factor) // (2 * factor) + 2

    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """See ``Operator.apply``."""
        scale = [float(f) for f in self.factors]
        options = {} if self.mode == "nearest" else {"align_corners": False}
        y = functional.interpolate(
            inputs[0], scale_factor=scale, mode=self.mode, recompute_scale_factor=False, **options
        )
        covered = [(lo * f, hi * f) for (lo, hi), f in zip(place.given[0], self.factors, strict=True)]
        return crop(y, covered, place.wanted)
