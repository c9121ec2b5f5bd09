"""Pairs of predictions of the same voxels from different tiles: what the tile mismatch is measured on.

The planned tiles hardly overlap in what they keep. So each pair takes a planned tile and an extra one, shifted by about
half a core along one axis, and compares them where both are valid: at least the halo away from every inner tile side.
Stage by stage there are no tiles but blocks: the image is predicted with two grids of blocks, shifted against each other,
and compared in blocks of the one, which the other cuts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_norm.prediction.execution import Image, Place, Result, box_of, planes, read
from nnunet_norm.prediction.predictor import HaloPredictor
from nnunet_norm.prediction.stages_plan import StagesPlan, with_blocks_elsewhere
from nnunet_norm.prediction.tiles_plan import TilesPlan
from nnunet_norm.stages.regions import clip, slices
from nnunet_norm.tiling import Box, intersection, padded_shape, relative

MEASURED_SLICES = 4
"""Slices of a stack that are predicted with two grids of blocks."""

Pair = tuple[Box, Box, Box]
"""Two tiles of the padded image, and the box of the image in which both are valid."""


def measure_tile_pairs(
    predictor: HaloPredictor, image: Tensor, max_pairs: int = 12, seed: int = 0, *, plan: TilesPlan | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict the same voxels from two tiles, again and again.

    Tiles and halo are those with which the predictor predicts this image, shifts are multiples of the total stride, nothing
    is mirrored, and the network computes in its own precision. Tiles in the middle of the image, and of a stack, come
    first. Nothing is yielded if the image fits one tile, or if the core is one stride wide.

    Args:
        predictor: its network has the weights to measure.
        image: preprocessed, (C, x, y, z).
        max_pairs: how many pairs at most.
        seed: chooses among the shifts of a tile.
        plan: the tiles; by default those that the predictor would take.

    Yields:
        Logits (K, *box) of the same box from either tile, float32 or better, on the CPU.
    """
    plan = plan or predictor.tiles_plan(image)
    in_order = [plane for _, plane in planes(image, len(plan.shape))]
    from_the_middle = [in_order[z] for z in sorted(range(len(in_order)), key=lambda z: abs(2 * z + 1 - len(in_order)))]
    pairs = _pairs(plan, max_pairs, seed)
    order = sorted(itertools.product(range(len(pairs)), range(len(from_the_middle))), key=sum)
    for pair, place in order[:max_pairs]:
        first, second, shared = pairs[pair]
        plane = from_the_middle[place]
        yield _logits(predictor, plane, first, shared), _logits(predictor, plane, second, shared)


