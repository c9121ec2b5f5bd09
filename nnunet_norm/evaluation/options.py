"""What is measured, and at which tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_norm.errors import EvaluationError
from nnunet_norm.scores import EVERY

Class = int | tuple[int, ...]
"""A label, or a region: the labels that it joins."""

DEFAULT_TOLERANCE = 1.0
"""mm, of the surface Dice."""


@dataclass(frozen=True)
class Options:
    """What is measured beside nnU-Net's counts.

    Attributes:
        tolerance: of the surface Dice, in mm: one for all, or per class by its name in dataset.json or its key in
            summary.json ("1", "(1, 2)"); ``"*"`` is for those that are not named, else they have :data:`DEFAULT_TOLERANCE`.
        hd95: measure the 95 % Hausdorff distance too.
    """

    tolerance: float | Mapping[str, float] = DEFAULT_TOLERANCE
    hd95: bool = False


@dataclass(frozen=True)
class Classes:
    """The foreground classes of a dataset, as nnU-Net evaluates them.

    Attributes:
        names: every label or region in nnU-Net's order, with its name in dataset.json.
        known: all labels that a segmentation may have.
        ignored: the label of voxels of which nothing is known, if there is one.
    """

    names: Mapping[Class, str]
    known: tuple[int, ...]
    ignored: int | None

    @classmethod
    def of(cls, dataset_json: Mapping[str, Any]) -> Classes:
        """The classes that a dataset.json describes.

        Raises:
            EvaluationError: it describes none, or nnU-Net does not take its labels.
        """
        try:
            manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
            found = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"labels of dataset.json: {error}; give the dataset.json of the predictions"
            ) from error
        classes = [tuple(map(int, one)) if isinstance(one, tuple) else int(one) for one in found]
        if not classes:
            raise EvaluationError("dataset.json has no label but the background: there is nothing to compare")
        names = {_class_of(value): name for name, value in dataset_json["labels"].items()}
        if not manager.has_regions:  # nnU-Net takes [3] for 3 then
            names = {one[0] if isinstance(one, tuple) else one: name for one, name in names.items()}
        ignored = manager.ignore_label
        return cls({one: names[one] for one in classes}, tuple(map(int, manager.all_labels)), ignored)

    def tolerances(self, tolerance: float | Mapping[str, float]) -> dict[Class, float]:
        """The tolerance of every class, in mm.

        Raises:
            EvaluationError: one is for a class that there is not, or no length.
        """
        asked = tolerance if isinstance(tolerance, Mapping) else {EVERY: tolerance}
        classes = {name: one for one, name in self.names.items()}
        classes |= {label_or_region_to_key(one): one for one in self.names}
        for key, value in asked.items():
            if key != EVERY and key not in classes:
                raise EvaluationError(
                    f"tolerance of {key!r}: there is no such class; choose from {', '.join(self.names.values())}"
                )
            if not math.isfinite(value) or value < 0:
                raise EvaluationError(f"tolerance {value:g} mm of {key!r}: it must be 0 or more")
        result: dict[Class, float] = dict.fromkeys(self.names, asked.get(EVERY, DEFAULT_TOLERANCE))
        return result | {classes[key]: float(value) for key, value in asked.items() if key != EVERY}


def file_ending_of(dataset_json: Mapping[str, Any]) -> str:
    """The ending of a dataset's files, with its dot.

    Raises:
        EvaluationError: dataset.json does not say.
    """
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not ending:
        raise EvaluationError("dataset.json has no file_ending: give the dataset.json of the predictions")
    return ending


def _class_of(value: Any) -> Class:
    """A value of dataset.json's labels as nnU-Net's evaluation has it."""
    return tuple(map(int, value)) if isinstance(value, list | tuple) else int(value)
