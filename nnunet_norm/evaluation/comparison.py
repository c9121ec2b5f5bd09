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
from nnunet_norm.scores import SMALLER_IS_BETTER

RESAMPLES = 9999
"""Draws of the bootstrap (the number that SciPy takes)."""

_Values = dict[str, list[dict[str, float]]]

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
        partial: of the cases in both those that are compared without classes of which one has no value, see :func:`compare`.
        wins: cases in which the first is better: has the larger value or, of distances, the smaller one.
        losses: cases in which the second is.
    """

    mean: float
    low: float
    high: float
    level: float
    num_cases: int
    left_out: int
    partial: int
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
    return _means(_values(summary, metric))


def compare(first: Mapping[str, Any], second: Mapping[str, Any], metric: str, *, level: float = 0.95) -> Comparison:
    """Compare two summaries case by case, with a bootstrap interval (percentiles) of the mean difference over cases.

    The interval says how much the mean would vary with other cases of the same kind, for these two trained models; it knows
    nothing of how much training again would change. The draws are the same in every call.

    A class that only one segmentation has counts as 0 in Dice and NSD, but has no distance: who misses it would have the
    smaller mean. Of distances a case's means are therefore over the classes that have a value in both summaries.

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
    of_first, of_second = _values(first, metric), _values(second, metric)
    incomplete: set[str] = set()
    if metric in SMALLER_IS_BETTER:
        incomplete = _keep_common(of_first, of_second)
    a, b = _means(of_first), _means(of_second)
    common = sorted(a.keys() & b.keys())
    if not common:
        raise EvaluationError(
            f"no case has a {metric} in both summaries: compare models that were evaluated on the same cases"
        )
    differences = np.array([a[case] - b[case] for case in common])
    low, high = _interval(differences, level)
    better = -differences if metric in SMALLER_IS_BETTER else differences
    return Comparison(
        mean=float(differences.mean()),
        low=low,
        high=high,
        level=level,
        num_cases=len(common),
        left_out=len(of_first.keys() | of_second.keys()) - len(common),
        partial=len(incomplete.intersection(common)),
        wins=int((better > 0).sum()),
        losses=int((better < 0).sum()),
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


def _values(summary: Mapping[str, Any], metric: str) -> _Values:
    """Case -> its entries, one per validation -> class of the foreground -> value, without NaN."""
    found: _Values = {}
    for entry in summary["metric_per_case"]:
        metrics = entry["metrics"]
        try:
            values = {str(one): of_class[metric] for one, of_class in metrics.items() if str(one) != "0"}
        except KeyError as error:
            keys = ", ".join(next(iter(metrics.values())))
            raise EvaluationError(f"metric {metric!r} is not in the summary; choose from {keys}") from error
        present = {one: value for one, value in values.items() if not math.isnan(value)}
        found.setdefault(_case_of(entry), []).append(present)
    return found


def _keep_common(first: _Values, second: _Values) -> set[str]:
    """Leave the cases of both with the classes alone that both have; the cases that lost one are named."""
    incomplete = set()
    for case in first.keys() & second.keys():
        entries = [*first[case], *second[case]]
        common = set.intersection(*map(set, entries))
        if any(values.keys() != common for values in entries):
            incomplete.add(case)
        for found in (first, second):
            found[case] = [{one: value for one, value in values.items() if one in common} for values in found[case]]
    return incomplete


def _means(found: _Values) -> dict[str, float]:
    """Over the classes, then over the validations of a case; of the cases that have a value."""
    of_cases = {case: [float(np.mean(list(one.values()))) for one in several if one] for case, several in found.items()}
    return {case: float(np.mean(values)) for case, values in of_cases.items() if values}
