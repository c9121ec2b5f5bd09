"""What is averaged: folders of probabilities, and the cross-validations of models; and that they go together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_norm.ensembling.pickles import load_restricted
from nnunet_norm.ensembling.postprocessing import Postprocessing
from nnunet_norm.ensembling.probabilities import read_header
from nnunet_norm.errors import EnsembleError
from nnunet_norm.prediction.checks import channel_names, listed
from nnunet_norm.reading import read_object

SAME_IN_PLANS = {"image_reader_writer": "reads images with", "label_manager": "makes labels with"}
"""What has to be the same in the plans of all members, for arrays to have the same axes and classes."""


@dataclass(frozen=True)
class Member:
    """One of the models that are averaged, by what it predicted.

    Attributes:
        name: for people.
        plans: nnU-Net's, as they are in the file.
        dataset_json: with the labels.
        files: the ``.npz`` of every case.
        postprocessing: applied before it is averaged; None for none.
    """

    name: str
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    files: Mapping[str, Path]
    postprocessing: Postprocessing | None = None

    @property
    def file_ending(self) -> str:
        """Of its segmentations, with the dot."""
        return str(self.dataset_json["file_ending"])

    @cached_property
    def plans_manager(self) -> PlansManager:
        """nnU-Net's."""
        return PlansManager(self.plans)

    @cached_property
    def label_manager(self) -> LabelManager:
        """nnU-Net's, which knows how probabilities become labels."""
        return self.plans_manager.get_label_manager(self.dataset_json)

    def segmentation(self, case: str) -> Path:
        """The member's own segmentation of a case."""
        return self.files[case].with_name(case + self.file_ending)

    def sources(self, case: str) -> list[Path]:
        """All files of a case that are read, whether they are there or not."""
        probabilities = self.files[case]
        segmentation = [] if self.postprocessing is None else [self.segmentation(case)]
        return [probabilities, probabilities.with_suffix(".pkl"), *segmentation]


def member_of_folder(folder: str | Path, postprocessing: Postprocessing | None = None) -> Member:
    """A folder that nnunet-norm predict or nnUNetv2_predict wrote with ``--save_probabilities``.

    Raises:
        EnsembleError: the folder, its dataset.json, its plans.json or all probabilities are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EnsembleError(f"-i {folder} is no folder: give folders of predictions with probabilities")
    files = {path.stem: path for path in sorted(folder.glob("*.npz"))}
    if not files:
        raise EnsembleError(f"-i {folder} has no probabilities (.npz): predict with --save_probabilities")
    plans, dataset_json = (read_description(folder / name) for name in ("plans.json", "dataset.json"))
    return Member(str(folder), plans, dataset_json, files, postprocessing)


def read_description(path: Path) -> dict[str, Any]:
    """A plans.json or dataset.json.

    Raises:
        EnsembleError: it is missing, or no JSON object.
    """
    return read_object(path, EnsembleError, "nnU-Net leaves it beside its predictions and in its models; copy it again")


def check_descriptions(
    names: Sequence[str], plans: Sequence[Mapping[str, Any]], datasets: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse to average what was trained with other labels, channels or files, or whose arrays have other axes.

    Args:
        names: of what is averaged, for the message.
        plans: of each.
        datasets: dataset.json of each.

    Raises:
        EnsembleError: the first difference.
    """
    first = _dataset_description(datasets[0])
    for name, plan, dataset in zip(names[1:], plans[1:], datasets[1:], strict=True):
        for what, value in _dataset_description(dataset).items():
            if value != first[what]:
                raise EnsembleError(
                    f"{name} and {names[0]} are of different datasets: {what} {_short(value)} and {_short(first[what])}: "
                    "give models of one dataset"
                )
        for key, verb in SAME_IN_PLANS.items():
            if plan.get(key) != plans[0].get(key):
                raise EnsembleError(
                    f"{name} {verb} {plan.get(key)} and {names[0]} with {plans[0].get(key)} ({key} of their plans): such "
                    "arrays cannot be averaged"
                )


