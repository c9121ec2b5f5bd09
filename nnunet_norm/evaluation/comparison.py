"""Two summaries of the same cases: is one better, and how sure is that?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from nnunet_norm.errors import EvaluationError

RESAMPLES = 9999
"""Draws of the bootstrap (the number that SciPy takes)."""

_SEED = 0
_NUMBERS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Comparison:
    """First minus second, over the cases that both have.

    Attributes:
        mean: of the differences.
        low: lower end of the interval of the mean; NaN for one case.
        high: upper end.
        level: of the interval, 0.95 for 95 %.
        num_cases: cases in both.
        left_out: cases that are in one summary alone, or have no value in one of them.
        wins: cases in which the first has the larger value.
        losses: cases in which the second has.
    """

    mean: float
    low: float
    high: float
    level: float
    num_cases: int
    left_out: int
    wins: int
    losses: int


def per_case(summary: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The mean of a metric over the foreground classes, of every case in which it is a number.

    A case that is there several times, validated in several folds, has the mean of them.

    Args:
        summary: as :func:`nnunet_norm.evaluation.evaluate_pairs` returns it, or a summary.json as it is on the disk.
        metric: ``"Dice"``, ``"NSD"``, ``"HD95"`` or another key.

    Raises:
        EvaluationError: the summary does not have the metric.
    """
    means: dict[str, list[float]] = {}
    for entry in summary["metric_per_case"]:
        value = _mean(entry["metrics"], metric)
        if not math.isnan(value):
            means.setdefault(_case_of(entry), []).append(value)
    return {case: float(np.mean(values)) for case, values in means.items()}


def compare(first: Mapping[str, Any], second: Mapping[str, Any], metric: str, *, level: float = 0.95) -> Comparison:
    """Compare two summaries case by case, with a bootstrap interval (percentiles) of the mean difference over cases.

    The interval says how much the mean would vary with other cases of the same kind, for these two trained models; it knows
    nothing of how much training again would change. The draws are the same in every call.

    Args:
        first: a summary, as for :func:`per_case`.
        second: what it is compared with.
        metric: see :func:`per_case`.
        level: of the interval.

    Raises:
        EvaluationError: no case has a value in both.

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    a, b = per_case(first, metric), per_case(second, metric)
    common = sorted(a.keys() & b.keys())
    if not common:
        raise EvaluationError(
            f"no case has a {metric} in both summaries: compare models that were evaluated on the same cases"
        )
    differences = np.array([a[case] - b[case] for case in common])
    low, high = _interval(differences, level)
    everywhere = {_case_of(entry) for summary in (first, second) for entry in summary["metric_per_case"]}
    return Comparison(
        mean=float(differences.mean()),
        low=low,
        high=high,
        level=level,
        num_cases=len(common),
        left_out=len(everywhere) - len(common),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
    )


def _interval(differences: np.ndarray[Any, Any], level: float) -> tuple[float, float]:
    if len(differences) == 1:
        return math.nan, math.nan
    if np.ptp(differences) == 0:  # every draw has this mean
        return float(differences[0]), float(differences[0])
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // len(differences)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _case_of(entry: Mapping[str, Any]) -> str:
    """The name of a case; of ``.nii.gz`` both parts are no part of it."""
    name = PurePath(entry["prediction_file"]).name.removesuffix(".gz")
    return PurePath(name).stem


def _mean(metrics: Mapping[Any, Mapping[str, float]], metric: str) -> float:
    """Over the foreground classes, without NaN."""
    try:
        values = [values[metric] for one, values in metrics.items() if str(one) != "0"]
    except KeyError as error:
        keys = next(iter(metrics.values()))
        raise EvaluationError(f"metric {metric!r} is not in the summary; choose from {', '.join(keys)}") from error
    present = [value for value in values if not math.isnan(value)]
    return float(np.mean(present)) if present else math.nan
