"""Which figures a sweep's report has, with their captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nnunet_norm.pages import as_png
from nnunet_norm.scores import SMALLER_IS_BETTER
from nnunet_norm.sweep.factors import BATCH, PATCH, spoken
from nnunet_norm.sweep.figures import Curves, Scores, draw_curves, draw_differences, draw_scores, window
from nnunet_norm.sweep.outcomes import Collection
from nnunet_norm.sweep.points import Point
from nnunet_norm.sweep.tables import UNITS, Comparisons, about_fold_all, smaller_is_better

PANELS = 3
"""Of scores in a row; more are drawn as a figure of their own."""

VALUES = {"train_loss": "training loss", "dice": "pseudo Dice"}
"""Curves that are drawn: attribute of an epoch -> what it is called."""


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        title: a heading.
        png: the file.
        caption: stands alone.
    """

    title: str
    png: bytes
    caption: str


def difference_pictures(found: Collection, comparisons: Comparisons) -> Iterator[Picture]:
    """Every model against the baseline; nothing where there is none to compare."""
    grid = found.grid
    models = [point for point in grid.points if any((comparisons.get(point.name) or {}).values())]
    if not models:
        return
    differences = {
        _with_unit(metric) + "\n(smaller is better)" * (metric in SMALLER_IS_BETTER): {
            point.label: comparisons[point.name].get(metric) for point in models
        }
        for metric in found.metrics
        if any(comparisons[point.name].get(metric) for point in models)
    }
    caption = (
        f"Difference of every model to the baseline ({grid.baseline.label}) in the mean score of a case, over the validation "
        "cases that both have, all folds together. Lines: 95 % bootstrap intervals over cases; they do not know how much "
        "another training of the same model would differ, nor how many models are compared."
        f"{smaller_is_better(found.metrics)}{about_fold_all(found)}"
    )
    figure = draw_differences(differences)
    yield Picture("Differences to the baseline", as_png(figure), caption)


def score_pictures(found: Collection) -> list[Picture]:
    """Scores against patch and batch, where these vary."""
    return [picture for factor in (PATCH, BATCH) for picture in _scores(found, factor)]


def curve_pictures(found: Collection) -> list[Picture]:
    """Training loss and pseudo Dice of every epoch."""
    return [picture for value in VALUES for picture in _curves(found, value)]


def _scores(found: Collection, factor: str) -> Iterator[Picture]:
    """Scores against a factor, with lines for the first of the others, and panels for the rest."""
    factors = found.factors
    if factor not in factors.levels:
        return
    scored = [point for point in found.grid.points if found.spread(point, found.metrics[0]).count]
    line = next((name for name in factors.levels if name != factor), None)
    without = [factor] if line is None else [factor, line]
    groups = {
        key: points
        for key, points in factors.groups(scored, *without).items()
        if len({factors.of(point)[factor] for point in points}) > 1
    }
    names = [name for name in factors.levels if name not in without]
    chosen = list(groups.items())
    at_once = math.ceil(len(chosen) / max(math.ceil(len(chosen) / PANELS), 1)) or 1
    for first in range(0, len(chosen), at_once):
        panels = {
            _with_unit(metric): [
                Scores(_title(names, key), _lines(found, points, metric, factor, line))
                for key, points in chosen[first : first + at_once]
            ]
            for metric in found.metrics
        }
        figure = draw_scores(
            panels, factors.levels[factor], f"{spoken(factor)}{' in voxels' if factor == PATCH else ''}"
        )
        caption = (
            f"{' and '.join(panels)} of the validation against {spoken(factor)}"
            + (f", a line for every {spoken(line)}" if line else "")
            + (f", a panel for every {' and '.join(map(spoken, names))}" if names else "")
            + ". Small points: single folds. Large ones: their mean, with the standard deviation over folds (n - 1). "
            f"Lines only lead the eye.{smaller_is_better(found.metrics)}{about_fold_all(found)}"
        )
        part = f" ({first // at_once + 1})" if len(chosen) > PANELS else ""
        yield Picture(f"Scores against {spoken(factor)}{part}", as_png(figure), caption)


def _lines(
    found: Collection, points: Sequence[Point], metric: str, factor: str, line: str | None
) -> dict[str, dict[str, list[float]]]:
    lines: dict[str, dict[str, list[float]]] = {}
    for point in points:
        levels = found.factors.of(point)
        name = levels[line] if line else "all"
        lines.setdefault(name, {})[levels[factor]] = [outcome.score(metric) for outcome in found.counted(point)]
    return lines


def _curves(found: Collection, value: str) -> Iterator[Picture]:
    """A figure with lines for batch sizes, one for patch sizes of what is not in it, and one of whatever is left."""
    factors = found.factors
    begun = {p.name: p for p in found.grid.points if any(outcome.epochs for outcome in found.of(p))}
    left = dict(begun)
    last = next(reversed(list(factors.levels)), "")
    for line, fewest in ((BATCH, 2), (PATCH, 2), (last, 1)):
        groups = {
            key: [point for point in points if point.name in begun]
            for key, points in factors.groups(found.grid.points, line).items()
            if len(points) >= fewest and any(point.name in left for point in points)
        }
        left = {name: p for name, p in left.items() if not any(p in points for points in groups.values())}
        if groups:
            yield _curve_picture(found, value, line, groups)


def _curve_picture(
    found: Collection, value: str, line: str, groups: Mapping[tuple[str, ...], Sequence[Point]]
) -> Picture:
    """Curves with a line for every level of a factor, or one alone where there is no factor, and a panel for every group."""
    factors = found.factors
    names = [name for name in factors.levels if name != line]
    panels = []
    for key, points in groups.items():
        lines = {}
        for point in sorted(points, key=lambda one: factors.place(one, line)):
            name = _title([line], [factors.of(point)[line]]) if line else point.label
            lines[name] = [outcome.epochs for outcome in found.of(point) if outcome.epochs]
        panels.append(Curves(_title(names, key), lines))
    comparable = value == "dice" or "loss" not in factors.levels
    figure = draw_curves(panels, value, VALUES[value], rising=line in (BATCH, PATCH), shared=comparable)
    width = window(panels)
    what = "Loss on training patches" if value == "train_loss" else "nnU-Net's pseudo Dice of validation patches"
    caption = (
        f"{what} of every epoch"
        + (f", a line for every {spoken(line)}" if line else "")
        + (f", a panel for every {' and '.join(map(spoken, names))}" if names else "")
        + ". Lines: mean over the folds that have reached the epoch; bands: from the lowest to the highest fold."
        + (f" Averaged over {width} epochs." if width > 1 else "")
        + ("" if comparable else " Values of different losses are not comparable.")
    )
    return Picture(f"Curves: {VALUES[value]}{f' by {spoken(line)}' if line else ''}", as_png(figure), caption)


def _title(names: Sequence[str], key: Sequence[str]) -> str:
    """What a panel's lines have in common, or what a line is; words speak for themselves, numbers need their name."""
    parts = (
        level if level[:1].isalpha() else f"{spoken(name)} {level}" for name, level in zip(names, key, strict=True)
    )
    return ", ".join(parts)


def _with_unit(metric: str) -> str:
    return f"{metric}{UNITS.get(metric, '')}"
