"""The tiles in which populations of images go through a network that cannot be run stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from nnunet_norm.prediction.execution import Image, read
from nnunet_norm.prediction.halo import planned_shape
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.tiling import Box, padded_shape, plan_tiles


class PopulationTiles:
    """Batches of one tile each, which together have every voxel of every image; they can be iterated again.

    Every voxel once, unless the network takes tiles of one extent alone.

    Args:
        images: (C, *spatial), each.
        patch_size: of the configuration.
        field: the network's receptive field.
    """

    def __init__(self, images: Sequence[Image], patch_size: Sequence[int], field: ReceptiveField) -> None:
        self.images = [(plane, _boxes(plane.shape[1:], patch_size, field)) for plane in images]

    @property
    def largest(self) -> tuple[int, ...]:
        """Extents of the largest tile, per axis."""
        sides = zip(*(box for _, boxes in self.images for box in boxes), strict=True)
        return tuple(max(side.stop - side.start for side in axis) for axis in sides)

    def __len__(self) -> int:
        return sum(len(boxes) for _, boxes in self.images)

    def __iter__(self) -> Iterator[Tensor]:
        for plane, boxes in self.images:
            for box in boxes:
                yield read(plane, box)


def _boxes(extents: Sequence[int], patch_size: Sequence[int], field: ReceptiveField) -> list[Box]:
    """Tiles of about the patch size, or of the one extent that the network takes."""
    if field.only_extent is None:
        return divided(extents, patch_size, field.stride)
    shape = planned_shape(extents, field.only_extent, field)
    return [tile.read for tile in plan_tiles(shape, field.only_extent, 0, field.stride)]


def divided(extents: Sequence[int], tile: Sequence[int], stride: Sequence[int]) -> list[Box]:
    """Cut an image, padded at its far end to a multiple of the stride, into tiles of about the same size, nothing twice.

    Args:
        extents: of the image.
        tile: at most so many voxels per axis; one stride at least.
        stride: borders of tiles are multiples of it.
    """
    axes = []
    for padded, wanted, step in zip(padded_shape(extents, stride), tile, stride, strict=True):
        units = padded // step
        count = -(-units // max(wanted // step, 1))
        borders = [step * (number * units // count) for number in range(count + 1)]
        axes.append([slice(start, stop) for start, stop in itertools.pairwise(borders)])
    return list(itertools.product(*axes))
