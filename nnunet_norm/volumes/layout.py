"""How a volume is cut into chunks, shards and parts; pure arithmetic on integers.

A chunk is what is compressed and read at once. A shard is a file with many chunks in it, and can only be written as a
whole: it has one writer. A part is what one process predicts: whole shards, so that no two parts write one file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

from nnunet_norm.errors import TilingError
from nnunet_norm.stages.regions import Region, whole

CHUNK_VOXELS = 64**3
SHARD_VOXELS = 256**3
"""A shard is also the smallest piece that can be predicted, recorded and done again by itself."""
SHARD_BYTES = 64 * 2**20
SHARDS_PER_PART = 8
"""At least, so that parts are about as large as each other, whatever their number."""


def shard_and_chunk(shape: Sequence[int], itemsize: int, num_parts: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the shards and of the chunks in them.

    Chunks have about 64^3 voxels; where an axis is shorter than that, the others have more. Shards are whole multiples
    of chunks, about as long on every axis, with at most 64 MiB (uncompressed) and 256^3 voxels.

    Args:
        shape: of the volume, in voxels.
        itemsize: bytes per voxel.
        num_parts: how many parts the volume is to be divided into. If there are several, shards are made smaller until
            there are eight for each, down to one chunk.

    Returns:
        The shape of a shard and that of a chunk.

    Raises:
        TilingError: an extent, ``itemsize`` or ``num_parts`` below 1.
    """
    if min((itemsize, num_parts, *shape)) < 1:
        raise TilingError(
            f"a volume of shape {tuple(shape)} with {itemsize} bytes per voxel cannot be cut for num_parts {num_parts}: "
            f"every number must be at least 1"
        )
    chunk = _chunk(shape)
    most = min(SHARD_VOXELS, SHARD_BYTES // itemsize)
    at_least = SHARDS_PER_PART * num_parts if num_parts > 1 else 1
    shard = list(chunk)
    while growing := [axis for axis in range(len(shape)) if _may_double(axis, shape, shard, most, at_least)]:
        shard[min(growing, key=lambda axis: shard[axis])] *= 2
    return tuple(shard), chunk


def shard_counts(shape: Sequence[int], shard: Sequence[int]) -> tuple[int, ...]:
    """How many shards there are on every axis."""
    return tuple(-(-n // edge) for n, edge in zip(shape, shard, strict=True))


def shards(region: Region, shard: Sequence[int]) -> Iterator[Region]:
    """The shards, clipped at the region's end, of a region that begins on the grid of shards; last axis fastest."""
    axes = [
        [(i, min(i + edge, stop)) for i in range(start, stop, edge)]
        for (start, stop), edge in zip(region, shard, strict=True)
    ]
    yield from itertools.product(*axes)


def parts(shape: Sequence[int], shard: Sequence[int], num_parts: int) -> list[Region]:
    """Divide a volume into boxes of whole shards, about equally much work each.

    Every part is predicted with a margin around it, as wide as the network sees. So of all divisions that are looked
    at (regular grids, and repeated halving for any number) the one is taken whose most expensive part is cheapest,
    a part of extents e costing prod(e + margin) with a margin of half a shard on either side.

    Args:
        shape: of the volume.
        shard: of a shard.
        num_parts: how many parts.

    Returns:
        The parts in order of their origins. They cover the volume and share no voxel.

    Raises:
        TilingError: there are fewer shards than parts.
    """
    counts = shard_counts(shape, shard)
    most = math.prod(counts)
    if not 1 <= num_parts <= most:
        raise TilingError(
            f"num_parts {num_parts}: a volume of shape {tuple(shape)} has {most} shard{'s' * (most != 1)} of "
            f"{tuple(shard)} voxels, and a shard has one writer: choose 1 to {most} parts"
        )
    volume, edges = whole(shape), tuple(shard)
    divisions = [_grid(volume, edges, cuts) for cuts in _factors(num_parts, counts)]
    divisions.append(_halved(volume, edges, num_parts))
    cheapest = min(divisions, key=lambda division: _cost(division, edges))
    return sorted(cheapest)


def _chunk(shape: Sequence[int]) -> tuple[int, ...]:
    """Powers of two, or the extent where that is shorter; the shortest axes are settled first."""
    edges, budget = list(shape), CHUNK_VOXELS
    for settled, axis in enumerate(sorted(range(len(shape)), key=lambda a: shape[a])):
        longest = int(round(budget ** (1 / (len(shape) - settled)), 6))
        edges[axis] = min(shape[axis], 1 << (longest.bit_length() - 1))
        budget = max(1, budget // edges[axis])
    return tuple(edges)


def _may_double(axis: int, shape: Sequence[int], shard: Sequence[int], most: int, at_least: int) -> bool:
    doubled = [edge * (1 + (a == axis)) for a, edge in enumerate(shard)]
    fits = math.prod(doubled) <= most and math.prod(shard_counts(shape, doubled)) >= at_least
    # No longer than twice any other edge that could be longer: long shards make parts with much surface.
    return (
        fits and shard[axis] < shape[axis] and shard[axis] <= min(s for s, n in zip(shard, shape, strict=True) if s < n)
    )


def _factors(number: int, counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to write the number as a product of one factor per axis, none above that axis' count."""
    if len(counts) == 1:
        if number <= counts[0]:
            yield (number,)
        return
    for first in range(1, min(number, counts[0]) + 1):
        if number % first == 0:
            yield from ((first, *others) for others in _factors(number // first, counts[1:]))


def _grid(volume: Region, shard: tuple[int, ...], cuts: Sequence[int]) -> list[Region]:
    axes = []
    for (start, stop), edge, pieces in zip(volume, shard, cuts, strict=True):
        count = -(-(stop - start) // edge)
        bounds = [min(start + count * i // pieces * edge, stop) for i in range(pieces + 1)]
        axes.append(list(itertools.pairwise(bounds)))
    return list(itertools.product(*axes))


def _halved(volume: Region, shard: tuple[int, ...], pieces: int) -> list[Region]:
    """Cut into two, one half or one third of the pieces on one side, and so on, as it ends up cheapest."""

    @cache
    def best(extents: tuple[int, ...], pieces: int) -> tuple[int, int, tuple[int, int, int]]:
        """Costs as of ``_cost``, and axis, place and pieces on the lower side of the first cut. Equal boxes are cut alike."""
        if pieces == 1:
            return (*_cost([whole(extents)], shard), (0, 0, 0))
        found = []
        counts = shard_counts(extents, shard)
        for axis, share in itertools.product((a for a, count in enumerate(counts) if count > 1), {2, min(3, pieces)}):
            slab = math.prod(counts) // counts[axis]
            cut = min(max(1, round(counts[axis] * (pieces // share) / pieces)), counts[axis] - 1)
            # As near to that share as the shards on either side allow.
            first = min(max(pieces // share, pieces - slab * (counts[axis] - cut), 1), slab * cut, pieces - 1)
            lower, upper = _cut(extents, axis, cut * shard[axis])
            one, other = best(lower, first), best(upper, pieces - first)
            found.append((max(one[0], other[0]), one[1] + other[1], (axis, cut * shard[axis], first)))
        return min(found)

    def divided(box: Region, pieces: int) -> list[Region]:
        if pieces == 1:
            return [box]
        axis, at, first = best(tuple(stop - start for start, stop in box), pieces)[2]
        middle = box[axis][0] + at
        lower = tuple((a, middle) if i == axis else (a, b) for i, (a, b) in enumerate(box))
        upper = tuple((middle, b) if i == axis else (a, b) for i, (a, b) in enumerate(box))
        return [*divided(lower, first), *divided(upper, pieces - first)]

    return divided(volume, pieces)


def _cut(extents: tuple[int, ...], axis: int, at: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (*extents[:axis], at, *extents[axis + 1 :]), (*extents[:axis], extents[axis] - at, *extents[axis + 1 :])


def _cost(division: Sequence[Region], margin: Sequence[int]) -> tuple[int, int]:
    """That of the most expensive part, then that of all."""
    costs = [math.prod(stop - start + m for (start, stop), m in zip(box, margin, strict=True)) for box in division]
    return max(costs), sum(costs)
