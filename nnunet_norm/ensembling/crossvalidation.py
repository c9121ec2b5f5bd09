"""Cross-validations of trained models: their cases over all folds, joined as nnU-Net joins them, and averaged in pairs."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from nnunetv2.evaluation import accumulate_cv_results as accumulation
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string

from nnunet_norm.ensembling.members import Member
from nnunet_norm.ensembling.merging import Merging, merge_folders, write_descriptions
from nnunet_norm.ensembling.models import Fold, Model, pair_folder
from nnunet_norm.ensembling.record import Record, state_of
from nnunet_norm.errors import EnsembleError
from nnunet_norm.prediction.checks import listed
from nnunet_norm.validations import FINAL, is_of_training


@dataclass(frozen=True)
class CrossValidation:
    """What a model predicted of the cases that its folds were not trained on.

    Attributes:
        model: with its folds.
        segmentations: the file of every case, over all folds.
        fold_of: the fold that each case belongs to.
    """

    model: Model
    segmentations: dict[str, Path]
    fold_of: dict[str, Fold]

    @property
    def joined(self) -> Path:
        """The folder in which nnU-Net joins the folds."""
        return self.model.folder / f"crossval_results_folds_{folds_tuple_to_string(list(self.model.folds))}"

    def check_probabilities(self) -> None:
        """Refuse a cross-validation without probabilities, or with those of an earlier training.

        Raises:
            EnsembleError: naming the command that makes them.
        """
        files = {
            case: [path.with_name(case + end) for end in (".npz", ".pkl")] for case, path in self.segmentations.items()
        }
        without = [case for case, paths in files.items() if not all(path.is_file() for path in paths)]
        self._refuse(without, "has no probabilities of", "")
        old = [
            case for case, path in self.segmentations.items() if not is_of_training(files[case][0], path.parent.parent)
        ]
        self._refuse(old, "has only probabilities of an earlier training of", f", whose .npz are older than {FINAL}")

    def _refuse(self, cases: Sequence[str], lacks: str, why: str) -> None:
        if cases:
            folds = list(dict.fromkeys(self.fold_of[case] for case in cases))
            also = f", and likewise for fold {', '.join(map(str, folds[1:]))}" if len(folds) > 1 else ""
            raise EnsembleError(
                f"model {self.model.name} {lacks} {len(cases)} validation cases ({listed(cases)}){why}: make them with "
                f"{validation_command(self.model, folds[0])}{also}"
            )

    def member(self) -> Member:
        """What is averaged."""
        files = {case: path.with_name(f"{case}.npz") for case, path in self.segmentations.items()}
        return Member(self.model.name, self.model.plans, self.model.dataset_json, files)


def validation_command(model: Model, fold: Fold) -> str:
    """The command that validates a trained fold again, and leaves probabilities."""
    trainer, plans, configuration = model.parts
    return f"nnunet-norm train {model.dataset} {configuration} {fold} -tr {trainer} -p {plans} --val --npz"


def crossvalidation_of(model: Model) -> CrossValidation:
    """Find what the folds of a model predicted.

    Raises:
        EnsembleError: a fold that is missing or not validated to the end, or a case that two folds have predicted.
    """
    if not (model.folder / "dataset.json").is_file():
        raise EnsembleError(f"model {model.name} is not in {model.folder.parent}: train it, or leave it out (-m)")
    if "all" in model.folds:
        raise EnsembleError(
            f"fold all of model {model.name} has seen every case: a cross-validation needs numbered folds (-f)"
        )
    ending = model.dataset_json["file_ending"]
    segmentations: dict[str, Path] = {}
    fold_of: dict[str, Fold] = {}
    for fold in model.folds:
        folder = model.folder / f"fold_{fold}" / "validation"
        if not (folder / "summary.json").is_file():
            done = (path.parts[-3] for path in sorted(model.folder.glob("fold_*/validation/summary.json")))
            there = ", ".join(name.removeprefix("fold_") for name in done)
            raise EnsembleError(
                f"fold {fold} of model {model.name} is not trained and validated (folds that are: {there or 'none'}): "
                "train it, or choose others (-f)"
            )
        for path in sorted(folder.glob(f"*{ending}")):
            case = path.name.removesuffix(ending)
            if case in segmentations:
                raise EnsembleError(
                    f"model {model.name}: folds {fold_of[case]} and {fold} have both predicted case {case!r}: choose "
                    "folds of one split (-f)"
                )
            segmentations[case], fold_of[case] = path, fold
    return CrossValidation(model, segmentations, fold_of)


def check_same_cases(found: Sequence[CrossValidation]) -> None:
    """Refuse to compare models on different cases.

    Raises:
        EnsembleError: a model that lacks cases of another.
    """
    everything = sorted({case for one in found for case in one.segmentations})
    for one in found:
        missing = [case for case in everything if case not in one.segmentations]
        if missing:
            raise EnsembleError(
                f"model {one.model.name} has not predicted {len(missing)} of {len(everything)} cases that others have "
                f"({listed(missing)}): models are compared on the same cases; train all with one split"
            )


def join_folds(one: CrossValidation, num_processes: int) -> None:
    """Join the segmentations of all folds in nnU-Net's folder for that, by nnU-Net's function but without its evaluation.

    A folder that holds these very segmentations stays, with the postprocessing that was determined on it, whoever made it.
    One that holds others is replaced, and so is its postprocessing.
    """
    sources = {case: [state_of(path)] for case, path in one.segmentations.items()}
    outputs = {case: [one.joined / path.name] for case, path in one.segmentations.items()}
    record = Record(one.joined, {"model": one.model.name, "folds": list(one.model.folds)})
    there = set(one.joined.glob(f"*{one.model.dataset_json['file_ending']}"))
    same = there == {path for paths in outputs.values() for path in paths}
    if same and all(record.is_done(case, sources[case], outputs[case]) for case in sources):
        return
    if same and all(filecmp.cmp(path, one.joined / path.name, shallow=False) for path in one.segmentations.values()):
        write_descriptions(one.member(), one.joined)
    else:
        beside = one.joined.with_name(f".{one.joined.name}.unfinished")
        with mock.patch.object(accumulation, "compute_metrics_on_folder"):
            accumulation.accumulate_cv_results(
                str(one.model.folder), str(beside), list(one.model.folds), num_processes, overwrite=True
            )
        if one.joined.is_dir():
            shutil.rmtree(one.joined)
        os.replace(beside, one.joined)
    record.keep_only(())
    record.note_all(sources, outputs)


def average_pair(first: CrossValidation, second: CrossValidation, merging: Merging) -> Path:
    """Average the cross-validations of two models in nnU-Net's folder for that; cases that are done are kept.

    Returns:
        The folder.

    Raises:
        EnsembleError, OutputError: see ``merge_folders``.
    """
    folder = pair_folder(first.model, second.model)
    members = [first.member(), second.member()]
    if folder.is_dir():
        for path in folder.glob(f"*{members[0].file_ending}"):
            if path.name.removesuffix(members[0].file_ending) not in members[0].files:
                os.remove(path)  # of another split: nnU-Net's evaluation would count it
    merge_folders(members, folder, merging)
    return folder
