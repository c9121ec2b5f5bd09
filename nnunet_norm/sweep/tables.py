"""The tables of a sweep's report, in words: all points, factor by factor, model by fold, class by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_norm.evaluation import Comparison
from nnunet_norm.scores import DICE, HD95, SMALLER_IS_BETTER
from nnunet_norm.sweep.factors import spoken
from nnunet_norm.sweep.outcomes import Collection, Outcome, Spread, Tiles
from nnunet_norm.sweep.points import Point

NONE = "-"
"""In cells without a value."""

UNITS = {HD95: " in mm"}
DIGITS = {HD95: 2}
"""Decimals of a metric, where they are not four."""

SPREAD = "Mean ± standard deviation over folds (n - 1; none for one fold)"
"""What captions say of it."""

DISPARITY, MISMATCH = "disparity", "tile mismatch"
BESIDE = (DISPARITY, MISMATCH)
"""Of what trainers measured, what stands beside the scores."""

ALONE = ", alone"
"""Of columns: tiles with statistics of their own."""

Comparisons = Mapping[str, Mapping[str, Comparison | None]]
"""Name of a point -> metric -> against the baseline; None where they have no case in common, or it is the baseline."""


@dataclass(frozen=True)
class Table:
    """A table in words.

    Attributes:
        title: a heading.
        caption: stands alone.
        header: of the columns.
        rows: as long as the header.
        words: whether cells are no numbers.
    """

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False


def points_table(found: Collection, comparisons: Comparisons) -> Table:
    """Every point: scores, the comparison with the baseline, disparity and tile mismatch."""
    columns = [(name, words) for name, words in _measured(found) if name in BESIDE]
    factors = [spoken(factor) for factor in found.factors.levels] or ["model"]
    header = (*factors, "folds", *_headers(found), *(name for name, _ in columns))
    rows = [
        (
            *(found.factors.of(point).values() or [point.label]),
            _folds(found, point),
            *_scores(found, comparisons, point),
            *(words(found.of(point)) for _, words in columns),
        )
        for point in found.grid.points
    ]
    caption = (
        f"All models of the sweep. {_about_scores(found)} {_about_comparison(found, comparisons)}"
        + (" Disparity and tile mismatch: see the table of what the trainers measured." if columns else "")
        + f" {NONE}: not there (yet)."
    )
    return Table("All models", caption, header, tuple(rows))


def factor_tables(found: Collection, comparisons: Comparisons) -> list[Table]:
    """A table for every factor."""
    return [factor_table(found, comparisons, factor) for factor in found.factors.levels]


def detail_tables(found: Collection) -> list[Table]:
    """Models by folds, by classes, and what their trainers measured."""
    by_fold = [folds_table(found, metric) for metric in found.metrics]
    return [*by_fold, *(classes_table(found, metric) for metric in found.metrics), *measured_tables(found)]


def measured_tables(found: Collection) -> list[Table]:
    """What the trainers measured in their validations, and how long an epoch took; none if there is nothing."""
    columns = list(_measured(found))
    if not columns:
        return []
    rows = [(named(found, point), *(words(found.of(point)) for _, words in columns)) for point in found.grid.points]
    alone = "; alone: in tiles with statistics of their own, for norms without stored ones"
    caption = (
        "Disparity: 1 - Dice of the same patches with the norms in train and in eval mode, mean over classes and folds; "
        "above 0.1 the stored statistics are not those of the training. Tile mismatch: median of 1 - Dice where two tiles "
        "predict the same voxels, as nnunet-norm predict does it, mean over classes and folds; max dist: the largest "
        'difference of their logits in any fold, "no" if none but rounding'
        + (alone if any(ALONE in name for name, _ in columns) else "")
        + f". Seconds: of an epoch, median, mean over folds. {NONE}: not measured (yet)."
    )
    return [Table("What the trainers measured", caption, ("model", *(name for name, _ in columns)), tuple(rows))]


def factor_table(found: Collection, comparisons: Comparisons, factor: str) -> Table:
    """The levels of one factor, all others at the baseline's."""
    base = found.factors.of(found.grid.baseline)
    others = {name: level for name, level in base.items() if name != factor}
    points = {
        found.factors.of(point)[factor]: point
        for point in found.grid.points
        if all(found.factors.of(point)[name] == level for name, level in others.items())
    }
    rows = [
        (level, _folds(found, points[level]), *_scores(found, comparisons, points[level]))
        for level in found.factors.levels[factor]
        if level in points
    ]
    fixed = ", ".join(f"{spoken(name)} {level}" for name, level in others.items())
    caption = (
        f"Models that differ from the baseline in {spoken(factor)} alone"
        + (f" (all with {fixed}). " if fixed else ". ")
        + f"{_about_scores(found)} {_about_comparison(found, comparisons)}"
    )
    header = (spoken(factor), "folds", *_headers(found))
    return Table(f"By {spoken(factor)}", caption, header, tuple(rows))


def folds_table(found: Collection, metric: str) -> Table:
    """Models x folds."""
    rows = _per_model(found, metric, lambda point: (number(metric, one.score(metric)) for one in found.of(point)))
    caption = (
        f"{metric}{UNITS.get(metric, '')} of every training: mean over the classes of the mean over its validation cases. "
        f"Last: {SPREAD[0].lower()}{SPREAD[1:]}. {NONE}: not validated yet, or no "
        f"value for a class in any case.{smaller_is_better([metric])}{about_fold_all(found)}"
    )
    header = ("model", *(f"fold {fold}" for fold in found.grid.folds), "mean ± SD")
    return Table(f"{metric} by fold", caption, header, rows)


