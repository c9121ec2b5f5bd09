"""Folders of predictions against their references, in the form of nnU-Net's summary.json."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, save_summary_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from tqdm import tqdm

from nnunet_norm import __version__
from nnunet_norm.errors import EvaluationError, OutputError
from nnunet_norm.evaluation.journal import CaseJournal, Metrics
from nnunet_norm.evaluation.measuring import Measuring, measure, measure_in_worker, reader_of
from nnunet_norm.evaluation.options import Classes, Options, file_ending_of
from nnunet_norm.evaluation.pairs import Pair, pairs_of_folders
from nnunet_norm.prediction.workers import Workers
from nnunet_norm.reading import read_object
from nnunet_norm.writing import written_beside

SETTINGS = "nnunet_norm"
"""The key of a summary that says how its surface metrics were measured."""

ABSENT = (
    "A class that neither segmentation of a case has is NaN, and left out of the means, as in nnU-Net. One that only one of "
    "them has: Dice 0, NSD 0, HD95 NaN."
)
"""What absent classes mean."""

_REFUSALS_AT_MOST = 5

logger = logging.getLogger(__name__)


def evaluate_folder(
    reference: str | os.PathLike[str],
    predictions: str | os.PathLike[str],
    *,
    dataset_json: Mapping[str, Any],
    options: Options | None = None,
    cases: Sequence[str] | None = None,
    num_processes: int = 1,
    output_file: str | os.PathLike[str] | None = None,
    cache_file: str | os.PathLike[str] | None = None,
    chill: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare every prediction of a folder with the reference of the same name.

    Args:
        reference: folder of the references.
        predictions: folder of the predictions.
        dataset_json: content of the dataset's dataset.json: labels or regions, ignore label, file ending.
        options: what is measured beside nnU-Net's counts.
        cases: names of those to compare; None: all.
        num_processes: as :func:`evaluate_pairs`.
        output_file: summary.json to write; finished cases are kept beside it until it is written.
        cache_file: where finished cases are kept for good, see :func:`evaluate_pairs`.
        chill: leave out references that have no prediction, as nnU-Net's ``--chill``.
        progress: show it.

    Returns:
        As :func:`evaluate_pairs`.

    Raises:
        EvaluationError: as :func:`evaluate_pairs`, and where cases are missing in either folder.
        OutputError: the summary cannot be written, or ``output_file`` is a file that is no summary.
    """
    target = None if output_file is None else Path(output_file)
    if target is not None and target.suffix != ".json":
        raise EvaluationError(f"output file {str(target)!r} must end in .json")
    if target is not None and target.exists():
        remedy = "it would be overwritten; choose another file with -o, or remove it"
        if "metric_per_case" not in read_object(target, OutputError, remedy):
            raise OutputError(f"output file {str(target)!r} is there and no summary: {remedy}")
    pairs = pairs_of_folders(reference, predictions, file_ending_of(dataset_json), cases=cases, chill=chill)
    beside = None if target is None else target.with_name(f".{target.name}.cases")
    summary = evaluate_pairs(
        pairs,
        dataset_json=dataset_json,
        options=options,
        num_processes=num_processes,
        cache_file=beside if cache_file is None else cache_file,
        progress=progress,
    )
    if target is not None and beside is not None:
        with written_beside(target) as unfinished:
            save_summary_json(summary, str(unfinished))
        beside.unlink(missing_ok=True)
    return summary


