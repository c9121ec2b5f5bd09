"""The final validation with the halo predictor, and its report on what the norm does."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_norm.errors import TilingError
from nnunet_norm.metrics import PairDifference, TileMismatch, compare_pair, summarize
from nnunet_norm.prediction import (
    HaloPredictor,
    StagesPlan,
    TilesPlan,
    export_prediction_atomically,
    measure_block_pairs,
    measure_tile_pairs,
)
from nnunet_norm.prediction.memory import anonymous_memory, default_max_memory
from nnunet_norm.training.disparity import Disparity, DisparityCounts, measure_disparity
from nnunet_norm.training.distributed import gathered, patient_barriers
from nnunet_norm.training.patches import foreground_of, foreground_patches, whole_batches
from nnunet_norm.training.reporting import mismatch_as_dict, named, none_for_nan
from nnunet_norm.writing import write_json

if TYPE_CHECKING:
    from nnunet_norm.training.trainer import NormTrainer

REPORT = "norm_report.json"
"""Stands in the validation folder, beside nnU-Net's ``summary.json``."""

MEASURED_CASES = 10
"""Validation cases of one process on which disparity and tile mismatch are measured; all cases are predicted."""

CASES_WITH_BLOCKS = 3
"""Validation cases of one process that are predicted twice more, with two grids of blocks, to measure the mismatch."""

TILES_PER_CASE = 8
"""Tiles of a case that are kept for disparity, at most: a 2d batch may be larger than there are cases."""

MEASURED_BATCHES = 5
"""Batches of one process on which disparity is measured, at most."""


