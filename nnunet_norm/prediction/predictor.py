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
from nnunet_norm.layers import IMAGE
from nnunet_norm.prediction.checks import require_finite, require_normalized
from nnunet_norm.prediction.choice import Task
from nnunet_norm.prediction.continuing import identity_of_model, identity_of_software, pinned_plan, pins_of, threads
from nnunet_norm.prediction.execution import ExecutionPlan, Folds, Image, Place, Result, Sink, flips
from nnunet_norm.prediction.journal import RunJournal
from nnunet_norm.prediction.planning_predictor import PlanningPredictor
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.prediction.tiles_plan import TilesPlan
from nnunet_norm.prediction.work_folder import Work

Plan = TypeVar("Plan", bound=StagesPlan | TilesPlan)

OUTPUT = "the network's output (its weights, or an overflow in half precision)"


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

    ``last_plan`` tells how the last image was predicted, ``network_dtype`` in which precision.

    Files are read, checked and written by ``CasePredictor``.

    Args:
        tile_step_size: accepted because nnU-Net's own code passes it; no effect, since nothing overlaps to be averaged.
        use_gaussian: as ``tile_step_size``.
        use_mirroring: average over the passes mirrored along the axes that the model allows, as nnU-Net does.
        perform_everything_on_device: keep the scratch of stages on the device, if it fits.
        device: where the network runs, in half precision (autocast) on CUDA as in nnU-Net.
        verbose: nnU-Net's own messages.
        verbose_preprocessing: nnU-Net's own messages while preprocessing.
        allow_tqdm: show progress.
        tile_size: voxels, one number for all axes or one per axis, corrected upwards to a multiple of the total stride; the
            patch size by default; or "auto": the tile that costs least among those that memory holds, where it does not
            change the result (fixed statistics, bounded receptive field), else the patch.
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
        max_memory: bytes of anonymous memory that the process may come to; None: most of what is available. A tile that
            takes more on the CPU is refused; on a CUDA device tiles are tried.
        fold_norms: fold norms with stored statistics into the convolutions before them where a model is loaded from its
            folder: faster, and the same but for rounding. ``folded_norms`` tells how many were.
        trust_checkpoint: see ``CasePredictor.trust_checkpoint``.

    Raises:
        TilingError: an argument of a wrong kind, or arguments that do not go together.
        ExperimentalBatchesError: the file of experimental batches cannot be read.

    References:
        Wu and Johnson 2021, arXiv:2105.07576 (which statistics normalize at test time, sections 4.2 and 5);
        Lin and Lu 2022, doi 10.1101/2022.10.14.512286 (those of an experimental batch, or of its controls);
        Majurski and Bajcsy 2021, doi 10.6028/jres.126.009 (exact tiling); Buglakova et al. 2025, section 3.1.
    """

    _digested: tuple[list[dict[str, Any]], str] | None = None

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Logits (K, x, y, z) of one preprocessed image (C, x, y, z), for the weights that the network has now.

        They are float32 (float64 if the network computes so), on the CPU, and mirrored passes are averaged. A 2d network
        takes the image slice by slice.

        Raises:
            InputImageError: the image or the network's output is not finite.
            TilingError: see ``plan``; or a tile or block that does not fit into the device's memory.
            OutputError: there is no room for scratch.
        """
        self._require(input_image)
        self._prepare()
        return self.predict_with(self._announced(self.plan(input_image)), input_image)

    def predict_with(self, plan: StagesPlan | TilesPlan, image: Tensor) -> Tensor:
        """Logits (K, x, y, z) by a plan for images of this shape; see ``predict_sliding_window_return_logits``."""
        return self._logits(plan, image, self._folds([]))

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Logits (K, x, y, z) of one preprocessed image (C, x, y, z), averaged over the folds, on the CPU.

        Raises:
            InputImageError, TilingError, OutputError: see ``predict_sliding_window_return_logits``.
        """
        self._require(data)
        self._prepare()
        folds = self._folds(self.list_of_parameters)
        folds.use(0)
        return self._logits(self._announced(self.plan(data)), data, folds)

    def _logits(self, plan: StagesPlan | TilesPlan, image: Tensor, folds: Folds) -> Tensor:
        empty_cache(self.device)
        result = (
            Result(image.shape[1:], plan.result_memory) if isinstance(plan, StagesPlan) else Result(image.shape[1:])
        )
        self.run_plan(plan, image, result, folds)
        empty_cache(self.device)
        require_finite(result.logits, OUTPUT)
        return result.logits

    def predict_to(self, sink: Sink, image: Image, work: Work | None = None) -> None:
        """Give the logits of an image, averaged over the folds, to a sink, box by box.

        Args:
            sink: takes them; what it has taken must be found again by the process that continues.
            image: preprocessed, (C, x, y, z): a tensor, or a volume on a disk.
            work: the folder where scratch lies if memory is short, and points are noted from which a process that is killed
                can be continued; None: neither.

        Raises:
            InputImageError, TilingError, OutputError: see ``predict_sliding_window_return_logits``; or the folder holds what
                another prediction left.
        """
        if isinstance(image, Tensor):
            self._require(image)
        self._prepare()
        folds = self._folds(self.list_of_parameters)
        folds.use(0)
        journal = None if work is None else RunJournal(work.folder, {**self.identity(), **work.identity})
        task = self.task(image, streamed=True, resumable=journal is not None)
        if journal is not None and journal.is_resumed:
            plan = pinned_plan(journal.pins, task, self.graph, self._wishes)
            self._say(f"continued where it was: {plan.describe()}")
            self.last_plan = plan
        else:
            plan = self._announced(self._streamed_plan(task, image, work))
            if journal is not None:
                journal.pin(pins_of(plan))
        with threads(journal.pins["threads"] if journal is not None else None):
            self.run_plan(plan, image, _Finite(sink), folds, journal)
        empty_cache(self.device)

    def _require(self, image: Tensor) -> None:
        """Refuse a preprocessed image that is not what the network takes."""
        require_finite(image, "the preprocessed image")
        if self.input_normalization == IMAGE:
            require_normalized(image)

    def _streamed_plan(self, task: Task, image: Image, work: Work | None) -> StagesPlan | TilesPlan:
        """The plan; where memory is short, scratch goes to the work folder."""
        staged = self.stages_or_reason(task, None if work is None else work.folder)
        return staged if isinstance(staged, StagesPlan) else self.tiles_because(staged, image, streamed=True)

    def identity(self) -> dict[str, Any]:
        """What a prediction depends on, apart from the image; JSON."""
        if self._digested is None or self._digested[0] is not self.list_of_parameters:
            self._digested = self.list_of_parameters, identity_of_model(self.list_of_parameters)
        return {
            "model": self._digested[1],
            "software": identity_of_software(),
            "device": self.device.type,
            "mirror_axes": self.mirror_axes,
            "options": {
                "execution": self.execution,
                "population": self.population,
                "tile_size": self.tile_size,
                "halo": self.halo,
            },
        }

    def _folds(self, list_of_parameters: Sequence[dict[str, Any]]) -> Folds:
        """The network with the weights of several folds; with none, with those that it has now."""
        used: list[int] = []

        def use(number: int) -> None:
            if list_of_parameters and used != [number]:
                self.bare_network.load_state_dict(list_of_parameters[number])
                used[:] = [number]

        return Folds(lambda batch: self._average(batch, self.mirror_axes), len(list_of_parameters) or 1, use)

    def _prepare(self) -> None:
        with torch.inference_mode(False):  # parameters made in inference mode could never be differentiated
            self.network.to(self.device)
        self.network.eval()

    def record(self) -> dict[str, Any] | None:
        """See ``CasePredictor.record``."""
        if self.last_plan is None:
            return None
        folded = {"folded_norms": self.folded_norms} if self.folded_norms else {}
        kind = self.input_normalization
        inputs = {} if kind is None else {"input_normalization": kind}
        return self.last_plan.as_dict() | self.population_record() | folded | inputs

    def _announced(self, plan: Plan) -> Plan:
        self._say(plan.describe())
        self.last_plan = plan
        return plan

    def run_plan(
        self,
        plan: ExecutionPlan,
        image: Image,
        sink: Sink,
        folds: Folds | None = None,
        journal: RunJournal | None = None,
    ) -> None:
        """Give the logits of an image (C, x, y, z) to a sink, by a plan for its shape.

        Args:
            plan: for images of this shape.
            image: preprocessed.
            sink: takes the logits.
            folds: the weights; by default those that the network has now.
            journal: see ``ExecutionPlan.run``.

        Raises:
            TilingError, OutputError: see ``predict_sliding_window_return_logits``.
        """
        self._prepare()
        folds = folds or self._folds([])
        with (
            torch.inference_mode(),
            self._precision(),
            tqdm(total=plan.steps(folds.count), disable=not self.allow_tqdm) as bar,
        ):

            def progress() -> None:
                self.check()
                bar.update()

            try:
                plan.run(folds, image, sink, progress, journal)
            except torch.OutOfMemoryError as error:
                raise TilingError(
                    f"the device's memory is too small ({plan.describe()}): choose a smaller --tile-size, and with it a "
                    "smaller --halo if the exact one does not fit"
                ) from error
        if isinstance(plan, StagesPlan) and isinstance(sink, Result) and not plan.schedule.is_one_pass:
            self.network_dtype = sink.dtype

    def tile_logits(self, batch: Tensor, mirror_axes: Sequence[int] = ()) -> Tensor:
        """Logits (N, K, *spatial) of tiles (N, C, *spatial), by default with nothing mirrored, in float32 or better."""
        self._prepare()
        with torch.inference_mode(), self._precision():
            return self._average(batch, mirror_axes)

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


class _Finite:
    """Refuses logits that are not finite before they become labels."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.overlap, self.adds_up = sink, sink.overlap, sink.adds_up

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Sink.add``."""
        require_finite(logits, OUTPUT)
        self.sink.add(place, logits, weight, core)


def _promoted(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
