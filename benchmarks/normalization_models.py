"""A trained model of ``normalization.py``, the images it is measured on, and ways to predict them."""

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from trainings import Training

from nnunet_norm.diagnosis.cases import OUTSIDE, Chosen, LoadedCase, cases_of_dataset, load
from nnunet_norm.diagnosis.measure import reference_masks
from nnunet_norm.diagnosis.model import DiagnosedModel, Plan
from nnunet_norm.diagnosis.train_mode import as_at_the_end_of_training
from nnunet_norm.metrics import class_masks, dice_counts
from nnunet_norm.prediction import TilesPlan
from nnunet_norm.prediction.execution import Result, planes, read
from nnunet_norm.tiling import Tile, padded_shape, round_up

SHUFFLE = 0
"""Seed of the order of the tiles: a batch holds tiles of any place and case, as in training."""

VOXELS = 2**18
"""Of tiles that are predicted at once, about."""

Patch = tuple[Tensor, Tensor, Tensor]
"""Image (C, *patch), masks of the classes (K, *patch), and where they count (1, *patch)."""


class Trained:
    """A model folder, opened when it is first needed.

    Args:
        folder: ``<trainer>__<plans>__<configuration>``.
        choose: from the model, which cases it is measured on.
    """

    def __init__(self, folder: Path, choose: Callable[[DiagnosedModel], Chosen]) -> None:
        self.folder, self.choose = folder, choose

    @cached_property
    def model(self) -> DiagnosedModel:
        """The model, for both predictors."""
        model = DiagnosedModel(self.folder, fold=0, device=torch.device("cpu"))
        if model.halo.field.norms_of_tiles and isinstance(model.halo.graph, str):
            model.halo.population = "tile"  # that of the image needs stages
        return model

    @property
    def one_size(self) -> bool:
        """Whether the network takes tiles of the patch alone."""
        return self.model.halo.field.only_extent is not None

    @property
    def in_tiles(self) -> bool:
        """Whether images are best predicted in tiles of the patch, which the network was made for."""
        return self.one_size or self.model.halo.field.normalizes_tiles

    @cached_property
    def images(self) -> list[tuple[LoadedCase, Tensor, Tensor]]:
        """The cases, with masks of the classes (1, K, x, y, z) and where they count (1, 1, x, y, z)."""
        found = []
        for case in self.choose(self.model).cases:
            loaded = load(self.model.nnunet, case, sys.maxsize)
            assert loaded.reference is not None, case
            valid = (loaded.reference != OUTSIDE)[None, None]
            found.append((loaded, reference_masks(self.model, loaded.reference) & valid, valid))
        return found

    @cached_property
    def network(self) -> nn.Module:
        """In eval mode; its train mode is that of the last epochs of its training."""
        return as_at_the_end_of_training(self.model.network, self.model.nnunet).eval()

    def patches(self, size: Sequence[int]) -> list[Patch]:
        """All images cut into patches side by side, in a random but fixed order; for 2d slice by slice.

        The last patch of an axis ends where the image does, and lies on its neighbour as far as that takes; an image that is
        smaller is padded with zeros, which do not count.
        """
        found = []
        for case, masks, valid in self.images:
            for image, truth, counts in _planes(case.image, masks[0], valid[0], len(size)):
                missing = [max(p - n, 0) for n, p in zip(image.shape[1:], size, strict=True)]
                ends = [width for m in reversed(missing) for width in (m // 2, m - m // 2)]
                parts = [torch.nn.functional.pad(part, ends) for part in (image, truth, counts)]
                for box in _boxes(parts[0].shape[1:], size):
                    found.append(tuple(part[(slice(None), *box)] for part in parts))
        order = np.random.default_rng(SHUFFLE).permutation(len(found))
        return [found[number] for number in order]

    def best_plan(self, image: Tensor) -> Plan:
        """How the halo predictor serves this network best: as one pass over the whole image, if it can."""
        plan = "it was made for tiles" if self.in_tiles else self.model.whole_image_plan(image)
        return self.model.halo.plan(image) if isinstance(plan, str) else plan

    def tiles_plan(self, image: Tensor, size: Sequence[int], halo: Sequence[int]) -> TilesPlan:
        """Tiles of a size with a halo, which is 0 on an axis that a tile spans."""
        predictor = self.model.halo
        before = predictor.tile_size, predictor.halo
        extents = image.shape[-len(size) :]
        cut = [0 if n <= t else h for n, t, h in zip(extents, size, halo, strict=True)]
        predictor.tile_size, predictor.halo = tuple(size), cut
        try:
            return predictor.tiles_plan(image)
        finally:
            predictor.tile_size, predictor.halo = before

    def in_tiles_of(self, image: Tensor, size: Sequence[int], halo: Sequence[int]) -> Tensor:
        """Logits (K, x, y, z) by those tiles, several at a time, which is faster for small ones."""
        plan = self.tiles_plan(image, size, halo)
        several = max(VOXELS // math.prod(size), 1)
        groups: dict[tuple[int, ...], list[Tile]] = defaultdict(list)
        for tile in plan.tiles:
            groups[tuple(side.stop - side.start for side in tile.read)].append(tile)
        result = Result([*image.shape[1 : image.ndim - len(size)], *plan.shape])
        for index, plane in planes(image, len(size)):
            for same in groups.values():
                for start in range(0, len(same), several):
                    tiles = same[start : start + several]
                    logits = self.model.halo.tile_logits(torch.cat([read(plane, tile.read) for tile in tiles]))
                    for tile, values in zip(tiles, logits, strict=True):
                        result.put((*index, *tile.write), values[(slice(None), *tile.core)])
        return result.logits[(slice(None), *[slice(0, n) for n in image.shape[1:]])]

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Voxels per axis that a halo needs for the convolutions, on the grid of the total stride."""
        field = self.model.halo.field
        return tuple(round_up(max(pair), stride) for pair, stride in zip(field.aligned, field.stride, strict=True))

    def comparable_tile(self, image: Tensor) -> tuple[int, ...]:
        """The patch, larger where the halo of the convolutions would leave less than an eighth of it."""
        stride, extents = self.model.halo.field.stride, image.shape[-len(self.reach) :]
        return tuple(
            min(max(p, round_up(2 * r + p // 8, s)), max(p, round_up(n, s)))
            for p, r, s, n in zip(self.model.patch_size, self.reach, stride, extents, strict=True)
        )

    def tile_sizes(self, image: Tensor) -> list[tuple[int, ...]]:
        """From half of the patch by doubling, as long as an image needs several; empty for a network of one size."""
        sizes = self.model.tile_sizes([])
        if len(sizes) == 1 or self.one_size:
            return []
        least = sizes[-2]
        stride, extents = self.model.halo.field.stride, image.shape[-len(least) :]
        sizes, factor = [], 1
        while any(n > t * factor for n, t in zip(extents, least, strict=True)):
            whole = padded_shape(extents, stride)
            sizes.append(tuple(min(t * factor, max(n, t)) for t, n in zip(least, whole, strict=True)))
            factor *= 2
        return sizes

    def dice(self, predict: Callable[[Tensor], Tensor]) -> list[float | None]:
        """Dice per class of logits (K, x, y, z) of all images together."""
        counts = torch.zeros(2, len(self.model.class_names), dtype=torch.float64)
        for case, masks, valid in self.images:
            found = class_masks(predict(case.image)[None], regions=self.model.regions)
            counts += dice_counts(found & valid, masks)
        return of_counts(counts)


def own_cases(count: int) -> Callable[[DiagnosedModel], Chosen]:
    """The validation cases of the model's own dataset, at most so many."""
    return lambda model: cases_of_dataset(model.nnunet, 0, count)


def opened(run: Training, count: int) -> Trained:
    """A finished training of the benchmark."""
    return Trained(run.fold.parent, own_cases(count))


def stamp_of(run: Training) -> list[int]:
    """Size and time of a training's checkpoint: what is derived from it holds as long as they are the same."""
    about = run.checkpoint.stat()
    return [about.st_size, about.st_mtime_ns]


def of_counts(counts: Tensor) -> list[float | None]:
    """Dice of counts (2, K); None for a class that is in neither."""
    return numbers((counts[0] / counts[1]).tolist())


def numbers(values: Sequence[float]) -> list[float | None]:
    """None for NaN, which JSON lacks."""
    return [None if math.isnan(value) else value for value in values]


def batches(patches: Sequence[Patch], size: int) -> Iterator[Patch]:
    """Whole batches: their size decides what BatchNorm does."""
    for start in range(0, len(patches) - size + 1, size):
        images, masks, valid = (torch.stack(parts) for parts in zip(*patches[start : start + size], strict=True))
        yield images, masks, valid


def _planes(image: Tensor, masks: Tensor, valid: Tensor, axes: int) -> Iterator[tuple[Tensor, ...]]:
    parts = (image, masks, valid)
    return iter([parts]) if axes == image.ndim - 1 else zip(*(part.unbind(1) for part in parts), strict=True)


def _boxes(shape: Sequence[int], size: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    counts = [-(-n // p) for n, p in zip(shape, size, strict=True)]
    starts = [np.linspace(0, n - p, c).round().astype(int) for n, p, c in zip(shape, size, counts, strict=True)]
    for place in itertools.product(*starts):
        yield tuple(slice(start, start + p) for start, p in zip(place, size, strict=True))