def evaluate_pairs(
    pairs: Sequence[Pair],
    *,
    dataset_json: Mapping[str, Any],
    options: Options | None = None,
    num_processes: int = 1,
    cache_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare predictions with references, wherever they lie.

    Dice, IoU and counts are those of nnU-Net's own function. The surface Dice (NSD) and the Hausdorff distance are in mm of
    the spacing that the files have; where a format has none (PNG), a voxel counts as 1 mm. Around voxels that have the ignore
    label in the reference no surface is counted.

    Args:
        pairs: the cases; the result has them in this order.
        dataset_json: content of the dataset's dataset.json.
        options: what is measured beside nnU-Net's counts.
        num_processes: cases that are measured at a time, each in a process of its own; with 1 in this one.
        cache_file: a file to which finished cases are added, and from which those are taken whose files and options are the
            same; any number of evaluations may share it.
        progress: show it.

    Returns:
        What nnU-Net's ``load_summary_json`` returns, with the keys ``NSD`` and, on request, ``HD95`` beside ``Dice``; and at
        the top level the key :data:`SETTINGS`: tolerances, unit, names of the classes, versions.

    Raises:
        EvaluationError: no pairs, a class without a tolerance to it, or cases that cannot be compared: all others are
            measured, and kept in ``cache_file``.
        OutputError: ``cache_file`` cannot be written.
        SetupError: a process was ended from outside.
    """
    if not pairs:
        raise EvaluationError("no case to compare: give at least one")
    options = Options() if options is None else options
    classes = Classes.of(dataset_json)
    tolerances = classes.tolerances(options.tolerance)
    reader = reader_of(dataset_json, [pair.reference for pair in pairs])
    settings = {
        "tolerance": {label_or_region_to_key(one): value for one, value in tolerances.items()},
        "unit": "mm",
        "classes": {label_or_region_to_key(one): name for one, name in classes.names.items()},
        "ignore_label": classes.ignored,
        "reader": type(reader).__name__,
        "versions": {"nnunet_norm": __version__} | {name: version(name) for name in ("nnunetv2", "monai")},
    }
    measuring = Measuring(classes, tolerances, options.hd95, reader)
    with CaseJournal(None if cache_file is None else Path(cache_file), settings | {"HD95": options.hd95}) as journal:
        found = _measured(measuring, pairs, journal, num_processes, progress)
    return summary_of(pairs, found) | {SETTINGS: settings | {"absent": ABSENT}}


def _measured(
    measuring: Measuring, pairs: Sequence[Pair], journal: CaseJournal, num_processes: int, progress: bool
) -> list[Metrics]:
    """The metrics of all pairs, taken from the journal where it has them."""
    states = {pair: journal.of(pair) for pair in pairs}
    found = {pair: metrics for pair in pairs if (metrics := journal.get(states[pair])) is not None}
    left = [pair for pair in pairs if pair not in found]
    if found and left:
        logger.info("%d of %d cases were measured before", len(found), len(pairs))
    refusals = []
    count = min(num_processes, len(left)) if num_processes > 1 else 0
    task = partial(measure_in_worker if count else measure, measuring)
    bar = tqdm(total=len(pairs), initial=len(found), desc="evaluation", disable=not (progress and left))
    with bar, Workers(count, "measuring", "-np", finishes=False) as workers:
        for pair, result in workers.each(task, left):
            if isinstance(result, EvaluationError):
                refusals.append(str(result))
            else:
                journal.add(states[pair], result)
                found[pair] = result
            bar.update()
    if refusals:
        more = len(refusals) - _REFUSALS_AT_MOST
        lines = "; ".join(sorted(refusals)[:_REFUSALS_AT_MOST]) + (f"; and {more} more" if more > 0 else "")
        raise EvaluationError(lines)
    return [found[pair] for pair in pairs]


def summary_of(pairs: Sequence[Pair], found: Sequence[Metrics]) -> dict[str, Any]:
    """The form of nnU-Net's summary, and its means: over the cases that have a class, then over the classes.

    Args:
        pairs: the cases; one at least.
        found: their metrics, class by class, as :func:`evaluate_pairs` gives them in ``metric_per_case``.
    """
    classes = list(found[0])
    names = list(found[0][classes[0]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # a class in no case: NaN
        means = {
            one: {name: np.nanmean([metrics[one][name] for metrics in found]) for name in names} for one in classes
        }
    over_classes = {name: np.mean([means[one][name] for one in classes]) for name in names}
    for part in (means, over_classes):
        recursive_fix_for_json_export(part)
    cases = [
        {"reference_file": pair.reference, "prediction_file": pair.prediction, "metrics": metrics}
        for pair, metrics in zip(pairs, found, strict=True)
    ]
    return {"metric_per_case": cases, "mean": means, "foreground_mean": over_classes}