class ValidationPredictor(HaloPredictor):
    """A halo predictor that measures disparity and tile mismatch on the first cases that it predicts.

    Disparity is measured on batches of the size that normalizes a training step, since it depends on it; their tiles come
    from as many cases as there are, patches around foreground that is predicted.
    """

    def __init__(self, trainer: NormTrainer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trainer = trainer
        # On this machine, whose memory they share: torchrun says how many, and nnU-Net's own are all on one.
        here = os.environ.get("LOCAL_WORLD_SIZE")
        self._processes = (int(here) if here else dist.get_world_size()) if trainer.is_ddp else 1
        self.plans: list[dict[str, Any]] = []
        self.differences: list[PairDifference] = []
        self.of_tiles: list[PairDifference] = []
        self.counts = DisparityCounts()
        self.num_cases = 0
        self._tiles: list[list[Tensor]] = []

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Predict one case and measure on it."""
        logits = super().predict_sliding_window_return_logits(input_image)
        plan = self.last_plan
        assert plan is not None
        if plan.as_dict() not in self.plans:
            self.plans.append(plan.as_dict())
            self.trainer.print_to_log_file(f"Halo predictor: {plan.describe()}")
        self.num_cases += 1
        if self.num_cases <= MEASURED_CASES:
            self._measure_mismatch(plan, input_image)
            self._tiles.append(self._tiles_of(input_image, logits))
        return logits

    def plan(self, image: Tensor) -> StagesPlan | TilesPlan:
        """See ``HaloPredictor.plan``; all cases of a validation use the same statistics.

        A network that cannot be run stage by stage takes those of tiles if it has none of its own. Where memory is short, the
        scratch goes to the folder of the training.
        """
        if isinstance(self.graph, str):
            if self.field.norms_of_tiles and self.population is None:
                self.trainer.print_to_log_file(
                    f"Halo predictor: statistics of tiles, since this network cannot be run stage by stage: {self.graph}"
                )
                self.population = "tile"
            return super().plan(image)
        if self._processes > 1:
            own, most = anonymous_memory(), default_max_memory()
            self.max_memory = None if most is None else max(own + (most - own) // self._processes, 1)
        try:
            plan = super().plan(image)
        except TilingError as error:
            return self._with_scratch_on_disk(image, str(error))
        if isinstance(plan, TilesPlan) and self.population != "tile":
            return self._with_scratch_on_disk(image, plan.reason)
        return plan

    def _with_scratch_on_disk(self, image: Tensor, reason: str) -> StagesPlan | TilesPlan:
        """The plan that takes the least memory, without a limit: nothing that a user could choose is left."""
        self.trainer.print_to_log_file(f"Halo predictor: scratch goes to the output folder, because {reason}")
        limit, self.max_memory, self.scratch = self.max_memory, sys.maxsize, Path(self.trainer.output_folder)
        try:
            return super().plan(image)
        finally:
            self.max_memory, self.scratch = limit, None

    def _measure_mismatch(self, plan: StagesPlan | TilesPlan, image: Tensor) -> None:
        """Of the prediction as it was made; and of tiles where the network would normalize with their statistics."""
        if isinstance(plan, TilesPlan):
            self.differences += self._compared(measure_tile_pairs(self, image, plan=plan))
            return
        if self.num_cases <= CASES_WITH_BLOCKS:
            self.differences += self._compared(measure_block_pairs(self, image, plan))
        if self.field.tile_statistics:
            self.of_tiles += self._compared(measure_tile_pairs(self, image))

    def _compared(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[PairDifference]:
        regions = self.trainer.label_manager.has_regions
        return [compare_pair(a, b, regions=regions, dtype=self.network_dtype) for a, b in pairs]

    def measure_batches(self) -> None:
        """Measure disparity on whole batches of the tiles collected; on a smaller one only if they fill none."""
        size = self.trainer.normalization_batch_size
        try:
            for batch in whole_batches(self._tiles, size, MEASURED_BATCHES):
                self._measure(batch.to(self.device))
        except torch.OutOfMemoryError:  # of all processes, in one
            self.trainer.print_to_log_file(f"Train/eval disparity not measured: {size} samples at once do not fit")
        self._tiles = []

    def _measure(self, data: Tensor) -> None:
        # Processes predict different numbers of cases, so none may wait for another; and a batch is a whole one here.
        self.counts += measure_disparity(
            self.bare_network,
            data,
            regions=self.trainer.label_manager.has_regions,
            autocast=self.trainer.autocast(),
            across_processes=False,
        )

    def _tiles_of(self, image: Tensor, logits: Tensor) -> list[Tensor]:
        """Patches of one case, as many as a batch could need."""
        foreground = foreground_of(logits, regions=self.trainer.label_manager.has_regions)
        count = min(self.trainer.normalization_batch_size, TILES_PER_CASE)
        return foreground_patches(image, foreground, count, self.configuration_manager.patch_size)


@contextmanager
def halo_validation(trainer: NormTrainer) -> Iterator[None]:
    """Inside, nnU-Net's validation of ``trainer`` predicts with a halo; on a regular exit the report is written.

    nnU-Net names its predictor and its export as globals of the trainer's module; both have their place back afterwards.
    """
    predictors: list[ValidationPredictor] = []
    module = import_module(nnUNetTrainer.__module__)

    def halo_predictor(**kwargs: Any) -> ValidationPredictor:
        predictors.append(trainer.validation_predictor(trainer, **kwargs))
        return predictors[-1]

    trainer.print_to_log_file(
        "Validation predicts with nnunet_norm's halo predictor: halo cut away, no Gaussian blending"
    )
    with (
        # Processes predict different numbers of cases, and the first alone computes nnU-Net's metrics.
        patient_barriers(trainer) as group,
        patch.object(module, "nnUNetPredictor", halo_predictor),
        patch.object(module, "export_prediction_from_logits", export_prediction_atomically),
    ):
        yield
        report = _gathered_report(trainer, predictors[0], group)
    if trainer.local_rank == 0:
        write_json(Path(trainer.output_folder) / "validation" / REPORT, report, indent=2)
        _log(trainer, report)


def _gathered_report(trainer: NormTrainer, predictor: ValidationPredictor, group: Any) -> dict[str, Any]:
    predictor.measure_batches()
    measured = (predictor.counts, predictor.differences, predictor.of_tiles, predictor.plans, predictor.num_cases)
    counts, differences, of_tiles, plans, cases = zip(*gathered(measured, group), strict=True)
    disparity = Disparity.of(sum(counts, DisparityCounts()))
    mismatch, tiles = (summarize(list(itertools.chain.from_iterable(parts))) for parts in (differences, of_tiles))
    unique: list[dict[str, Any]] = []
    for plan in itertools.chain.from_iterable(plans):
        if plan not in unique:
            unique.append(plan)
    return report_of(trainer, disparity, mismatch, tiles, unique, sum(cases))


def report_of(
    trainer: NormTrainer,
    disparity: Disparity,
    mismatch: TileMismatch,
    of_tiles: TileMismatch,
    plans: list[dict[str, Any]],
    num_cases: int,
) -> dict[str, Any]:
    """The report as it is written: None stands for what was not measured or is not there."""
    manager = trainer.label_manager
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    names = [str(label) for label in labels]
    report: dict[str, Any] = {
        "trainer": type(trainer).__name__,
        "plans": trainer.plans_manager.plans_name,
        "configuration": trainer.configuration_name,
        "fold": trainer.fold,
        "num_cases": num_cases,
        "predictor": {
            "name": "nnunet_norm HaloPredictor",
            "blending": None,
            "exact": bool(plans) and all(plan["exact"] for plan in plans),
            "plans": plans,
        },
        "train_eval_disparity": {
            "per_class": named(names, disparity.per_class),
            "mean": none_for_nan(disparity.mean),
            "num_batches": disparity.num_batches,
            "batch_size": disparity.num_samples / disparity.num_batches if disparity.num_batches else None,
        },
        "tile_mismatch": mismatch_as_dict(names, mismatch),
    }
    if trainer.settings.input_normalization is not None:
        report["input_normalization"] = trainer.settings.input_normalization
    if of_tiles.num_pairs:
        report["tile_mismatch_with_tile_statistics"] = mismatch_as_dict(names, of_tiles)
    if trainer.renorms:
        report["batch_renorm"] = {
            "batch_statistics_disparity": named(names, disparity.batch_statistics),
            "clipped_channels": none_for_nan(disparity.clipped),
            "abs_log_r": none_for_nan(disparity.abs_log_r),
            "abs_d": none_for_nan(disparity.abs_d),
        }
    elif disparity.batch_statistics:
        report["frozen_batch_norm"] = {
            "batch_statistics_disparity": named(names, disparity.batch_statistics),
        }
    return report


def _log(trainer: NormTrainer, report: dict[str, Any]) -> None:
    disparity, mismatch = report["train_eval_disparity"], report["tile_mismatch"]
    trainer.print_to_log_file(
        f"Train/eval disparity {_words(disparity['per_class'])} ({disparity['num_batches']} batches)"
    )
    trainer.print_to_log_file(
        f"Tile mismatch {_words(mismatch['per_class'])}, max dist: {mismatch['verdict']} ({mismatch['num_pairs']} pairs)"
    )
    tiles = report.get("tile_mismatch_with_tile_statistics")
    if tiles is not None:
        trainer.print_to_log_file(
            f"In tiles with statistics of their own it would be {_words(tiles['per_class'])}, max dist: {tiles['verdict']}"
        )
    in_tiles = any(plan["population"] == "tile" for plan in report["predictor"]["plans"])
    population = " --population tile" if in_tiles else ""
    trainer.print_to_log_file(
        "New images are predicted this way by: nnunet-norm predict "
        f"-d {trainer.plans_manager.dataset_name} -tr {report['trainer']} -p {report['plans']} "
        f"-c {report['configuration']} -f {report['fold']} -i INPUT_FOLDER -o OUTPUT_FOLDER{population}"
    )


def _words(per_class: dict[str, float | None]) -> str:
    return ", ".join(f"{name}: {'-' if v is None else format(v, '.4f')}" for name, v in per_class.items()) or "-"
