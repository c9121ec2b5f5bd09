"""Which prediction is compared with which reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nnunet_norm.errors import EvaluationError
from nnunet_norm.prediction.checks import listed


class Pair(NamedTuple):
    """Two segmentations of one case.

    Attributes:
        case: its name.
        reference: the file with the true labels.
        prediction: the file with those that were predicted.
    """

    case: str
    reference: str
    prediction: str


def pairs_of_folders(
    reference: str | os.PathLike[str],
    predictions: str | os.PathLike[str],
    file_ending: str,
    *,
    cases: Sequence[str] | None = None,
    chill: bool = False,
) -> list[Pair]:
    """Every case of two folders in which it is ``<case><file_ending>``, in nnU-Net's order.

    Args:
        reference: folder of the references.
        predictions: folder of the predictions.
        file_ending: as in dataset.json, with its dot.
        cases: names of those to compare; None: all.
        chill: leave out references that have no prediction, as nnU-Net's ``--chill``.

    Raises:
        EvaluationError: a folder is missing or has no segmentation, or a case is in one of them only.
    """
    there = _cases_in(reference, file_ending, "references"), _cases_in(predictions, file_ending, "predictions")
    wanted = there[1] if chill else there[0] | there[1]
    wanted = wanted if cases is None else set(cases)
    for folder, found, what in ((reference, there[0], "reference"), (predictions, there[1], "prediction")):
        missing = sorted(wanted - found)
        if missing:
            remedy = (
                "add them" if what == "reference" or cases is not None else "add them, or leave them out with --chill"
            )
            raise EvaluationError(f"no {what} in {str(folder)!r} of {listed(missing)}: {remedy}")
    if not wanted:
        raise EvaluationError(f"no case to compare in {str(predictions)!r}: name at least one")
    folders = str(reference), str(predictions)
    names = sorted(case + file_ending for case in wanted)  # by file name, as nnU-Net sorts
    return [Pair(name[: -len(file_ending)], *(os.path.join(folder, name) for folder in folders)) for name in names]


def _cases_in(folder: str | os.PathLike[str], file_ending: str, what: str) -> set[str]:
    if not Path(folder).is_dir():
        raise EvaluationError(
            f"folder of the {what} {str(folder)!r} does not exist: give the one with the segmentations"
        )
    names = [file.name for file in os.scandir(folder) if file.is_file() and not file.name.startswith(".")]
    found = {name[: -len(file_ending)] for name in names if name.endswith(file_ending)}
    if not found:
        raise EvaluationError(
            f"folder of the {what} {str(folder)!r} has no segmentation ending in {file_ending!r}, as dataset.json has it"
        )
    return found