def _per_model(found: Collection, metric: str, cells: Callable[[Point], Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """A row per model: its name, its cells, and at last the mean over folds of the mean over classes."""
    return tuple(
        (named(found, point), *cells(point), spread(metric, found.spread(point, metric))) for point in found.grid.points
    )


def classes_table(found: Collection, metric: str) -> Table:
    """Models x classes."""
    rows = _per_model(
        found, metric, lambda point: (spread(metric, found.spread(point, metric, label)) for label in found.labels)
    )
    caption = (
        f"{metric}{UNITS.get(metric, '')} of every class or region. {SPREAD} of the mean over the validation cases; cases in "
        "which a class is neither in the reference nor in the prediction do not count for it."
        f"{smaller_is_better([metric])}{about_fold_all(found)}"
    )
    return Table(f"{metric} by class", caption, ("model", *found.labels.values(), "all"), rows)


def named(found: Collection, point: Point) -> str:
    """A point in a row of its own."""
    return f"{point.label} (baseline)" if point.name == found.grid.baseline.name else point.label


def number(metric: str, value: float) -> str:
    """A score."""
    return NONE if math.isnan(value) else f"{value:.{DIGITS.get(metric, 4)}f}"


def spread(metric: str, value: Spread) -> str:
    """A score over folds."""
    if value.count == 0:
        return NONE
    if value.count == 1:
        return number(metric, value.mean)
    return f"{number(metric, value.mean)} ± {number(metric, value.deviation)}"


def difference(metric: str, found: Comparison | None) -> str:
    """A difference with its interval."""
    if found is None:
        return NONE
    digits = DIGITS.get(metric, 4)
    interval = "" if math.isnan(found.low) else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{interval}"


def smaller_is_better(metrics: Iterable[str]) -> str:
    """A sentence, after a blank, that says so of distances; nothing of other scores."""
    return "".join(f" {metric}: smaller is better." for metric in metrics if metric in SMALLER_IS_BETTER)


def about_fold_all(found: Collection) -> str:
    """A sentence, after a blank, on what its scores are worth; nothing where the sweep has no such fold."""
    folds = found.grid.folds
    if "all" not in folds:
        return ""
    if len(folds) == 1:
        return " Fold all is validated on cases it was trained on: its scores say nothing about new images."
    return " Fold all, validated on cases it was trained on, is in no mean and no difference."


def _folds(found: Collection, point: Point) -> str:
    outcomes = found.counted(point)
    return f"{sum(outcome.summary is not None for outcome in outcomes)} of {len(outcomes)}"


def _headers(found: Collection) -> Iterator[str]:
    for metric in found.metrics:
        yield f"{metric}{UNITS.get(metric, '')}"
        yield "difference"
    yield "cases"


def _scores(found: Collection, comparisons: Comparisons, point: Point) -> Iterator[str]:
    of_point = comparisons.get(point.name, {})
    for metric in found.metrics:
        yield spread(metric, found.spread(point, metric))
        yield "baseline" if point.name == found.grid.baseline.name else difference(metric, of_point.get(metric))
    dice = of_point.get(DICE)
    yield NONE if dice is None else str(dice.num_cases)


def _measured(found: Collection) -> Iterator[tuple[str, Callable[[Sequence[Outcome]], str]]]:
    """Columns of what trainers measured, but for what no training has."""
    outcomes = found.outcomes
    if any(not math.isnan(outcome.disparity) for outcome in outcomes):
        yield DISPARITY, lambda folds: _mean(outcome.disparity for outcome in folds)
    for name, tiles in (("", lambda outcome: outcome.tiles), (ALONE, lambda outcome: outcome.tiles_alone)):
        if any(not math.isnan(tiles(outcome).max_dist) for outcome in outcomes):
            yield f"{MISMATCH}{name}", _mismatch(tiles)
            yield f"max dist{name}", _max_dist(tiles)
    if any(not math.isnan(outcome.seconds) for outcome in outcomes):
        yield "seconds", lambda folds: _mean((outcome.seconds for outcome in folds), digits=1)


def _mismatch(tiles: Callable[[Outcome], Tiles]) -> Callable[[Sequence[Outcome]], str]:
    return lambda folds: _mean(tiles(outcome).mismatch for outcome in folds)


def _max_dist(tiles: Callable[[Outcome], Tiles]) -> Callable[[Sequence[Outcome]], str]:
    def words(folds: Sequence[Outcome]) -> str:
        measured = [tiles(outcome) for outcome in folds if not math.isnan(tiles(outcome).max_dist)]
        # "no (float32 rounding, 1.2e-06)" is too long for a cell
        return max(measured, key=lambda one: one.max_dist).verdict.partition(" (")[0] if measured else NONE

    return words


def _mean(values: Any, digits: int = 4) -> str:
    mean = Spread.of(values).mean
    return NONE if math.isnan(mean) else f"{mean:.{digits}f}"


def _about_scores(found: Collection) -> str:
    *others, last = found.metrics
    return f"{', '.join(others)} and {last} of the validation: mean over classes and cases. {SPREAD}.{about_fold_all(found)}"


def _about_comparison(found: Collection, comparisons: Comparisons) -> str:
    text = (
        f"Difference to the baseline ({found.grid.baseline.label}): mean over the cases that both have, all folds together, "
        "with the 95 % bootstrap interval over these cases; cases: their number."
    )
    if HD95 not in found.metrics:
        return text
    partial = max((one.partial for of_point in comparisons.values() for one in of_point.values() if one), default=0)
    others = f"; in up to {partial} {'case' if partial == 1 else 'cases'} others were left out" if partial else ""
    return f"{text}{smaller_is_better(found.metrics)} It is compared over the classes that both models found{others}."
