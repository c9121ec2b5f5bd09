"""Which tiles an image is cut into and which part of each is kept; pure arithmetic on integers, no arrays.

A tiled prediction equals the prediction of the whole image when the network's statistics are fixed, tile origins and
sizes are multiples of its total stride, and every core is at least the theoretical reach away from every tile side that
is not an image border. ``plan_tiles`` lays tiles out so that this holds whenever the halo is at least that reach.

References:
    Majurski and Bajcsy 2021, doi 10.6028/jres.126.009 (exact tiling); Buglakova et al. 2025, section 3.1 (halo).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_norm.errors import TilingError

Halo = int | Sequence[int | Sequence[int]]
"""One number for every axis and side, or per axis a number or a pair (before, after); in voxels."""

Box = tuple[slice, ...]
"""One slice with explicit start and stop per spatial axis."""


@dataclass(frozen=True)
class Tile:
    """One tile of a plan. Slices cover the spatial axes only, with explicit start and stop.

    Attributes:
        read: the tile in the image padded to ``padded_shape``; origin and extent are multiples of the stride.
        core: the part of the network's output for this tile that is kept (relative to the tile's origin).
        write: the core's place in the result, which has the shape of the unpadded image. Same extents as ``core``.
    """

    read: Box
    core: Box
    write: Box


def padded_shape(image_shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Smallest shape not below ``image_shape`` that the network can take: per axis the next multiple of ``stride``.

    The padding goes to the far end of every axis, so that voxel i of the image is voxel i of the padded image.

    Args:
        image_shape: extent per spatial axis, in voxels.
        stride: total stride per spatial axis.

    Raises:
        TilingError: an extent or stride below 1, or numbers of axes that differ.
    """
    image = _integers("image shape", image_shape, len(image_shape), minimum=1)
    return tuple(round_up(n, s) for n, s in zip(image, _integers("stride", stride, len(image), minimum=1), strict=True))


def smallest_tile(halo: Halo, stride: Sequence[int]) -> tuple[int, ...]:
    """Smallest tile shape with which ``plan_tiles`` can cover an image of any size.

    Per axis ``halo before + halo after + stride``, rounded up to a multiple of the stride: neighbouring tiles are at
    least one stride apart, and their cores must close up.

    Args:
        halo: see ``plan_tiles``.
        stride: total stride per spatial axis.

    Raises:
        TilingError: as for ``plan_tiles``.
    """
    strides = _integers("stride", stride, len(stride), minimum=1)
    halos = _halo_per_axis(halo, len(strides))
    return tuple(round_up(before + after + s, s) for (before, after), s in zip(halos, strides, strict=True))


def plan_tiles(image_shape: Sequence[int], tile_shape: Sequence[int], halo: Halo, stride: Sequence[int]) -> list[Tile]:
    """Cut an image into as few tiles of equal shape as the halo allows, and say what is kept of each.

    The axes are planned independently and combined. Where the padded image (see ``padded_shape``) is larger than the
    tile, all tiles have the tile's extent, the first begins at 0 and the last ends at the padded image's end; origins
    are spread evenly on the grid of the stride. Where it is not, there is one tile of the padded extent. A side of a
    tile that is an image border has no halo: the network's own padding acts there as it does in the whole image.

    Where two neighbours overlap by more than their halos, the cores meet in the middle, on the grid of the stride if a
    grid point is allowed. So if the halo is a multiple of the stride, every core begins on that grid and ends on it or
    at the image's end, and the halo may be the *aligned* reach rounded up to the stride; any other halo must be the
    reach for *any voxel*.

    Args:
        image_shape: extent of the unpadded image per spatial axis.
        tile_shape: extent of a tile per spatial axis, multiples of the stride.
        halo: what is cut away at every tile side that is not an image border: one number, or per axis a number or a
            pair (before, after).
        stride: total stride of the network per spatial axis.

    Returns:
        The tiles, last axis fastest. Their ``write`` boxes cover every voxel of the unpadded image exactly once.

    Raises:
        TilingError: numbers of axes that differ, numbers out of range, a tile that is not a multiple of the stride, or
            a halo that leaves nothing of a tile.
    """
    image = _integers("image shape", image_shape, len(image_shape), minimum=1)
    strides = _integers("stride", stride, len(image), minimum=1)
    tile = _integers("tile shape", tile_shape, len(image), minimum=1)
    halos = _halo_per_axis(halo, len(image))
    axes = [
        _plan_axis(axis, n, t, h, s) for axis, (n, t, h, s) in enumerate(zip(image, tile, halos, strides, strict=True))
    ]
    return [Tile(*zip(*parts, strict=True)) for parts in itertools.product(*axes)]


