"""The images that a model is diagnosed on, with their labels where there are any."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from numpy.typing import NDArray
from torch import Tensor

from nnunet_norm.errors import InputImageError
from nnunet_norm.prediction import checks
from nnunet_norm.prediction.cases import CasePredictor

OUTSIDE = -1
"""Marks voxels of a reference that no score counts: those of the dataset's ignore label."""


@dataclass(frozen=True)
class Case:
    """One image on the disk.

    Attributes:
        name: as its files are called.
        files: one per channel.
        labels: the reference; None if there is none.
        previous: the previous stage's segmentation, for a cascade.
    """

    name: str
    files: tuple[str, ...]
    labels: str | None = None
    previous: str | None = None


@dataclass(frozen=True)
class Chosen:
    """Cases, and where they come from.

    Attributes:
        cases: in order.
        source: for the report.
    """

    cases: list[Case]
    source: str

    @property
    def have_labels(self) -> bool:
        """Whether every case has a reference."""
        return all(case.labels is not None for case in self.cases)


@dataclass(frozen=True)
class LoadedCase:
    """A case as the network sees it.

    Attributes:
        name: of the case.
        image: preprocessed, (C, x, y, z); a part in the middle if the case is too large.
        reference: labels (x, y, z) of the same voxels, ``OUTSIDE`` where they are to be ignored; None without labels.
        whole_shape: of the preprocessed image before it was cut (x, y, z).
    """

    name: str
    image: Tensor
    reference: Tensor | None
    whole_shape: tuple[int, ...]

    @property
    def is_cut(self) -> bool:
        """Whether the image is a part of the case."""
        return tuple(self.image.shape[1:]) != self.whole_shape


def cases_of_folder(
    predictor: CasePredictor, images: str, labels: str | None, count: int, previous_stage_folder: str | None = None
) -> Chosen:
    """The first cases of a folder in nnU-Net's naming.

    Args:
        predictor: the model.
        images: the folder.
        labels: folder with a segmentation of each case; None for none.
        count: how many at most.
        previous_stage_folder: for a cascade.

    Raises:
        InputImageError: no images, wrong channels, or labels that are missing.
    """
    ending = predictor.dataset_json["file_ending"]
    found = {checks.case_name(files, ending): files for files in checks.find_cases(images, ending)}
    chosen = dict(list(found.items())[:count])
    references = {name: os.path.join(labels, name + ending) for name in chosen} if labels is not None else {}
    missing = [os.path.basename(file) for file in references.values() if not os.path.isfile(file)]
    if missing:
        raise InputImageError(
            f"labels folder {labels!r} (-l) lacks {checks.listed(missing)}: give all, or leave -l out"
        )
    return _checked(predictor, chosen, references, f"the first of {images}", previous_stage_folder)


def cases_of_dataset(
    predictor: CasePredictor, fold: int | str, count: int, previous_stage_folder: str | None = None
) -> Chosen:
    """Validation cases of the model's own dataset, with their labels; its first cases for fold "all".

    Raises:
        InputImageError: the dataset is not there; then images have to be given.
    """
    name, dataset = predictor.plans_manager.dataset_name, predictor.dataset_json
    remedy = "give images with -i"
    if "nnUNet_raw" not in os.environ:
        raise InputImageError(f"no images: nnUNet_raw is not set, so those of {name} cannot be found: {remedy}")
    folder = Path(os.environ["nnUNet_raw"], name)
    if not (folder / "imagesTr").is_dir():
        raise InputImageError(f"no images: {str(folder / 'imagesTr')!r} does not exist: {remedy}")
    found = get_filenames_of_train_images_and_targets(str(folder), copy.deepcopy(dataset))  # it writes into that
    wanted = _validation_cases(name, fold)
    if wanted is None:
        names, source = (
            list(found),
            f"the first training cases of {name}, since no split tells which were not trained on",
        )
    else:
        names, source = [case for case in wanted if case in found], f"validation cases of fold {fold} of {name}"
    if not names:
        raise InputImageError(f"no images: {str(folder)!r} has no validation case of fold {fold}: {remedy}")
    chosen = {case: list(found[case]["images"]) for case in names[:count]}
    references = {case: str(found[case]["label"]) for case in chosen}
    return _checked(
        predictor,
        chosen,
        {case: file for case, file in references.items() if os.path.isfile(file)},
        source,
        previous_stage_folder,
    )


