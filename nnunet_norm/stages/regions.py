"""Boxes of a map as intervals, and the blocks that a map is cut into; arithmetic, and cropping and padding of tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import functional

Interval = tuple[int, int]
"""Start and stop along one axis, in voxels of one map."""

Region = tuple[Interval, ...]
"""One interval per spatial axis."""


def whole(extents: Sequence[int]) -> Region:
    """The region of a whole map."""
    return tuple((0, n) for n in extents)


def extent_of(region: Region) -> tuple[int, ...]:
    """Extents of a region."""
    return tuple(stop - start for start, stop in region)


def clip(region: Region, extents: Sequence[int]) -> Region:
    """The part of a region that lies within a map."""
    return tuple((max(start, 0), min(stop, n)) for (start, stop), n in zip(region, extents, strict=True))


def hull(a: Region, b: Region) -> Region:
    """The smallest region that holds both."""
    return tuple((min(p[0], q[0]), max(p[1], q[1])) for p, q in zip(a, b, strict=True))


def slices(region: Region, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """The region as slices of a map, or of a part of it that begins at ``origin``."""
    starts = origin or (0,) * len(region)
    return tuple(slice(start - o, stop - o) for (start, stop), o in zip(region, starts, strict=True))


def index(region: Region, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """The region as an index of a tensor (N, C, *spatial); see ``slices``."""
    return (slice(None), slice(None), *slices(region, origin))


def crop(x: Tensor, covered: Sequence[Interval], wanted: Region) -> Tensor:
    """The wanted region of a tensor (N, C, *covered)."""
    if tuple(covered) == wanted:
        return x
    return x[index(wanted, [start for start, _ in covered])]


def pad(x: Tensor, covered: Region, needed: Region, value: float) -> Tensor:
    """A tensor (N, C, *covered), padded to the region that is needed where it reaches beyond."""
    if covered == needed:
        return x
    widths = [(c[0] - n[0], n[1] - c[1]) for c, n in zip(covered, needed, strict=True)]
    return functional.pad(x, [width for pair in reversed(widths) for width in pair], value=value)


def block_shape(extents: Sequence[int], most: float, shortest: int = 8) -> tuple[int, ...]:
    """Extents of the blocks that a map is cut into: about equal edges, with at most ``most`` voxels in a block.

    Args:
        extents: of the map.
        most: voxels of a block.
        shortest: edges are not made shorter than about this, whatever ``most`` says.
    """
    counts = [1] * len(extents)
    edges = list(extents)
    while math.prod(edges) > most and max(edges) >= 2 * shortest:
        axis = max(range(len(edges)), key=lambda a: edges[a])
        counts[axis] += 1
        edges[axis] = -(-extents[axis] // counts[axis])
    return tuple(edges)


def blocks(extents: Sequence[int], shape: Sequence[int], shift: Sequence[int] | None = None) -> Iterator[Region]:
    """Blocks that cover a map, about as large as each other; with a shift, the grid begins that far before the map."""
    yield from itertools.product(
        *(intervals(n, edge, moved) for n, edge, moved in zip(extents, shape, shift or (0,) * len(shape), strict=True))
    )


def intervals(n: int, edge: int, shift: int = 0) -> list[Interval]:
    """An axis of extent ``n`` cut into pieces of at most ``edge``."""
    if not shift:
        count = -(-n // edge)
        cuts = [n * i // count for i in range(count + 1)]
    else:
        cuts = sorted({0, n, *range(edge - shift % edge, n, edge)})
    return list(itertools.pairwise(cuts))
