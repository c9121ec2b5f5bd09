"""Trained models that are to be averaged: where they lie, which folds of them, and that they are of one dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.file_path_utilities import get_ensemble_name

from nnunet_norm.ensembling.members import check_descriptions, read_description
from nnunet_norm.ensembling.postprocessing import FILE as POSTPROCESSING_FILE
from nnunet_norm.ensembling.postprocessing import Postprocessing, postprocessing_in, postprocessing_of_model
from nnunet_norm.errors import EnsembleError, ModelFolderError
from nnunet_norm.planning import resolve_configuration
from nnunet_norm.prediction.model_folder import check_model_folder

Fold = int | str


@dataclass(frozen=True)
class Model:
    """A trained model, ``<trainer>__<plans>__<configuration>``, and the folds of it that are used.

    Attributes:
        folder: nnU-Net's.
        folds: numbers, or "all".
    """

    folder: Path
    folds: tuple[Fold, ...]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def parts(self) -> tuple[str, str, str]:
        """Trainer, plans and configuration.

        Raises:
            ModelFolderError: the folder's name does not tell them.
        """
        found = self.name.split("__")
        if len(found) != 3:
            raise ModelFolderError(
                f"model {self.name!r} is not named <trainer>__<plans>__<configuration>: give it that name"
            )
        return found[0], found[1], found[2]

    @property
    def dataset(self) -> str:
        """The dataset that the plans name."""
        return str(self.plans.get("dataset_name"))

    @property
    def plans(self) -> dict[str, Any]:
        """nnU-Net's."""
        return read_description(self.folder / "plans.json")

    @property
    def dataset_json(self) -> dict[str, Any]:
        """With the labels."""
        return read_description(self.folder / "dataset.json")

    @property
    def previous_stage(self) -> str | None:
        """The configuration whose predictions it continues, if it is the second stage of a cascade.

        Raises:
            ModelFolderError, PlansError: its name does not tell its configuration, or its plans do not have that.
        """
        name: str | None = resolve_configuration(self.plans, self.parts[2]).get("previous_stage")
        return name

    def postprocessing(self) -> Postprocessing:
        """Its own, determined on the cross-validation of its folds; raises EnsembleError."""
        return postprocessing_of_model(self.folder, self.folds)


def check_one_dataset(models: Sequence[Model]) -> None:
    """Refuse models that were trained on different datasets, or to average the same one twice.

    Raises:
        EnsembleError: as said.
    """
    names = [model.name for model in models]
    seen: set[tuple[Path, tuple[Fold, ...]]] = set()
    for model in models:
        key = (model.folder.resolve(), model.folds)
        if key in seen:
            raise EnsembleError(f"model {model.name} is given twice: its average with itself is itself")
        seen.add(key)
    for model in models[1:]:
        if model.dataset != models[0].dataset:
            raise EnsembleError(
                f"models of different datasets: {model.name} is of {model.dataset}, {names[0]} of {models[0].dataset}: "
                "predict with each, and average the folders of predictions (-i), if their labels are the same"
            )
    check_descriptions(names, [model.plans for model in models], [model.dataset_json for model in models])


def check_models(models: Sequence[Model], checkpoint_name: str) -> None:
    """Refuse models that cannot be predicted with and averaged, before anything is predicted.

    Args:
        models: at least one.
        checkpoint_name: file name of the checkpoints.

    Raises:
        ModelFolderError: a model, a fold or a checkpoint is missing or not whole.
        EnsembleError: models of different datasets; or the second stage of a cascade.
    """
    for model in models:
        check_model_folder(str(model.folder), model.folds, checkpoint_name)
    check_one_dataset(models)
    for model in models:
        if model.previous_stage is not None:
            raise EnsembleError(
                f"model {model.name} continues the cascade's {model.previous_stage}: predict it with nnunet-norm "
                "predict -prev_stage_predictions and --save_probabilities, and average the folders (-i)"
            )


LONGEST_NAME = 255
"""Bytes that file systems allow the name of a folder."""


def check_pair_name(first: Model, second: Model) -> None:
    """Refuse a pair whose folder cannot have the name that nnU-Net gives it.

    Raises:
        EnsembleError: as said.
    """
    length = len(os.fsencode(pair_folder(first, second).name))
    if length > LONGEST_NAME:
        raise EnsembleError(
            f"the folder of the pair {first.name} and {second.name} would have a name of {length} bytes, and file systems "
            f"allow {LONGEST_NAME}: leave one of them out (-m), or compare models without pairs (--candidates 1)"
        )


def pair_folder(first: Model, second: Model) -> Path:
    """Where nnU-Net keeps the cross-validation of an ensemble."""
    name = get_ensemble_name(str(first.folder), str(second.folder), list(first.folds))
    return first.folder.parent / "ensembles" / name


def postprocessing_of_ensemble(models: Sequence[Model]) -> Postprocessing:
    """That of a pair of models, determined on the pair's cross-validation.

    Raises:
        EnsembleError: there is none for other than two models with the same folds; see also ``load_postprocessing``.
    """
    if len(models) != 2 or models[0].folds != models[1].folds:
        raise EnsembleError(
            f"postprocessing of {len(models)} models is known only for two with the same folds: name a file with -pp_pkl_file"
        )
    first, second = models
    folders = [pair_folder(*pair) for pair in ((first, second), (second, first))]
    return postprocessing_in(
        next((folder for folder in folders if (folder / POSTPROCESSING_FILE).is_file()), folders[0])
    )
