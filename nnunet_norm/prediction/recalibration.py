"""Trained models with the statistics of other images: a new model folder per population, the old one stays."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_norm.architectures import is_unetr
from nnunet_norm.errors import ExperimentalBatchesError, OutputError, StatisticsError
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.planning.naming import check_plans_name
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.checks import find_cases, listed
from nnunet_norm.prediction.model_writing import NOTE, Fold, complete_folds, configuration_of, write_model
from nnunet_norm.prediction.population_estimate import Estimate
from nnunet_norm.prediction.populations import Population, each_case
from nnunet_norm.prediction.predictor import HaloPredictor
from nnunet_norm.prediction.stock_model import TOLERANCE, TRAINER, difference_on_noise, planned_norm

UNETR_TRAINER = "nnUNetTrainerNorm_UNETR"
"""Builds a UNETR with the norm that the plans name."""

NORM_TRAINER = "nnUNetTrainerNorm"
"""Builds the network of the plans, with the input normalization that their block says."""

OUTDATED = "measured with the statistics before nnunet-norm recalibrate estimated others"


@dataclass(frozen=True)
class Target:
    """A model folder that is to be written.

    Attributes:
        population: whose statistics the model gets.
        folder: does not exist, or is a model that was written so before.
        plans_name: of the new model.
        is_there: whether it was written before.
    """

    population: Population
    folder: Path
    plans_name: str
    is_there: bool


class Recalibration:
    """A trained model, loaded, whose statistics are estimated on other images.

    A model whose norms have stored statistics keeps its trainer. One with InstanceNorm becomes a model of nnU-Net's own
    ``nnUNetTrainer`` with BatchNorm in its plans, or a UNETR one of ``nnUNetTrainerNorm_UNETR``; affine parameters are kept.
    Where the plans' block normalizes the input it becomes one of ``nnUNetTrainerNorm``, which reads that block.

    Args:
        source: the model's folder.
        folds: which folds; None: all that are there.
        checkpoint_name: the checkpoint's file name in every fold.
        batches: which case belongs to which experimental batch, or the file that tells; None: the folder is one population.
        controls: estimate on the controls of each experimental batch alone.
        per_image: every image is a population of its own.
        device: where the network computes.
        scratch: folder for preprocessed images and for the maps of stages; None: a temporary one, and memory.
        max_memory: bytes that the process may come to; None: most of what is available.
        progress: show progress bars.
        trust_checkpoint: the model may run code of its own when it is read.

    Raises:
        ModelFolderError, SetupError: the model cannot be loaded.
        StatisticsError: its norms cannot have stored statistics.
        ExperimentalBatchesError: the file of experimental batches cannot be read, or ``per_image`` is wanted, too.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, sections 3.2 and 5; Lin and Lu 2022, doi 10.1101/2022.10.14.512286.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        folds: Sequence[Fold] | None = None,
        checkpoint_name: str = "checkpoint_final.pth",
        batches: ExperimentalBatches | str | os.PathLike[str] | None = None,
        controls: bool = False,
        per_image: bool = False,
        device: torch.device,
        scratch: str | Path | None = None,
        max_memory: int | None = None,
        progress: bool = True,
        trust_checkpoint: bool = False,
    ) -> None:
        if per_image and batches is not None:
            raise ExperimentalBatchesError("--per-image and --batches are two populations: leave one of the two out")
        self.source = Path(os.path.abspath(source))
        self.per_image = per_image
        self.checkpoint_name = checkpoint_name
        self.predictor = HaloPredictor(
            device=device,
            perform_everything_on_device=device.type == "cuda",
            allow_tqdm=progress,
            population="batch",
            batches=batches,
            controls=controls,
            scratch=scratch,
            max_memory=max_memory,
            trust_checkpoint=trust_checkpoint,
        )
        self.folds = complete_folds(source, checkpoint_name) if folds is None else list(folds)
        self.predictor.initialize_from_trained_model_folder(str(source), self.folds, checkpoint_name)
        self.configuration = configuration_of(source, self.folds[0], checkpoint_name, trust_checkpoint=trust_checkpoint)

    @property
    def trainer_name(self) -> str:
        """Of the new model."""
        if not self.predictor.gained_statistics:
            return str(self.predictor.trainer_name)
        if is_unetr(self.predictor.bare_network):
            return UNETR_TRAINER
        return TRAINER if self.predictor.input_normalization is None else NORM_TRAINER

    def targets(
        self,
        images: str | Path,
        *,
        output: str | Path | None = None,
        plans_name: str | None = None,
        previous_stage_folder: str | None = None,
        continued: bool = False,
    ) -> list[Target]:
        """The model folders that are to be written, one per population, after a look at everything that can be seen now.

        Args:
            images: folder with the images, named as for prediction.
            output: the model folder, or with several populations the folder of the model folders; None: beside the source.
            plans_name: of the new models, with several populations its beginning; None: the old one and ``_recalibrated``.
            previous_stage_folder: where the segmentations of a cascade's previous stage are.
            continued: whether models that were written before are left as they are.

        Raises:
            InputImageError: no images, or not with the model's channels.
            ExperimentalBatchesError: cases without an experimental batch, or one without controls where they are wanted.
            PlansError: a name that plans cannot have.
            OutputError: a folder is there already, and not to be kept; or two would have the same name.
        """
        cases = find_cases(str(images), self.predictor.dataset_json["file_ending"])
        self.predictor._check(cases, previous_stage_folder)
        populations = self.predictor.populations_of(cases)
        if self.per_image:
            populations = each_case(populations[0].cases)
        beginning = plans_name or f"{self.predictor.plans_manager.plans_name}_recalibrated"
        names = [_plans_name(beginning, population) for population in populations]
        twice = [str(population) for population, name in zip(populations, names, strict=True) if names.count(name) > 1]
        if twice:
            raise OutputError(f"{listed(twice)} would be written to the same folder: give them names that differ")
        found = []
        for population, name in zip(populations, names, strict=True):
            if output is None or population.name is not None:
                parent = self.source.parent if output is None else Path(output)
                folder = parent / f"{self.trainer_name}__{name}__{self.configuration}"
            else:
                folder = Path(output)
            there = os.path.lexists(folder)
            if there and not (continued and self._is_of(folder, population)):
                other = "and of another model, other images or other folds" if continued else "and is not overwritten"
                advice = "" if continued else ", or --continue to keep what was written before"
                raise OutputError(f"{folder} is there already, {other}: choose another --plans-name or -o{advice}")
            found.append(Target(population, folder, name, there))
        return found

    def write(self, target: Target, *, previous_stage_folder: str | None = None, num_processes: int = 0) -> Estimate:
        """Estimate the statistics of a population for every fold, and write the model that has them.

        Args:
            target: from ``targets``; not there yet.
            previous_stage_folder: see ``targets``.
            num_processes: for preprocessing; 0 for none.

        Raises:
            StatisticsError, InputImageError, TilingError: the population cannot be used; nothing is written.
            ModelFolderError: plans cannot say what the network is.
            OutputError: the folder cannot be written.
        """
        estimate = self.predictor.estimate_on(target.population, previous_stage_folder, num_processes)
        by_fold = dict(zip(self.folds, estimate.statistics, strict=True))
        tracked = {key for key in self.predictor.bare_network.state_dict() if key.endswith(".num_batches_tracked")}
        counted = {key: torch.tensor(0, dtype=torch.long) for key in tracked}
        write_model(
            self.source,
            target.folder,
            folds=self.folds,
            checkpoint_name=self.checkpoint_name,
            weights=lambda fold, state: {**counted, **state, **by_fold[fold]},
            norm=planned_norm(self.predictor, self.source) if self.predictor.gained_statistics else None,
            trainer_name=self.trainer_name,
            plans_name=target.plans_name,
            note=self._origin(target.population)
            | {"statistics": estimate.way, "num_images": estimate.num_images, "num_voxels": estimate.num_voxels},
            outdated=OUTDATED,
            check=lambda written: self._require_same(written, estimate),
            trust_checkpoint=self.predictor.trust_checkpoint,
        )
        return estimate

    def _origin(self, population: Population) -> dict[str, Any]:
        """What the note says, and what is the same when a model is written again."""
        return {
            "written_by": "nnunet-norm recalibrate",
            "version": version("nnunet_norm"),
            "of": {
                "model": self.source.name,
                "trainer": self.predictor.trainer_name,
                "plans": self.predictor.plans_manager.plans_name,
                "checkpoint": self.checkpoint_name,
                "folds": list(self.folds),
            },
            "population": str(population),
            "images": sorted(population.images),
        }

    def _is_of(self, folder: Path, population: Population) -> bool:
        """Whether a folder was written from this model, and this population's images; models are whole or not there."""
        note = load_json(str(folder / NOTE)) if (folder / NOTE).is_file() else {}
        return bool(note.items() >= self._origin(population).items())

    def _require_same(self, written: CasePredictor, estimate: Estimate) -> None:
        """Refuse a model whose network is not the one whose statistics were estimated, although its weights fit."""
        network = self.predictor.estimator.network.cpu().eval()
        network.load_state_dict({**self.predictor.estimator.weights[0], **estimate.statistics[0]})
        difference = difference_on_noise(network, written.bare_network.eval(), self.predictor)
        if not difference <= TOLERANCE:
            raise StatisticsError(
                f"the model in {str(self.source)!r} gives another result with {self.trainer_name} and the plans (relative "
                f"difference {difference:.2g}): use nnunet-norm predict --population batch"
            )


def _plans_name(beginning: str, population: Population) -> str:
    """The plans of a population's model; its name as far as a file may be called so."""
    name = beginning
    if population.name is not None:
        name += "_" + re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9.+-]+", "_", population.name)).strip("_.")
    check_plans_name(name)
    return name
