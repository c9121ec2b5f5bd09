"""Collect what there is of a sweep, evaluate what was validated, and compare it with the baseline."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from nnunet_norm.errors import EvaluationError, OutputError, SweepError
from nnunet_norm.evaluation import (
    SETTINGS,
    Classes,
    Comparison,
    Options,
    Pair,
    compare,
    evaluate_pairs,
    pairs_of_folders,
    summary_of,
)
from nnunet_norm.scores import DICE, HD95, NSD
from nnunet_norm.sweep.factors import factors_of
from nnunet_norm.sweep.finished import missing_of, read_summary
from nnunet_norm.sweep.grid import Grid
from nnunet_norm.sweep.outcomes import Collection, Outcome
from nnunet_norm.sweep.points import Run
from nnunet_norm.sweep.progress import read_epochs

VALIDATION = "validation"
"""nnU-Net's folder of a fold's predictions."""

REPORT = "norm_report.json"

REFERENCES = "gt_segmentations"
"""nnU-Net's copy of the labels, in the preprocessed dataset."""

CACHE = "evaluation.jsonl"
"""Cases that were measured, in the sweep's folder."""

logger = logging.getLogger(__name__)


def collect(grid: Grid, options: Options, *, num_processes: int = 1, progress: bool = True) -> Collection:
    """Read what there is of a sweep, and evaluate the validations that were not evaluated before.

    A validation that cannot be evaluated, because a file is missing or damaged, is logged and left out; the outcome says why.

    Args:
        grid: the sweep.
        options: of the evaluation.
        num_processes: see :func:`nnunet_norm.evaluation.evaluate_pairs`.
        progress: show it.

    Raises:
        EvaluationError: the options do not fit the dataset.
        SweepError: a file of the sweep cannot be read.
        OutputError: the evaluation cannot be kept.
        SetupError: a process of the evaluation was ended from outside.
    """
    dataset_json = _read(grid.preprocessed / "dataset.json")
    classes = Classes.of(dataset_json)
    classes.tolerances(options.tolerance)  # refuses, also before anything is done
    missing = {run.name: missing_of(grid.fold_folder(run)) for run in grid.runs}
    done = [run for run in grid.runs if missing[run.name] is None]
    summaries, faults = _evaluated(grid, done, dataset_json, options, num_processes, progress)
    outcomes = tuple(
        Outcome(
            run,
            missing[run.name],
            summaries.get(run.name),
            _report_of(grid.fold_folder(run)) if run.name in summaries else None,
            tuple(read_epochs(grid.fold_folder(run))),
            faults.get(run.name),
        )
        for run in grid.runs
    )
    return Collection(
        grid,
        factors_of(grid),
        outcomes,
        classes.names,
        (DICE, NSD, HD95) if options.hd95 else (DICE, NSD),
        next((summary[SETTINGS] for summary in summaries.values()), {}),
    )


def compare_with_baseline(found: Collection, level: float = 0.95) -> dict[str, dict[str, Comparison | None]]:
    """Every point and metric against the baseline, over the cases that both have, all folds that count together.

    Args:
        found: the sweep.
        level: of the intervals.

    Returns:
        Name of a point -> metric -> the comparison, or None where they have no case in common. Without the baseline.
    """
    base = {outcome.run.fold: outcome for outcome in found.counted(found.grid.baseline)}
    compared: dict[str, dict[str, Comparison | None]] = {}
    for point in found.grid.points:
        if point.name == found.grid.baseline.name:
            continue
        pairs = [(outcome, base[outcome.run.fold]) for outcome in found.counted(point)]
        both = [(one, other) for one, other in pairs if one.summary is not None and other.summary is not None]
        summaries = [_pooled([pair[place] for pair in both]) for place in (0, 1)]
        compared[point.name] = {metric: _compared(summaries, metric, level) for metric in found.metrics}
    return compared


def _compared(summaries: Sequence[Mapping[str, Any]], metric: str, level: float) -> Comparison | None:
    try:
        return compare(summaries[0], summaries[1], metric, level=level)
    except EvaluationError:  # no case has a value in both
        return None


def _pooled(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """The cases of several folds as one summary; a case that is in two folds stays two."""
    return {
        "metric_per_case": [
            {**entry, "prediction_file": f"fold_{outcome.run.fold}_{Path(entry['prediction_file']).name}"}
            for outcome in outcomes
            if outcome.summary is not None
            for entry in outcome.summary["metric_per_case"]
        ]
    }


def _evaluated(
    grid: Grid,
    done: Sequence[Run],
    dataset_json: Mapping[str, Any],
    options: Options,
    num_processes: int,
    progress: bool,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The summaries of trainings by their names, and of others why they have none."""
    faults: dict[str, str] = {}
    pairs: dict[str, list[Pair]] = {}
    for run in done:
        with _noted(run.name, faults):
            pairs[run.name] = _pairs(grid, run, dataset_json["file_ending"])
    if not pairs:
        return {}, faults
    try:
        grid.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{grid.folder} cannot be made ({error.strerror}): make it writable") from error
    evaluate = partial(evaluate_pairs, dataset_json=dataset_json, options=options, cache_file=grid.folder / CACHE)
    every = [pair for of_run in pairs.values() for pair in of_run]
    try:  # at one go, by processes that start once
        whole = evaluate(every, num_processes=num_processes, progress=progress)
    except EvaluationError:  # what can be measured is kept in the file now: look for the trainings that cannot
        found = {}
        for name, of_run in pairs.items():
            with _noted(name, faults):
                found[name] = evaluate(of_run, progress=False)
        return found, faults
    metrics = (entry["metrics"] for entry in whole["metric_per_case"])
    return {
        name: summary_of(of_run, list(islice(metrics, len(of_run)))) | {SETTINGS: whole[SETTINGS]}
        for name, of_run in pairs.items()
    }, faults


@contextmanager
def _noted(name: str, faults: dict[str, str]) -> Iterator[None]:
    """Inside, a validation that cannot be evaluated is no reason to stop."""
    try:
        yield
    except EvaluationError as error:
        logger.warning("%s cannot be evaluated: %s", name, error)
        faults[name] = str(error)


def _pairs(grid: Grid, run: Run, ending: str) -> list[Pair]:
    """The cases that nnU-Net validated."""
    summary = read_summary(grid.fold_folder(run))
    assert summary is not None  # the training is done
    cases = [Path(entry["prediction_file"]).name.removesuffix(ending) for entry in summary["metric_per_case"]]
    return pairs_of_folders(grid.preprocessed / REFERENCES, grid.fold_folder(run) / VALIDATION, ending, cases=cases)


def _report_of(fold: Path) -> dict[str, Any] | None:
    """What this package's trainers measured; None of others."""
    path = fold / VALIDATION / REPORT
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SweepError(
            f"{path} cannot be read ({error}): write it again, with nnU-Net or nnunet-norm train --val"
        ) from error
    return found