def _dataset_description(dataset: Mapping[str, Any]) -> dict[str, Any]:
    try:
        labels, order = dict(dataset["labels"]), dataset.get("regions_class_order")
        return {
            # Regions are channels in the order of the labels; labels are channels in the order of their numbers.
            "labels": labels if order is None else list(labels.items()),
            "regions_class_order": order,
            "channels": channel_names(dict(dataset)),
            "file ending": dataset["file_ending"],
        }
    except KeyError as error:
        raise EnsembleError(f"dataset.json lacks {error}: copy that of the dataset again") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def check_members(members: Sequence[Member]) -> list[str]:
    """The cases that are averaged, in order.

    Raises:
        EnsembleError: descriptions that differ, or a case that a member lacks.
    """
    check_descriptions(
        [member.name for member in members],
        [member.plans for member in members],
        [member.dataset_json for member in members],
    )
    cases = sorted({case for member in members for case in member.files})
    for member in members:
        missing = [case for case in cases if case not in member.files]
        if missing:
            raise EnsembleError(
                f"{member.name} lacks probabilities of {len(missing)} of {len(cases)} cases ({listed(missing)}): "
                "predict them, or leave the member out"
            )
    return cases


def check_case(members: Sequence[Member], case: str) -> None:
    """Refuse a case whose arrays do not lie in the same place, before any is read.

    Raises:
        EnsembleError: another number of classes than the labels, other shapes or geometries, files missing or damaged.
    """
    heads = members[0].label_manager.num_segmentation_heads
    first, properties = members[0].files[case], properties_of(members[0].files[case])
    shape = read_header(first).shape
    for member in members:
        path = member.files[case]
        found = read_header(path).shape
        if found[0] != heads:
            raise EnsembleError(
                f"{path} has {found[0]} classes, and the labels of {member.name} are {heads}: predict the case again"
            )
        if found != shape:
            raise EnsembleError(
                f"case {case!r}: {path} has shape {_extent(found)} and {first} {_extent(shape)}: they are of different images"
            )
        different = None if path == first else _first_difference(properties, properties_of(path))
        if different:
            raise EnsembleError(
                f"case {case!r}: {path} and {first} differ in {different}: they are of different images"
            )
        if member.postprocessing is not None and not member.segmentation(case).is_file():
            raise EnsembleError(f"{member.name} lacks {member.segmentation(case).name}, which is to be postprocessed")


def properties_of(path: Path) -> dict[str, Any]:
    """nnU-Net's properties of the image that an ``.npz`` was predicted from.

    Raises:
        EnsembleError: see ``load_restricted``; or they have no spacing.
    """
    found = load_restricted(path.with_suffix(".pkl"))
    if not isinstance(found, dict) or "spacing" not in found:
        raise EnsembleError(f"{path.with_suffix('.pkl')} has no properties of an image: predict the case again")
    return found


def _geometry(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that place the image, by name: the spacing, and what the reader keeps for itself (origin, direction)."""
    found = {"spacing": properties["spacing"]}
    for key, kept in properties.items():
        if key.endswith("_stuff") and isinstance(kept, dict):
            found |= kept
    return found


def _first_difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    mine, theirs = _geometry(first), _geometry(other)
    for key in sorted(mine.keys() | theirs.keys()):
        if key not in mine or key not in theirs:
            return key
        values = mine[key], theirs[key]
        if any(isinstance(value, str) for value in values):
            if values[0] != values[1]:
                return f"{key} ({values[1]} and {values[0]})"
            continue
        a, b = (np.asarray(value, dtype=np.float64) for value in values)
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-5, atol=1e-5):
            return f"{key} ({b.ravel().tolist()} and {a.ravel().tolist()})"
    return None


def _extent(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape[1:]))
