"""``HaloPredictor``: nnU-Net's predictor with halos, cut per stage or per tile, in place of overlapping, blended tiles."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import Tensor
from tqdm import tqdm

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.checks import require_finite
from nnunet_norm.prediction.execution import ExecutionPlan, Result, TilesPlan, flips
from nnunet_norm.prediction.planning_predictor import PlanningPredictor
from nnunet_norm.prediction.stages_plan import StagesPlan

Plan = TypeVar("Plan", bound=StagesPlan | TilesPlan)


class HaloPredictor(PlanningPredictor):
    """Drop-in for nnU-Net's predictor: no averaging, every voxel written once, in the network's own precision.

    The image is zero-padded at its far end to a multiple of the network's total stride, and predicted in one of two ways:

    * ``stages``: every stage of the network runs over the whole image, in blocks with the halo of that stage alone (a few
      voxels), and leaves its output in scratch for the next. The result is that of one pass over the whole image, at any
      depth, with stored statistics as with those of the whole image.
    * ``tiles``: any module, without scratch. The image is cut into tiles on the grid of the total stride; of each tile's
      prediction the halo is thrown away and the core is written. With stored statistics and a halo that covers the
      theoretical receptive field the result is that of one pass. For networks that normalize with the statistics of the tile
      no halo can do that; images smaller than the tile are then zero-padded to it, as in training.

    ``last_plan`` tells how the last image was predicted, ``network_dtype`` in which precision. In tiles and for several
    folds it is that of the last fold; folds differ only where the halo is the effective one, measured on each fold's own
    weights and the first image that needs it.

    Files are read, checked and written by ``CasePredictor``.

    Args:
        tile_step_size: accepted because nnU-Net's own code passes it; no effect, since nothing overlaps to be averaged.
        use_gaussian: as ``tile_step_size``.
        use_mirroring: average over the passes mirrored along the axes that the model allows, as nnU-Net does.
        perform_everything_on_device: in tiles, keep image and result on the device, if they fit; with stages, the scratch.
        device: where the network runs, in half precision (autocast) on CUDA as in nnU-Net.
        verbose: nnU-Net's own messages.
        verbose_preprocessing: nnU-Net's own messages while preprocessing.
        allow_tqdm: show progress.
        tile_size: voxels, one number for all axes or one per axis; the patch size by default. Corrected upwards to a
            multiple of the total stride.
        halo: "auto" takes the theoretical halo where it fits and else the effective one; "exact" the theoretical one or
            refuses; "erf" the effective one; or voxels, one number for all axes or one per axis.
        execution: "stages", "tiles", or "auto": stages where the network and the scratch allow it, unless tile size or halo
            are given.
        population: whose statistics normalize. "stored": those of the training, the default of a network that has them.
            "image": those of the whole image, the default for InstanceNorm and GroupNorm; needs stages. "tile": those of
            each tile, as in nnU-Net with InstanceNorm. A network that has stored ones does without them then. "batch": those
            of all cases that ``predict_from_files`` is given, or of each experimental batch among them, estimated first,
            exactly, and then used as stored ones; also for InstanceNorm, whose affine parameters are kept. Neither parts
            (``num_parts``) nor cases that are predicted already change who belongs to a population.
        batches: for population "batch", which case belongs to which experimental batch: an ``ExperimentalBatches`` or its
            JSON file. A model with statistics per domain (``domain_statistics``) is used with its own of an experimental
            batch that every fold was trained on.
        controls: estimate on the controls of each experimental batch alone.
        scratch: folder for the scratch of stages, as memory-mapped files; None keeps it in memory.
        max_memory: bytes of anonymous memory that the process may come to with stages; None: most of what is available.
        fold_norms: fold norms with stored statistics into the convolutions before them where a model is loaded from its
            folder: faster, and the same but for rounding. ``folded_norms`` tells how many were.

    Raises:
        TilingError: an argument of a wrong kind, or arguments that do not go together.
        ExperimentalBatchesError: the file of experimental batches cannot be read.

    References:
        Wu and Johnson 2021, arXiv:2105.07576 (which statistics normalize at test time, sections 4.2 and 5);
        Lin and Lu 2022, doi 10.1101/2022.10.14.512286 (those of an experimental batch, or of its controls);
        Majurski and Bajcsy 2021, doi 10.6028/jres.126.009 (exact tiling); Buglakova et al. 2025, section 3.1.
    """

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Logits (K, x, y, z) of one preprocessed image (C, x, y, z), for the weights that the network has now.

        They are float32 (float64 if the network computes so), and mirrored passes are averaged. In tiles they lie on the
        device if ``perform_everything_on_device`` and memory allow it, else on the CPU. A 2d network takes the image slice by
        slice.

        Raises:
            InputImageError: the image or the network's output is not finite.
            TilingError: see ``plan``; or a tile or block that does not fit into the device's memory.
            OutputError: there is no room for scratch.
        """
        require_finite(input_image, "the preprocessed image")
        self._prepare()
        return self.predict_with(self._announced(self.plan(input_image)), input_image)

    def predict_with(self, plan: StagesPlan | TilesPlan, image: Tensor) -> Tensor:
        """Logits (K, x, y, z) by a plan for images of this shape; see ``predict_sliding_window_return_logits``."""
        empty_cache(self.device)
        if isinstance(plan, StagesPlan):
            result = Result(image.shape[1:], plan.result_memory)
            self.run_plan(plan, image, result)
        else:
            result = self._tiled(plan, image)
        return self._finished(result)

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Logits (K, x, y, z) of one preprocessed image (C, x, y, z), averaged over the folds, on the CPU.

        Stage by stage all folds are added up in one result; in tiles it is nnU-Net's own method.

        Raises:
            InputImageError, TilingError, OutputError: see ``predict_sliding_window_return_logits``.
        """
        require_finite(data, "the preprocessed image")
        self._prepare()
        staged = self.stages_or_reason(data)
        if not isinstance(staged, StagesPlan):
            return super().predict_logits_from_preprocessed_data(data)
        plan = self._announced(staged)
        result = Result(data.shape[1:], plan.result_memory, 1 / len(self.list_of_parameters))
        for weights in self.list_of_parameters:
            self.bare_network.load_state_dict(weights)
            self.run_plan(plan, data, result)
        return self._finished(result)

    def _prepare(self) -> None:
        with torch.inference_mode(False):  # parameters made in inference mode could never be differentiated
            self.network.to(self.device)
        self.network.eval()

    def record(self) -> dict[str, Any] | None:
        """See ``CasePredictor.record``."""
        if self.last_plan is None:
            return None
        folded = {"folded_norms": self.folded_norms} if self.folded_norms else {}
        return self.last_plan.as_dict() | self.population_record() | folded

    def _announced(self, plan: Plan) -> Plan:
        self._say(plan.describe())
        self.last_plan = plan
        return plan

    def _finished(self, result: Result) -> Tensor:
        empty_cache(self.device)
        require_finite(result.logits, "the network's output (its weights, or an overflow in half precision)")
        return result.logits

    def _tiled(self, plan: TilesPlan, image: Tensor) -> Result:
        """Result and image on the device if they may lie there and fit, else on the CPU."""
        if self.perform_everything_on_device:
            try:
                return self._tiled_on(self.device, plan, image)
            except torch.OutOfMemoryError:
                empty_cache(self.device)
                self._say("image and result do not fit into the device's memory and are kept on the CPU")
        try:
            return self._tiled_on(torch.device("cpu"), plan, image)
        except torch.OutOfMemoryError as error:
            raise TilingError(
                f"the device's memory is too small ({plan.describe()}): choose a smaller --tile-size, and with it a smaller "
                "--halo if the exact one does not fit"
            ) from error

    def _tiled_on(self, device: torch.device, plan: TilesPlan, image: Tensor) -> Result:
        result = Result(image.shape[1:], lambda shape, dtype: torch.zeros(*shape, dtype=dtype, device=device))
        self.run_plan(plan, image.to(device), result)
        return result

    def run_plan(self, plan: ExecutionPlan, image: Tensor, result: Result) -> None:
        """Give the logits of an image (C, x, y, z) to ``result``, by a plan for its shape and with the weights of now."""
        self._prepare()
        with (
            torch.inference_mode(),
            self._precision(),
            tqdm(total=plan.steps, disable=not self.allow_tqdm) as bar,
        ):
            plan.run(lambda batch: self._average(batch, self.mirror_axes), image, result, bar.update)
        if isinstance(plan, StagesPlan) and not plan.schedule.is_one_pass:
            self.network_dtype = result.dtype

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
        _, *mirrored = passes = flips([axis + 2 for axis in mirror_axes])
        for axes in mirrored:
            total = total + _promoted(torch.flip(network(torch.flip(batch, axes)), axes))
        return total / len(passes)

    def _precision(self) -> AbstractContextManager[Any]:
        """Half precision on CUDA, as nnU-Net; elsewhere autocast is slow (CPU) or missing (MPS)."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()


def _promoted(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
