"""What a halo that is smaller than the theoretical reach costs, measured on tiles of the very image that is predicted.

Of a few tiles the core is predicted a second time from a tile that is so much larger that the core is the theoretical reach
away from every side inside the image: that is what one pass over the whole image gives. Neighbours may overlap by more than
their halos; tiles whose core comes nearest to a side come first, and of these those in the middle of the image. Where memory
or patience do not allow so large a tile, the comparison is with the largest halo that they do allow, and says so.

References:
    Buglakova et al. 2025, section 3.1 (halo, theoretical and effective).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nnunet_norm.prediction.halo import Decision
from nnunet_norm.prediction.tile_axis import Sides
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.tiling import Box, Tile, padded_shape, plan_tiles, relative

TILES = 3
"""How many tiles are looked at."""

LARGEST_REFERENCE = 8
"""The larger tile has at most this many times the voxels of a planned one."""

SHARE = 0.25
"""Measuring takes at most this part of what predicting the image does; one tile is measured in any case."""

STEPS = 8
"""Between the planned and the exact halo, so many are tried from the largest on."""


@dataclass(frozen=True)
class HaloError:
    """Planned tiles beside larger ones, over the cores of a few tiles; nothing mirrored.

    Attributes:
        logits: largest difference of a logit.
        labels: share of the voxels whose label differs, from 0 to 1.
        tiles: how many tiles were compared.
        voxels: how many voxels.
        against: the larger halo, (before, after) per axis; where the image ends before, it ends.
        exact: whether that is the theoretical reach, so that the difference is the error.
    """

    logits: float
    labels: float
    tiles: int
    voxels: int
    against: Sides
    exact: bool

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def describe(self) -> str:
        """For the user, in one line."""
        halo = ", ".join(f"{before}/{after}" for before, after in self.against)
        against = f"the exact halo ({halo})" if self.exact else f"a halo of {halo}, the largest that could be afforded"
        return (
            f"the halo is smaller than the theoretical reach: on {self.tiles} tile{'s' * (self.tiles != 1)} of this image, "
            f"compared with {against}, logits differ by at most {self.logits:.3g} and {100 * self.labels:.3g} % of the "
            "labels change"
        )


def measure_halo_error(
    plane: Callable[[Box], Tensor],
    decision: Decision,
    field: ReceptiveField,
    logits: Callable[[Tensor], Tensor],
    affordable: Callable[[tuple[int, ...]], bool],
    *,
    passes: int = 1,
    regions: bool = False,
) -> HaloError | None:
    """Compare the planned halo with the exact one, or the largest that can be afforded.

    Args:
        plane: reads a box of the padded image, or of a slice in the middle of a stack, as (1, C, *box).
        decision: how the image is cut; statistics are fixed and the field is bounded.
        field: the network's receptive field.
        logits: the network, (1, C, *box) -> (1, K, *box), nothing mirrored.
        affordable: whether memory holds a tile.
        passes: mirrored passes and folds of the prediction, which measuring is compared with.
        regions: labels are regions, each with a logit of its own; else the class of the largest logit.

    Returns:
        None if not even a slightly larger halo can be afforded.
    """
    tiles = plan_tiles(decision.image_shape, decision.tile_size, decision.halo, decision.stride)
    middle = [n / 2 for n in decision.image_shape]
    sampled = sorted(tiles, key=lambda tile: (-_lacking(tile, decision, field), _distance(tile, middle)))
    planned_voxels = _voxels(sampled[0].read)
    at_most = LARGEST_REFERENCE * planned_voxels

    def fits(box: Box) -> bool:
        return _voxels(box) <= at_most and affordable(tuple(side.stop - side.start for side in box))

    chosen = next((halo for halo in _halos(decision, field) if fits(_around(sampled[0].write, halo, decision))), None)
    if chosen is None:
        return None
    left = SHARE * passes * decision.tiles * planned_voxels
    largest, changed, voxels, measured = 0.0, 0, 0, 0
    for tile in sampled[:TILES]:
        around = _around(tile.write, chosen, decision)
        left -= planned_voxels + _voxels(around)
        if measured and (left < 0 or not fits(around)):
            break
        first = logits(plane(tile.read))[0][(slice(None), *tile.core)]
        second = logits(plane(around))[0][(slice(None), *relative(tile.write, around))]
        largest = max(largest, float((first - second).abs().max()))
        labels = [value > 0 if regions else value.argmax(0, keepdim=True) for value in (first, second)]
        changed += int((labels[0] != labels[1]).any(0).sum())
        voxels += _voxels(tile.write)
        measured += 1
    exact = all(
        have >= need
        for pair, reach in zip(chosen, field.any_voxel, strict=True)
        for have, need in zip(pair, reach, strict=True)
    )
    return HaloError(largest, changed / voxels, measured, voxels, chosen, exact)


def _halos(decision: Decision, field: ReceptiveField) -> Iterator[Sides]:
    """From the theoretical reach of any voxel down to the planned halo, which is left out."""
    seen = {decision.halo}
    for step in range(STEPS, 0, -1):
        halo = tuple(
            tuple(have + math.ceil(max(full - have, 0) * step / STEPS) for have, full in zip(pair, reach, strict=True))
            if source != "none needed"
            else pair
            for pair, reach, source in zip(decision.halo, field.any_voxel, decision.source, strict=True)
        )
        sides: Sides = tuple((before, after) for before, after in halo)
        if sides not in seen:
            seen.add(sides)
            yield sides


def _around(core: Box, halo: Sides, decision: Decision) -> Box:
    """The core with the halo around it, on the grid of the stride and within the padded image."""
    padded = padded_shape(decision.image_shape, decision.stride)
    return tuple(
        slice(max(side.start - before, 0) // stride * stride, min(-(-(side.stop + after) // stride) * stride, end))
        for side, (before, after), stride, end in zip(core, halo, decision.stride, padded, strict=True)
    )


def _lacking(tile: Tile, decision: Decision, field: ReceptiveField) -> int:
    """How many voxels of the reach lie beyond the tile, where that is the most; sides at the image's border lack nothing."""
    padded = padded_shape(decision.image_shape, decision.stride)
    lacking = [0]
    for read, core, reach, end in zip(tile.read, tile.core, field.any_voxel, padded, strict=True):
        lacking += [reach[0] - core.start] if read.start > 0 else []
        lacking += [reach[1] - (read.stop - read.start - core.stop)] if read.stop < end else []
    return max(lacking)


def _distance(tile: Tile, middle: Sequence[float]) -> float:
    return math.dist([(side.start + side.stop) / 2 for side in tile.read], middle)


def _voxels(box: Box) -> int:
    return math.prod(side.stop - side.start for side in box)