def load(predictor: CasePredictor, case: Case, max_voxels: int) -> LoadedCase:
    """Read and preprocess a case as nnU-Net does, its labels with it.

    Args:
        predictor: the model.
        case: what to load.
        max_voxels: a larger image is cut to its middle.

    Raises:
        InputImageError: an image that cannot be predicted, or labels that do not fit it.
    """
    reference = None
    alone = case.labels is None or case.previous is not None or predictor.input_normalization is not None
    if alone:  # nnU-Net's preprocessing knows neither the previous stage's channels nor quantiles
        data, _ = predictor.preprocessing(case.files, case.previous)
    if case.labels is not None:
        with_labels, reference = _with_labels(predictor, case, case.labels)
        data = data if alone else with_labels
    checks.require_finite(data, f"the preprocessed image of case {case.name!r}")
    extents = data.shape[1:]
    part = middle_of(extents, max_voxels, predictor.configuration_manager.patch_size)
    return LoadedCase(
        case.name,
        torch.from_numpy(np.ascontiguousarray(data[(slice(None), *part)], dtype=np.float32)),
        None if reference is None else torch.from_numpy(reference[part].astype(np.int16)),
        tuple(int(n) for n in extents),
    )


def middle_of(extents: Sequence[int], max_voxels: int, patch_size: Sequence[int]) -> tuple[slice, ...]:
    """The part in the middle of an image that has at most so many voxels.

    The axis that holds most patches is shortened first, at most to half at a time; slices of a 2d network count as patches.

    Args:
        extents: of the image (x, y, z).
        max_voxels: how many.
        patch_size: of the configuration.
    """
    patch = [1] * (len(extents) - len(patch_size)) + list(patch_size)
    shape = list(extents)
    while math.prod(shape) > max_voxels and max(shape) > 1:
        axis = max(range(len(shape)), key=lambda a: (shape[a] / patch[a], shape[a]))
        if shape[axis] == 1:
            axis = max(range(len(shape)), key=lambda a: shape[a])
        shape[axis] = max(shape[axis] * max_voxels // math.prod(shape), (shape[axis] + 1) // 2)
    return tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(extents, shape, strict=True))


def _validation_cases(dataset: str, fold: int | str) -> list[str] | None:
    """Names of the cases that the fold was not trained on; None if that is not known."""
    preprocessed = os.environ.get("nnUNet_preprocessed")
    splits = Path(preprocessed or os.curdir, dataset, "splits_final.json")
    if preprocessed is None or fold == "all" or not splits.is_file():
        return None
    folds = json.loads(splits.read_text(encoding="utf-8"))
    return list(folds[int(fold)]["val"]) if int(fold) < len(folds) else None


def _checked(
    predictor: CasePredictor,
    files: dict[str, list[str]],
    labels: dict[str, str],
    source: str,
    previous_stage_folder: str | None,
) -> Chosen:
    """The cases, after what can be seen of them without reading all."""
    ending, lists = predictor.dataset_json["file_ending"], list(files.values())
    checks.check_channels(lists, predictor.dataset_json, predictor.plans_manager.image_reader_writer_class())
    checks.check_previous_stage(
        previous_stage_folder, predictor.configuration_manager.previous_stage_name, lists, ending
    )
    previous = None if previous_stage_folder is None else Path(previous_stage_folder)
    cases = [
        Case(name, tuple(paths), labels.get(name), None if previous is None else str(previous / (name + ending)))
        for name, paths in files.items()
    ]
    return Chosen(cases, source)


def _with_labels(predictor: CasePredictor, case: Case, labels: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Image and labels of a case as nnU-Net's preprocessing for a training gives them."""
    plans, configuration, dataset = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    reader = plans.image_reader_writer_class()
    image, properties = checks.read_image(case.files, dataset["file_ending"], reader)
    checks.check_image(image, case.files, dataset)
    reference = checks.read_segmentation(labels, reader)
    if reference.shape[1:] != image.shape[1:]:
        raise InputImageError(
            f"labels {labels!r} of shape {reference.shape[1:]} do not fit the image of case {case.name!r} of "
            f"{image.shape[1:]}: give the segmentation of this image"
        )
    manager = predictor.label_manager
    ignored = [manager.ignore_label] if manager.has_ignore_label else []
    unknown = sorted(set(np.unique(reference).tolist()) - {0, *manager.all_labels, *ignored})
    if unknown:
        raise InputImageError(
            f"labels {labels!r} have the value {unknown[0]:g}, which dataset.json does not name: give labels of this dataset"
        )
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, segmentation, _ = preprocessor.run_case_npy(image, reference, properties, plans, configuration, dataset)
    found = np.maximum(segmentation[0], 0)  # -1 is what lies outside of the image's nonzero part: background
    if ignored:
        found = np.where(np.isin(found, ignored), OUTSIDE, found)
    return data, found
