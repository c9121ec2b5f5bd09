"""``HaloPredictor``: nnU-Net's predictor with halo-cut tiles in place of overlapping, blended ones."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_norm.errors import ArchitectureError, InputImageError, TilingError
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.checks import require_finite
from nnunet_norm.prediction.execution import ExecutionPlan, TilesPlan, planes, read
from nnunet_norm.prediction.halo import HALO_WORDS, Decision, Sides, decide, planned_shape, tile_shape
from nnunet_norm.receptive_field import ReceptiveField, effective, trace
from nnunet_norm.tiling import plan_tiles

logger = logging.getLogger(__name__)

PROBES = 2
"""Tiles of an image on which the effective receptive field is measured."""


class HaloPredictor(CasePredictor):
    """Drop-in for nnU-Net's predictor: no averaging, every voxel written once, in the network's own precision.

    The image is zero-padded at its far end to a multiple of the network's total stride and cut into tiles on that grid.
    Of each tile's prediction the halo is thrown away and the core is written. With fixed statistics (BatchNorm,
    BatchRenorm, no norm) and a halo that covers the theoretical receptive field the result is that of the whole image in
    one pass. For networks that normalize with the statistics of the tile (InstanceNorm, GroupNorm) no halo can do that;
    images smaller than the tile are then zero-padded to it, because that is what the statistics were in training.

    ``last_decision`` tells how the last image was predicted, ``network_dtype`` in which precision. For several folds it is
    that of the last fold; folds differ only where the halo is the effective one, measured on each fold's own weights
    and the first image that needs it.

    Files are read, checked and written by ``CasePredictor``.

    Args:
        tile_step_size: accepted because nnU-Net's own code passes it; no effect, since nothing overlaps to be averaged.
        use_gaussian: as ``tile_step_size``.
        use_mirroring: average over the passes mirrored along the axes that the model allows, as nnU-Net does.
        perform_everything_on_device: keep image and result on the device; if they do not fit, they go to the CPU.
        device: where the network runs, in half precision (autocast) on CUDA as in nnU-Net.
        verbose: nnU-Net's own messages.
        verbose_preprocessing: nnU-Net's own messages while preprocessing.
        allow_tqdm: show progress.
        tile_size: voxels, one number for all axes or one per axis; the patch size by default. Corrected upwards to a
            multiple of the total stride.
        halo: "auto" takes the theoretical halo where it fits and else the effective one; "exact" the theoretical one or
            refuses; "erf" the effective one; or voxels, one number for all axes or one per axis.

    Raises:
        TilingError: tile size or halo of a wrong kind.

    References:
        Majurski and Bajcsy 2021, doi 10.6028/jres.126.009 (exact tiling); Buglakova et al. 2025, section 3.1.
    """

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own default
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        tile_size: Sequence[int] | None = None,
        halo: str | int | Sequence[int] = "auto",
    ) -> None:
        super().__init__(
            tile_step_size,
            use_gaussian,
            use_mirroring,
            perform_everything_on_device,
            device,
            verbose,
            verbose_preprocessing,
            allow_tqdm,
        )
        if isinstance(halo, str) and halo not in HALO_WORDS:
            raise TilingError(f"halo {halo!r} is unknown: choose {', '.join(HALO_WORDS)} or a number of voxels")
        self.tile_size = tile_size
        self.halo = halo
        self.last_plan: TilesPlan | None = None
        self.network_dtype: torch.dtype | None = None
        self._fields: WeakKeyDictionary[nn.Module, ReceptiveField] = WeakKeyDictionary()
        self._effective_of: dict[tuple[float, ...], Sides | None] = {}
        self._said: set[str] = set()

    @property
    def field(self) -> ReceptiveField:
        """The network's receptive field, traced once per network."""
        network = self.bare_network
        if network not in self._fields:
            self._fields[network] = trace(network)
        return self._fields[network]

    @property
    def last_decision(self) -> Decision | None:
        """How the last image was predicted."""
        return self.last_plan.decision if self.last_plan else None

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Spatial axes that are mirrored."""
        return tuple(self.allowed_mirroring_axes or ()) if self.use_mirroring else ()

    def plan(self, image: Tensor) -> TilesPlan:
        """How ``image`` (C, x, y, z) will be predicted.

        Raises:
            TilingError: tile size or halo that do not go together, or do not suit the network.
        """
        field, ndim = self.field, len(self.field.stride)
        if image.ndim not in (4, ndim + 1):
            raise InputImageError(f"image of shape {tuple(image.shape)} has not the four axes (C, x, y, z)")
        if not image.numel():
            raise InputImageError(f"image of shape {tuple(image.shape)} is empty")
        tile, note = tile_shape(self.tile_size, self.configuration_manager.patch_size, field)
        self._say(note)
        shape = tuple(image.shape[-ndim:])
        decision = decide(
            shape,
            field,
            tile,
            tile_is_given=self.tile_size is not None,
            halo=self.halo,
            mirror_axes=self.mirror_axes,
            slices=1 if image.ndim == ndim + 1 else image.shape[1],
            effective=lambda: self._effective_once(image, field),
        )
        return TilesPlan(decision, planned_shape(shape, tile, field))

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Logits (K, x, y, z) of one preprocessed image (C, x, y, z), for the weights that the network has now.

        They are float32 (float64 if the network computes so), mirrored passes are averaged, and they lie on the device
        if ``perform_everything_on_device`` and memory allow it. A 2d network takes the image slice by slice.

        Raises:
            InputImageError: the image or the network's output is not finite.
            TilingError: see ``plan``; or a tile that does not fit into the device's memory.
        """
        require_finite(input_image, "the preprocessed image")
        self._prepare()
        empty_cache(self.device)
        plan = self.plan(input_image)
        self._say(plan.describe())
        self.last_plan = plan
        with torch.inference_mode(), self._precision():
            logits = self._run(plan, input_image)
        empty_cache(self.device)
        require_finite(logits, "the network's output (its weights, or an overflow in half precision)")
        return logits

    def _prepare(self) -> None:
        with torch.inference_mode(False):  # parameters made in inference mode could never be differentiated
            self.network.to(self.device)
        self.network.eval()

    def record(self) -> dict[str, Any] | None:
        """See ``CasePredictor.record``."""
        return self.last_decision.as_dict() if self.last_decision else None

    def _run(self, plan: ExecutionPlan, image: Tensor) -> Tensor:
        """Result and image on the device if they may lie there and fit, else on the CPU."""
        if self.perform_everything_on_device:
            try:
                return self._run_on(self.device, plan, image)
            except torch.OutOfMemoryError:
                empty_cache(self.device)
                self._say("image and result do not fit into the device's memory and are kept on the CPU")
        try:
            return self._run_on(torch.device("cpu"), plan, image)
        except torch.OutOfMemoryError as error:
            raise TilingError(
                f"the device's memory is too small ({plan.describe()}): choose a smaller --tile-size, and with it a smaller "
                "--halo if the exact one does not fit"
            ) from error

    def _run_on(self, device: torch.device, plan: ExecutionPlan, image: Tensor) -> Tensor:
        with tqdm(total=plan.steps, disable=not self.allow_tqdm) as bar:
            return plan.run(lambda batch: self._average(batch, self.mirror_axes), image.to(device), bar.update)

    def tile_logits(self, batch: Tensor) -> Tensor:
        """Logits (N, K, *spatial) of tiles (N, C, *spatial) in one pass, nothing mirrored, in float32 or better."""
        self._prepare()
        with torch.inference_mode(), self._precision():
            return self._average(batch, ())

    def _average(self, batch: Tensor, mirror_axes: Sequence[int]) -> Tensor:
        """Logits averaged over the passes that are mirrored along every combination of the axes, none included."""
        network = self.bare_network
        weight = next((p for p in network.parameters() if p.is_floating_point()), batch)
        batch = batch.to(self.device, weight.dtype)
        output = network(batch)
        self.network_dtype = output.dtype
        total = _promoted(output)
        combinations = [
            [axis + 2 for axis in axes]
            for count in range(1, len(mirror_axes) + 1)
            for axes in itertools.combinations(mirror_axes, count)
        ]
        for axes in combinations:
            total = total + _promoted(torch.flip(network(torch.flip(batch, axes)), axes))
        return total / (len(combinations) + 1)

    def _precision(self) -> AbstractContextManager[Any]:
        """Half precision on CUDA, as nnU-Net; elsewhere autocast is slow (CPU) or missing (MPS)."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def _effective_once(self, image: Tensor, field: ReceptiveField) -> Sides | None:
        """The effective reach for the weights that the network has now; it costs a dozen tiles, so it is kept."""
        parameters = list(self.bare_network.parameters())
        weights = tuple(parameter.detach().float().sum().item() for parameter in (parameters[0], parameters[-1]))
        if weights not in self._effective_of:
            self._effective_of[weights] = self._effective(image, field)
        return self._effective_of[weights]

    def _effective(self, image: Tensor, field: ReceptiveField) -> Sides | None:
        """The effective reach on patches of this very image, spread over it; None, and a line why, if it cannot be had.

        Raises:
            TilingError: it cannot be had, and it was asked for by name.
        """
        shape = tuple(image.shape[-len(field.stride) :])
        patch, _ = tile_shape(None, self.configuration_manager.patch_size, field)
        places = [
            (plane, tile.read)
            for _, plane in planes(image, len(shape))
            for tile in plan_tiles(planned_shape(shape, patch, field), patch, 0, field.stride)
        ]
        chosen = sorted({(2 * i + 1) * len(places) // (2 * PROBES) for i in range(PROBES)})
        with torch.inference_mode(False), torch.enable_grad():
            probes = torch.cat([read(*places[i]) for i in chosen])
            try:
                return effective(self.bare_network, probes.clone())
            except (ArchitectureError, torch.OutOfMemoryError) as error:
                why = str(error).splitlines()[0]
                if self.halo == "erf":
                    raise TilingError(f"no effective halo: {why}; choose --halo in voxels") from error
        empty_cache(self.device)
        self._say(f"no effective halo ({why}): half of the tile is cut away instead")
        return None

    def _say(self, line: str | None) -> None:
        """Log a line once."""
        if line is not None and line not in self._said:
            self._said.add(line)
            logger.info(line)


def _promoted(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