def measure_block_pairs(
    predictor: HaloPredictor, image: Tensor, plan: StagesPlan, max_pairs: int = 12
) -> Iterator[tuple[Tensor, Tensor]]:
    """Predict an image stage by stage with two grids of blocks, and yield the same voxels from either.

    Nothing is mirrored. Blocks in the middle of the image come first; of a stack the slices in the middle are taken.

    Args:
        predictor: its network has the weights to measure.
        image: preprocessed, (C, x, y, z).
        plan: how the image was predicted.
        max_pairs: how many pairs at most.

    Yields:
        Logits (K, *box) of the same box from either grid, float32 or better, on the CPU.
    """
    if image.ndim > len(plan.image_shape) + 1:
        first = max((image.shape[1] - MEASURED_SLICES) // 2, 0)
        image = image[:, first : first + MEASURED_SLICES]
        plan = replace(plan, slices=image.shape[1])
    plans = with_blocks_elsewhere(plan)
    boxes = _blocks_in_the_middle(plans[1], image.shape[1:], max_pairs)
    if not boxes:
        return
    results = [_Boxes(boxes) for _ in plans]
    for made, result in zip(plans, results, strict=True):
        predictor.run_plan(made, image, result)
    yield from zip(*(result.logits_of_boxes() for result in results), strict=True)


class _Boxes(Result):
    """Keeps some boxes of a result and forgets the rest."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        super().__init__(())
        self._parts: list[Tensor | None] = [None] * len(boxes)
        self._boxes = boxes

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Result.add``; nothing is averaged."""
        del weight, core
        self.dtype = logits.dtype
        given = box_of(place)
        values = logits.reshape(len(logits), *(side.stop - side.start for side in given)).cpu()
        for number, box in enumerate(self._boxes):
            shared = intersection(box, given)
            if shared is not None:
                part = self._parts[number]
                if part is None:
                    part = values.new_zeros(
                        (len(values), *(side.stop - side.start for side in box)),
                        dtype=torch.promote_types(values.dtype, torch.float32),
                    )
                    self._parts[number] = part
                part[(slice(None), *relative(shared, box))] = values[(slice(None), *relative(shared, given))].to(
                    part.dtype
                )

    def logits_of_boxes(self) -> list[Tensor]:
        """Per box the logits (K, *box)."""
        return [part for part in self._parts if part is not None]


def _blocks_in_the_middle(plan: StagesPlan, extents: Sequence[int], at_most: int) -> list[Box]:
    """Blocks of the last piece as boxes of the image, those in the middle first; none if there is only one."""
    last = plan.schedule.blocks_of(len(plan.schedule.pieces) - 1)
    inside = [clip(block, plan.image_shape) for block in last] if len(last) > 1 else []
    boxes = [slices(block) for block in inside if all(start < stop for start, stop in block)]
    if len(extents) > len(plan.image_shape):
        boxes = [(slice(z, z + 1), *box) for box in boxes for z in range(extents[0])]
    middle = np.array(extents) / 2
    return sorted(boxes, key=lambda box: float(np.linalg.norm(_centre(box) - middle)))[:at_most]


def _logits(predictor: HaloPredictor, plane: Image, tile: Box, box: Box) -> Tensor:
    """The box (of the image) of a tile's prediction."""
    inside = tuple(slice(b.start - t.start, b.stop - t.start) for b, t in zip(box, tile, strict=True))
    return predictor.tile_logits(read(plane, tile))[0][(slice(None), *inside)].cpu()


def _pairs(plan: TilesPlan, at_most: int, seed: int) -> list[Pair]:
    """Pairs for one plane: in rounds over the tiles, those in the middle first, another shift in each round."""
    rng = np.random.default_rng(seed)
    middle = np.array(plan.shape) / 2
    per_tile = []
    for tile in sorted(plan.tiles, key=lambda tile: float(np.linalg.norm(_centre(tile.read) - middle))):
        candidates = _pairs_of(plan, tile.read)
        per_tile.append([candidates[i] for i in rng.permutation(len(candidates))])
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*per_tile))
    return [pair for pair in rounds if pair is not None][:at_most]


def _pairs_of(plan: TilesPlan, tile: Box) -> list[Pair]:
    """The tile with each of its shifted copies that shares valid voxels with it."""
    decision = plan.decision
    padded = padded_shape(plan.shape, decision.stride)
    image = tuple(slice(0, n) for n in decision.image_shape)
    found = []
    for axis, (side, end) in enumerate(zip(tile, padded, strict=True)):
        stride = decision.stride[axis]
        core = side.stop - side.start - sum(decision.halo[axis])
        half = max(1, round(core / 2 / stride)) * stride
        for shift in (min(half, end - side.stop), -min(half, side.start)):
            moved = (*tile[:axis], slice(side.start + shift, side.stop + shift), *tile[axis + 1 :])
            shared = intersection(_valid(tile, plan, padded), _valid(moved, plan, padded))
            inside = intersection(shared, image) if shift and shared else None
            if inside:
                found.append((tile, moved, inside))
    return found


def _valid(tile: Box, plan: TilesPlan, padded: Sequence[int]) -> Box:
    """The tile without the halo at the sides that are not borders of the image."""
    return tuple(
        slice(side.start + (before if side.start > 0 else 0), side.stop - (after if side.stop < end else 0))
        for side, (before, after), end in zip(tile, plan.decision.halo, padded, strict=True)
    )


def _centre(box: Box) -> NDArray[np.float64]:
    return np.array([(side.start + side.stop) / 2 for side in box])