def intersection(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, or None where they share no voxel.

    Args:
        a: slices with explicit start and stop, in the same coordinates as ``b`` (for example ``Tile.write``).
        b: as ``a``.

    Raises:
        TilingError: numbers of axes that differ.
    """
    if len(a) != len(b):
        raise TilingError(f"boxes of {len(a)} and {len(b)} axes have no intersection: give boxes of the same image")
    shared = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return shared if all(side.start < side.stop for side in shared) else None


def relative(box: Box, to: Box) -> Box:
    """A box in the coordinates of another, whose first voxel is their origin."""
    return tuple(slice(b.start - t.start, b.stop - t.start) for b, t in zip(box, to, strict=True))


def _plan_axis(axis: int, n: int, tile: int, halo: tuple[int, int], stride: int) -> list[tuple[slice, slice, slice]]:
    """(read, core, write) of every tile along one axis."""
    if tile % stride:
        raise TilingError(
            f"tile size {tile} on axis {axis} is not a multiple of the network's total stride {stride}: "
            f"the next valid size is {round_up(tile, stride)}"
        )
    padded = round_up(n, stride)
    origins = _origins(axis, padded, tile, halo, stride)
    tile = min(tile, padded)
    cuts = [0, *(_cut(p, q, tile, halo, stride) for p, q in itertools.pairwise(origins)), n]
    assert all(p < q for p, q in itertools.pairwise(cuts)), (n, tile, halo, stride, cuts)
    return [
        (slice(o, o + tile), slice(start - o, stop - o), slice(start, stop))
        for o, (start, stop) in zip(origins, itertools.pairwise(cuts), strict=True)
    ]


def _origins(axis: int, padded: int, tile: int, halo: tuple[int, int], stride: int) -> list[int]:
    """Fewest origins on the grid whose halo-cut tiles close up, spread evenly, each a stride or more from the next."""
    if padded <= tile:
        return [0]
    largest_step = (tile - sum(halo)) // stride
    if largest_step < 1:
        smallest = min(padded, round_up(sum(halo) + stride, stride))
        raise TilingError(
            f"halo {halo[0]} before and {halo[1]} after on axis {axis} leaves no core of a tile of {tile} "
            f"(total stride {stride}): the smallest tile size that will do is {smallest}"
        )
    distance = (padded - tile) // stride
    steps = -(-distance // largest_step)
    return [stride * (i * distance // steps) for i in range(steps + 1)]


def _cut(origin: int, following: int, tile: int, halo: tuple[int, int], stride: int) -> int:
    """Where the core of the tile at ``origin`` ends and that of the following one begins."""
    first, last = following + halo[0], origin + tile - halo[1]
    assert first <= last, (origin, following, tile, halo)
    middle = (first + last) // 2
    on_grid = round_up(first, stride)
    return max(on_grid, middle // stride * stride) if on_grid <= last else middle


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def _integers(what: str, values: Sequence[int], axes: int, *, minimum: int) -> tuple[int, ...]:
    """The values as a tuple of ints, one per axis and not below ``minimum``."""
    try:
        numbers = tuple(operator.index(v) for v in values)
    except TypeError:
        raise TilingError(f"{what} {values!r} is not a sequence of whole numbers: give one per axis") from None
    if not numbers:
        raise TilingError(f"{what} () has no axes: give one number per axis")
    if len(numbers) != axes:
        raise TilingError(
            f"{what} {numbers} has {len(numbers)} axes, but the image has {axes}: give one number per axis"
        )
    if min(numbers) < minimum:
        raise TilingError(f"{what} {numbers} has a value below {minimum}: every axis needs at least {minimum}")
    return numbers


def _halo_per_axis(halo: Halo, axes: int) -> list[tuple[int, int]]:
    """The halo as (before, after) per axis."""
    per_axis = [halo] * axes if isinstance(halo, int) or not isinstance(halo, Sequence) else list(halo)
    if len(per_axis) != axes:
        raise TilingError(
            f"halo {halo!r} has {len(per_axis)} axes, but the image has {axes}: give one number for all or one per axis"
        )
    pairs = []
    for side in per_axis:
        pair = tuple(side) if isinstance(side, Sequence) else (side, side)
        if len(pair) != 2:
            raise TilingError(
                f"halo {pair} of an axis has {len(pair)} numbers: give one number or a pair (before, after)"
            )
        before, after = _integers("halo", pair, 2, minimum=0)
        pairs.append((before, after))
    return pairs
