"""Which interval of the input every position of an activation depends on, one spatial axis at a time.

Convolutions, pooling and resampling are separable in what they *read*, so an activation of shape ``(N, C, *spatial)``
is described by two integer arrays per axis: position i depends on input voxels ``lo[i]`` to ``hi[i]``, both included.

Two things make the intervals those of tiling. A window that leaves the activation reads padding; the interval then
ends at minus or plus ``BORDER``, so that a result can be trusted where it stays clear of that mark. And a position that
would not exist in a tile must not be needed by the tile's core: every interval is widened to contain the position's own
place, measured from the near end for ``lo`` and from the far end for ``hi``. (For convolutions that keep the extent this
adds nothing.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]

BORDER = 1 << 40
"""Stands for "beyond the end of the axis"; larger than any position."""

NO_TAP = 1 << 50
"""Stands for "reads nothing here" in a list of taps."""


@dataclass(frozen=True)
class Axis:
    """One spatial axis of one activation.

    Attributes:
        dim: which dimension of the tensor it is, counted from the end (-1 is the last).
        lo: first input voxel that each position depends on.
        hi: last input voxel that each position depends on.
        scale: input voxels per position.
        input_length: extent of the network's input on this axis.
    """

    dim: int
    lo: Positions
    hi: Positions
    scale: Fraction
    input_length: int


@dataclass(frozen=True)
class Dependence:
    """What an activation depends on.

    Attributes:
        axes: the spatial axes, by their number in the input; one is absent when the activation does not vary along it
            or when it is no longer known how.
        period: per spatial axis of the input, the least common multiple of the scales that went into the activation.
        tile_statistics: layers on the way that normalize with statistics over space, in order of execution.
        unbounded: (order of execution, description) of the first operation on the way whose reach is not bounded.
    """

    axes: dict[int, Axis]
    period: tuple[int, ...]
    tile_statistics: tuple[str, ...] = ()
    unbounded: tuple[int, str] | None = None


def input_dependence(shape: Sequence[int]) -> Dependence:
    """The input itself: voxel i depends on voxel i.

    Args:
        shape: extents of the spatial axes, which are the tensor's last dimensions.
    """
    axes = {
        number: Axis(number - len(shape), np.arange(n, dtype=np.int64), np.arange(n, dtype=np.int64), Fraction(1), n)
        for number, n in enumerate(shape)
    }
    return Dependence(axes, (1,) * len(shape))


def gather(axis: Axis, taps: Iterable[Positions], scale: Fraction) -> Axis:
    """The axis of an operation whose output position i reads input positions ``tap[i]`` for every tap.

    Args:
        axis: the operation's input.
        taps: positions of the operation's input, one array per tap, as long as the output; outside ``[0, n)`` means
            padding, ``NO_TAP`` means nothing.
        scale: network input voxels per output position.
    """
    lo_padded = np.concatenate([[-BORDER], axis.lo, [BORDER, BORDER]])
    hi_padded = np.concatenate([[-BORDER], axis.hi, [BORDER, -BORDER]])
    n = len(axis.lo)
    lo: Positions | None = None
    hi: Positions | None = None
    for tap in taps:
        index = np.where(tap == NO_TAP, n + 2, np.clip(tap, -1, n) + 1)
        lo = lo_padded[index] if lo is None else np.minimum(lo, lo_padded[index])
        hi = hi_padded[index] if hi is None else np.maximum(hi, hi_padded[index])
    assert lo is not None
    assert hi is not None
    place = np.arange(len(lo), dtype=np.int64)
    from_near = place * scale.numerator // scale.denominator
    from_far = (place - len(lo)) * scale.numerator // scale.denominator + axis.input_length
    return replace(axis, lo=np.minimum(lo, from_near), hi=np.maximum(hi, from_far), scale=scale)


def window(axis: Axis, length: int, *, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """The axis after a convolution or pooling that yields ``length`` positions."""
    first = np.arange(length, dtype=np.int64) * stride - padding
    return gather(axis, (first + k * dilation for k in range(kernel)), axis.scale * stride)


def transposed_window(axis: Axis, length: int, *, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """The axis after a transposed convolution that yields ``length`` positions.

    Input position i contributes to output positions ``i * stride - padding + k * dilation``.
    """
    place = np.arange(length, dtype=np.int64) + padding

    def tap(k: int) -> Positions:
        position, rest = np.divmod(place - k * dilation, stride)
        return np.where(rest == 0, position, NO_TAP)

    return gather(axis, (tap(k) for k in range(kernel)), axis.scale / stride)


def resampled(axis: Axis, length: int, *, linear: bool, centred: bool) -> Axis:
    """The axis after nearest-neighbour or linear interpolation to ``length`` positions (corners not aligned).

    Args:
        axis: the operation's input.
        length: extent of the output.
        linear: two neighbours instead of one. Both count, also where one has weight 0: rounding decides that.
        centred: nearest-neighbour with voxel centres (``nearest-exact``) instead of corners.
    """
    n = len(axis.lo)
    place = np.arange(length, dtype=np.int64)
    if linear:  # floor((place + 1/2) n / length - 1/2), in integers
        first = ((2 * place + 1) * n - length) // (2 * length)
        return gather(axis, (first, first + 1), axis.scale * Fraction(n, length))
    nearest = (2 * place + 1) * n // (2 * length) if centred else place * n // length
    return gather(axis, (nearest,), axis.scale * Fraction(n, length))


def with_axes(dependence: Dependence, axes: dict[int, Axis]) -> Dependence:
    """The same history with other axes, whose scales enter the period."""
    period = list(dependence.period)
    for number, axis in axes.items():
        period[number] = lcm(period[number], axis.scale.numerator)
    return replace(dependence, axes=axes, period=tuple(period))


def union(dependences: Sequence[Dependence]) -> Dependence | None:
    """What depends on the same position of several activations; None where they do not line up."""
    first, *others = dependences
    axes = dict(first.axes)
    for other in others:
        for number, axis in other.axes.items():
            merged = _merge(axes[number], axis) if number in axes else axis
            if merged is None:
                return None
            axes[number] = merged
    if len({axis.dim for axis in axes.values()}) != len(axes):
        return None
    return replace(merged_history(dependences), axes=axes)


def merged_history(dependences: Sequence[Dependence]) -> Dependence:
    """Period, tile statistics and unbounded operations of several activations together, without axes."""
    names = dict.fromkeys(name for d in dependences for name in d.tile_statistics)
    unbounded = [d.unbounded for d in dependences if d.unbounded is not None]
    period = tuple(lcm(*periods) for periods in zip(*(d.period for d in dependences), strict=True))
    return Dependence({}, period, tuple(names), min(unbounded, default=None))


def _merge(a: Axis, b: Axis) -> Axis | None:
    if (a.dim, len(a.lo), a.scale) != (b.dim, len(b.lo), b.scale):
        return None
    if a.lo is b.lo and a.hi is b.hi:
        return a
    return replace(a, lo=np.minimum(a.lo, b.lo), hi=np.maximum(a.hi, b.hi))
