"""Which trained model, or which pair of them, is best in cross-validation: nnU-Net's search, over any trainers and plans.

Every model and every pair is scored by the mean over classes of the mean over cases, of Dice and of the surface Dice (NSD).
Files lie where ``nnUNetv2_find_best_configuration`` puts them, hold the same labels, and give the same choice by Dice.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing
from tqdm import tqdm

from nnunet_norm.ensembling.crossvalidation import (
    CrossValidation,
    average_pair,
    check_same_cases,
    crossvalidation_of,
    join_folds,
)
from nnunet_norm.ensembling.merging import Merging
from nnunet_norm.ensembling.models import Model, check_one_dataset, check_pair_name
from nnunet_norm.ensembling.postprocessing import FILE, POSTPROCESSED, Postprocessing, load_postprocessing
from nnunet_norm.ensembling.record import Record, state_of
from nnunet_norm.errors import EnsembleError, SetupError
from nnunet_norm.evaluation import Options, evaluate_folder
from nnunet_norm.scores import METRICS

logger = logging.getLogger(__name__)

CACHE = ".evaluation"
"""In every folder of a cross-validation: what was measured of its files."""


@dataclass(frozen=True)
class Candidate:
    """A model or a pair, and how good it is.

    Attributes:
        models: one or two.
        folder: of its cross-validation.
        summary: of its evaluation.
    """

    models: tuple[Model, ...]
    folder: Path
    summary: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """For people."""
        return " + ".join(model.name for model in self.models)

    def score(self, metric: str) -> float:
        """Mean over the classes; NaN where it could not be measured."""
        value = self.summary["foreground_mean"][metric]
        return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        candidates: models first, then pairs, in the order of the models.
        metric: by which the best was chosen.
        postprocessing: nnU-Net's for the best, determined by Dice.
    """

    candidates: tuple[Candidate, ...]
    metric: str
    postprocessing: Postprocessing

    @property
    def best(self) -> Candidate:
        """By the metric."""
        return best_by(self.candidates, self.metric)


def best_by(candidates: Sequence[Candidate], metric: str) -> Candidate:
    """The first of those with the highest score, so a model before a pair, as nnU-Net chooses.

    Raises:
        EnsembleError: no candidate has a score.
    """
    scored = [one for one in candidates if not math.isnan(one.score(metric))]
    if not scored:
        raise EnsembleError(
            f"no candidate has a {metric}: a class is in no case; give folds whose cases have all classes (-f)"
        )
    return max(scored, key=lambda one: one.score(metric))


@dataclass(frozen=True)
class Search:
    """How it is searched.

    Attributes:
        metric: chooses.
        options: of the evaluation.
        num_candidates: pairs are made of that many best models only; None: of all.
        num_processes: cases at a time.
        scratch: folder for mapped files; None: beside the outputs.
        progress: show it.
    """

    metric: str = METRICS[0]
    options: Options = field(default_factory=Options)
    num_candidates: int | None = None
    num_processes: int = 1
    scratch: str | None = None
    progress: bool = True

    def run(self, models: Sequence[Model]) -> Found:
        """Score all, and determine the postprocessing of the best. What was done before is not done again.

        Args:
            models: of one dataset, with the same folds.

        Raises:
            EnsembleError: a fold or probabilities are missing, or models do not go together; before anything is computed.
            EvaluationError, OutputError: see ``evaluate_folder`` and ``merge_folders``.
            SetupError: one of nnU-Net's folders is not set.
        """
        for model in models:
            if model.folds != models[0].folds:
                raise EnsembleError(
                    f"models are compared on the same folds, and {model.name} is given with {_listed(model)}, "
                    f"{models[0].name} with {_listed(models[0])}: give them all with -f"
                )
        found = [crossvalidation_of(model) for model in models]
        check_one_dataset(models)
        check_same_cases(found)
        if self.num_candidates != 1:
            for pair in itertools.combinations(models, 2):
                check_pair_name(*pair)
        if self.num_candidates is None or self.num_candidates >= len(models):
            self._check_pairs(found)
        reference = reference_folder(models[0].dataset)
        singles = []
        for one in tqdm(found, desc="models", disable=not self.progress):
            join_folds(one, self.num_processes)
            singles.append(Candidate((one.model,), one.joined, self._evaluate(one, one.joined, reference)))
        chosen = self._chosen(found, singles)
        self._check_pairs(chosen)
        pairs = []
        for first, second in tqdm(list(itertools.combinations(chosen, 2)), desc="pairs", disable=not self.progress):
            folder = average_pair(first, second, self._merging())
            pairs.append(Candidate((first.model, second.model), folder, self._evaluate(first, folder, reference)))
        candidates = (*singles, *pairs)
        best = best_by(candidates, self.metric)
        return Found(candidates, self.metric, self._postprocessing(best, reference))

    def _merging(self) -> Merging:
        return Merging(num_processes=self.num_processes, scratch=self.scratch, progress=self.progress)

    def _check_pairs(self, found: Sequence[CrossValidation]) -> None:
        if len(found) > 1:
            for one in found:
                one.check_probabilities()

    def _evaluate(self, one: CrossValidation, folder: Path, reference: Path) -> dict[str, Any]:
        return evaluate_folder(
            reference,
            folder,
            dataset_json=one.model.dataset_json,
            options=self.options,
            cases=list(one.segmentations),
            num_processes=self.num_processes,
            output_file=folder / "summary.json",
            cache_file=folder / CACHE,
            progress=self.progress,
        )

    def _chosen(self, found: Sequence[CrossValidation], singles: Sequence[Candidate]) -> list[CrossValidation]:
        """Those of whom pairs are made, in their order."""
        scores = [one.score(self.metric) for one in singles]
        order = sorted(range(len(found)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i], reverse=True)
        return [found[i] for i in sorted(order[: self.num_candidates])]

    def _postprocessing(self, best: Candidate, reference: Path) -> Postprocessing:
        """By nnU-Net's function, unless it was determined for these very files before."""
        file, ending = best.folder / FILE, best.models[0].dataset_json["file_ending"]
        record = Record(best.folder / POSTPROCESSED, {"postprocessing": "determine_postprocessing"})
        sources = [state_of(path) for path in sorted(best.folder.glob(f"*{ending}"))]
        if not record.is_done(FILE, sources, [file]):
            logger.info(f"determining nnU-Net's postprocessing of the best: {best.name}")
            shutil.rmtree(best.folder / POSTPROCESSED, ignore_errors=True)
            determine_postprocessing(
                str(best.folder),
                str(reference),
                str(best.folder / "plans.json"),
                str(best.folder / "dataset.json"),
                max(self.num_processes, 1),
                keep_postprocessed_files=True,
            )
            record.note(FILE, sources, [file])
        return load_postprocessing(file)


def _listed(model: Model) -> str:
    return ", ".join(map(str, model.folds))


def reference_folder(dataset: str) -> Path:
    """The references of a dataset, where preprocessing left them.

    Raises:
        SetupError: one of nnU-Net's folders is not set.
    """
    for variable in ("nnUNet_results", "nnUNet_raw", "nnUNet_preprocessed"):
        if variable not in os.environ:
            raise SetupError(f"{variable} is not set: export it, as for nnUNetv2_find_best_configuration")
    return Path(os.environ["nnUNet_preprocessed"], dataset, "gt_segmentations")
