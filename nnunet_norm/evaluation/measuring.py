"""One case: read, checked, and measured."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, region_or_label_to_mask
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from numpy.typing import NDArray

from nnunet_norm.errors import EvaluationError, InputImageError
from nnunet_norm.evaluation.options import Class, Classes, file_ending_of
from nnunet_norm.evaluation.pairs import Pair
from nnunet_norm.metrics import hausdorff_distance_95, normalized_surface_dice
from nnunet_norm.orphans import end_with_parent
from nnunet_norm.prediction.checks import read_labels
from nnunet_norm.scores import HD95, NSD

_SAME_SPACING = 1e-3
"""Relative difference of spacings that headers of other formats, or in single precision, explain."""


def reader_of(dataset_json: Mapping[str, Any], files: Sequence[str]) -> Any:
    """nnU-Net's reader for segmentations of a dataset, tried on the first files until one can be read.

    Raises:
        EvaluationError: nnU-Net has none for them.
    """
    ending = file_ending_of(dataset_json)
    for file in files:
        # Where a file cannot be read nnU-Net prints tracebacks; the file is named when its turn comes.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(RuntimeError):
            return determine_reader_writer_from_dataset_json(dict(dataset_json), file, verbose=False)()
    raise EvaluationError(
        f"none of nnU-Net's readers for {ending!r} (file_ending in dataset.json) opens {files[0]!r}"
        + (f" or any other of {len(files)}" if len(files) > 1 else "")
    )


@dataclass(frozen=True)
class Measuring:
    """What is measured of every case.

    Attributes:
        classes: of the dataset.
        tolerances: of every class, in mm.
        hd95: whether the 95 % Hausdorff distance is measured.
        reader: nnU-Net's, of the segmentations.
    """

    classes: Classes
    tolerances: Mapping[Class, float]
    hd95: bool
    reader: Any

    def __call__(self, pair: Pair) -> dict[Class, dict[str, Any]]:
        """nnU-Net's metrics of every class, and the surfaces'.

        Raises:
            EvaluationError: a file cannot be read, has labels that dataset.json has not, or does not fit the other one.
        """
        reference, prediction, spacing = self._read(pair)
        read = _Read({pair.reference: reference, pair.prediction: prediction})
        classes = list(self.classes.names)
        found = compute_metrics(pair.reference, pair.prediction, read, classes, self.classes.ignored)
        recursive_fix_for_json_export(found)
        ignored = None if self.classes.ignored is None else reference[0] == self.classes.ignored
        metrics: dict[Class, dict[str, Any]] = found["metrics"]
        for one, values in metrics.items():
            values |= self._surfaces(one, values, reference[0], prediction[0], spacing, ignored)
        return metrics

    def _surfaces(
        self,
        one: Class,
        counts: Mapping[str, Any],
        reference: NDArray[Any],
        prediction: NDArray[Any],
        spacing: Sequence[float],
        ignored: NDArray[np.bool_] | None,
    ) -> dict[str, float]:
        """The metrics of one class's surfaces."""
        found = {NSD: float("nan")} | ({HD95: float("nan")} if self.hd95 else {})
        if counts["n_ref"] + counts["n_pred"] == 0:
            return found
        masks = region_or_label_to_mask(reference, one), region_or_label_to_mask(prediction, one)
        found[NSD] = normalized_surface_dice(*masks, spacing, self.tolerances[one], ignored)
        if self.hd95:
            found[HD95] = hausdorff_distance_95(*masks, spacing, ignored)
        return found

    def _read(self, pair: Pair) -> tuple[NDArray[Any], NDArray[Any], list[float]]:
        """Both segmentations (1, x, y, z), and the spacing."""
        try:
            (reference, of_reference), (prediction, of_prediction) = (
                read_labels(file, self.reader) for file in (pair.reference, pair.prediction)
            )
        except InputImageError as error:
            raise EvaluationError(str(error)) from error
        if reference.shape != prediction.shape:
            raise EvaluationError(
                f"prediction {pair.prediction!r} has the shape {prediction.shape[1:]}, the reference "
                f"{reference.shape[1:]}: compare segmentations of the same image"
            )
        spacing, other = ([float(step) for step in found["spacing"]] for found in (of_reference, of_prediction))
        if not np.allclose(other, spacing, rtol=_SAME_SPACING, atol=0):
            raise EvaluationError(
                f"prediction {pair.prediction!r} has the spacing {other} mm, the reference {spacing} mm: resample one, "
                "or correct its header"
            )
        known = [0, *self.classes.known]
        ignored = [] if self.classes.ignored is None else [self.classes.ignored]
        _check_labels(f"reference {pair.reference!r}", reference, known + ignored)
        _check_labels(f"prediction {pair.prediction!r}", prediction, known)
        return reference, prediction, spacing


def _check_labels(what: str, segmentation: NDArray[Any], known: Sequence[int]) -> None:
    unknown: set[float] = set()
    for plane in segmentation[0]:  # one by one, so that masks stay small
        unknown |= set(plane[np.isin(plane, known, invert=True)].tolist())
    if unknown:
        values = ", ".join(f"{value:g}" for value in sorted(unknown)[:5])
        raise EvaluationError(
            f"{what} has values ({values}) that are no label of dataset.json: give the dataset.json that it belongs to"
        )


@dataclass(frozen=True)
class _Read:
    """A reader that hands out what was read, for nnU-Net's function that reads by itself."""

    files: Mapping[str, NDArray[Any]]

    def read_seg(self, file: str) -> tuple[NDArray[Any], dict[str, Any]]:
        """The segmentation of a file."""
        return self.files[file], {}


def measure_in_worker(measuring: Measuring, pair: Pair) -> dict[Class, dict[str, Any]] | EvaluationError:
    """In a process of its own, which has one thread and ends with the one that started it."""
    end_with_parent()
    torch.set_num_threads(1)
    return measure(measuring, pair)


def measure(measuring: Measuring, pair: Pair) -> dict[Class, dict[str, Any]] | EvaluationError:
    """The metrics of a case, or why there are none: other cases are measured all the same."""
    try:
        return measuring(pair)
    except EvaluationError as error:
        return error
