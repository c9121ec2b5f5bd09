"""The trained model that is diagnosed: as nnU-Net predicts with it, and as this package does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError, TilingError
from nnunet_norm.layers import find_norms
from nnunet_norm.planning.topology import smallest_patch
from nnunet_norm.prediction import HaloPredictor, StagesPlan, TilesPlan
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.model_writing import complete_folds
from nnunet_norm.tiling import padded_shape

Plan = StagesPlan | TilesPlan


class DiagnosedModel:
    """One fold of a trained model, loaded twice: nnU-Net's own predictor, and the halo predictor.

    Nothing is mirrored by either, so that they are compared in what they do with tiles.

    Attributes:
        folder: the model.
        fold: which fold's weights.
        checkpoint_name: file name of the checkpoint.
        nnunet: nnU-Net's predictor as it is, but for its checks; overlapping tiles, blended with a Gaussian.
        halo: this package's predictor.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fold: int | str | None = None,
        checkpoint_name: str = "checkpoint_final.pth",
        device: torch.device,
        trust_checkpoint: bool = False,
    ) -> None:
        """Load the model.

        Args:
            folder: as ``<trainer>__<plans>__<configuration>``.
            fold: None for the first that is there.
            checkpoint_name: the checkpoint's file name.
            device: where the network runs.
            trust_checkpoint: the model may run code of its own when it is read.

        Raises:
            ModelFolderError: the model is not whole.
            SetupError: the model's trainer cannot be found.
        """
        folds = [fold] if fold is not None else complete_folds(folder, checkpoint_name)[:1]
        self.folder, self.fold, self.checkpoint_name = Path(folder), folds[0], checkpoint_name
        options: dict[str, Any] = {"use_mirroring": False, "device": device, "allow_tqdm": False}
        with redirect_stdout(StringIO()):  # nnU-Net tells twice what it does with any model
            self.nnunet = CasePredictor(**options)
            self.halo = HaloPredictor(**options, trust_checkpoint=trust_checkpoint)
            self.nnunet.trust_checkpoint = trust_checkpoint
            for predictor in (self.nnunet, self.halo):
                predictor.initialize_from_trained_model_folder(str(folder), [self.fold], checkpoint_name)

    @property
    def checkpoint(self) -> Path:
        """The file with the weights."""
        return self.folder / f"fold_{self.fold}" / self.checkpoint_name

    @property
    def network(self) -> nn.Module:
        """The network as it was trained, no norm folded, in eval mode and on its device."""
        network = self.nnunet.bare_network
        with torch.inference_mode(False):
            return network.to(self.nnunet.device).eval()

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Of the plans."""
        return tuple(int(n) for n in self.nnunet.configuration_manager.patch_size)

    @property
    def batch_size(self) -> int:
        """Of the plans."""
        return int(self.nnunet.configuration_manager.batch_size)

    @property
    def regions(self) -> bool:
        """Whether the output's channels are regions instead of labels."""
        return bool(self.nnunet.label_manager.has_regions)

    @cached_property
    def class_names(self) -> list[str]:
        """Foreground classes or regions in the order of the network's output, by their names in dataset.json."""
        names = {_hashable(value): name for name, value in self.nnunet.dataset_json["labels"].items()}
        manager = self.nnunet.label_manager
        wanted = manager.foreground_regions if self.regions else manager.foreground_labels
        return [names.get(_hashable(value), str(value)) for value in wanted]

    @cached_property
    def norms(self) -> dict[str, int]:
        """Normalization layers by class, with their number."""
        return dict(Counter(type(norm).__name__ for norm in find_norms(self.network).values()))

    @cached_property
    def why_no_tiles(self) -> str | None:
        """Why the halo predictor cannot plan for this network; None if it can."""
        try:
            _ = self.halo.field
        except ArchitectureError as error:
            return str(error)
        return None

    def describe(self) -> dict[str, Any]:
        """What the model is, for a JSON file."""
        nnunet = self.nnunet
        return {
            "folder": str(self.folder),
            "dataset": nnunet.plans_manager.dataset_name,
            "trainer": nnunet.trainer_name,
            "plans": nnunet.plans_manager.plans_name,
            "fold": self.fold,
            "checkpoint": self.checkpoint_name,
            "network": type(self.network).__name__,
            "norms": self.norms,
            "classes": self.class_names,
            "patch_size": self.patch_size,
            "batch_size": self.batch_size,
        }

    def tile_sizes(self, images: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Tile sizes to compare: from the smallest by doubling to the patch, and twice the patch where an image is larger.

        The smallest leaves 4 voxels at the bottom of the network, as nnU-Net's planners have it; an axis that no stage
        strides over keeps the patch's extent.

        Args:
            images: shapes of the images (x, y, z).
        """
        patch = self.patch_size
        if self.why_no_tiles is not None or self.halo.field.only_extent is not None:  # a network of one size
            return [patch]
        stride = self.halo.field.stride
        least = [n if s > 1 else p for n, s, p in zip(smallest_patch(stride), stride, patch, strict=True)]
        sizes = [patch]
        factor = 1
        while True:
            size = tuple(min(p, n * factor) for n, p in zip(least, patch, strict=True))
            if size == patch:
                break
            sizes.insert(-1, padded_shape(size, stride))
            factor *= 2
        if any(n > p for image in images for n, p in zip(image[-len(patch) :], patch, strict=True)):
            sizes.append(tuple(2 * p for p in patch))
        return sizes

    def predict_as_nnunet(self, image: Tensor, tile_size: Sequence[int] | None = None) -> Tensor:
        """Logits (K, x, y, z) by nnU-Net's predictor: half-overlapping tiles, Gaussian blending.

        Args:
            image: preprocessed, (C, x, y, z).
            tile_size: None for the patch of the plans.
        """
        with self._nnunet_with(tile_size or self.patch_size), redirect_stdout(StringIO()):
            return torch.as_tensor(self.nnunet.predict_sliding_window_return_logits(image)).cpu()

    @contextmanager
    def _nnunet_with(self, patch_size: Sequence[int]) -> Iterator[None]:
        """Inside, nnU-Net's predictor takes tiles of another size than the plans'."""
        before = self.nnunet.configuration_manager
        changed = before.configuration | {"patch_size": list(patch_size)}
        self.nnunet.configuration_manager = type(before)(changed)
        try:
            yield
        finally:
            self.nnunet.configuration_manager = before

    def whole_image_plan(self, image: Tensor) -> Plan | str:
        """The plan whose result is that of one pass over the whole image, or why there is none.

        Stage by stage where the network's operators are known, else the whole image as one tile.
        """
        if self.why_no_tiles is not None:
            return self.why_no_tiles
        plan: Plan | None = None
        with suppress(TilingError):  # such as: statistics of the image, and operators that are not known
            plan = self.halo.plan(image)
        if isinstance(plan, StagesPlan):
            return plan
        field = self.halo.field
        extents = image.shape[-len(field.stride) :]
        tiles = self.tiles_plan(image, field.only_extent or padded_shape(extents, field.stride))
        return tiles if tiles.decision.exact else tiles.decision.reason

    def tiles_plan(
        self, image: Tensor, tile_size: Sequence[int], effective: Sequence[Sequence[int]] | None = None
    ) -> TilesPlan:
        """The halo predictor's tiles of a given size, with the exact halo where it fits and else with a given one.

        Those of a network that takes one extent alone have the halo with which it is predicted.

        Args:
            image: preprocessed, (C, x, y, z).
            tile_size: voxels per axis of the network.
            effective: (before, after) per axis, cut where it would leave less than half of the tile; None: a quarter of it.
        """
        before = self.halo.tile_size, self.halo.halo
        widest = [n // 4 for n in tile_size]
        sides = widest if effective is None else [min(max(pair), w) for pair, w in zip(effective, widest, strict=True)]
        self.halo.tile_size = tuple(tile_size)
        self.halo.halo = "exact" if self.halo.field.only_extent is None else "auto"
        try:
            try:
                return self.halo.tiles_plan(image)
            except TilingError:  # it does not fit, or there is none
                self.halo.halo = sides
                return self.halo.tiles_plan(image)
        finally:
            self.halo.tile_size, self.halo.halo = before

    def tile_to_compare(self, image: Tensor) -> tuple[int, ...] | None:
        """The patch if the image is larger than that, else the largest size of which the image needs several tiles."""
        extents = image.shape[-len(self.patch_size) :]
        for size in sorted(self.tile_sizes([]), reverse=True):
            if any(n > t for n, t in zip(extents, size, strict=True)):
                return size
        return None


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
