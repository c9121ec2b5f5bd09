"""The figures of a sweep's report: curves of the trainings, scores against patch and batch, differences to the baseline."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nnunet_norm.evaluation import Comparison
from nnunet_norm.sweep.outcomes import Spread
from nnunet_norm.sweep.progress import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI, WIDTH = 150, 7.6
"""Dots per inch, and inches; all figures are as wide, so that their words are as large."""

COLUMNS = 3
"""Of small multiples."""

TITLE = 34
"""Letters of a panel's title that fit a line, of three columns."""

MOST_LINES = 12
"""In a panel; more would be a tangle, and go into a panel of their own."""

WORDS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
"""Colours of levels without an order, which colour-blind people tell apart (Okabe and Ito 2008), darkest contrasts first."""

MARKERS = "osD^vP*X<>ph"
DASHES = ("-", "--", ":", "-.")

SMOOTHED = 50
"""Parts of a training over which curves are averaged; shorter ones are drawn as they are."""


@dataclass(frozen=True)
class Curves:
    """A panel of curves.

    Attributes:
        title: what all its lines have in common.
        lines: name -> one training per fold, each with its epochs.
    """

    title: str
    lines: Mapping[str, Sequence[Sequence[Epoch]]]


@dataclass(frozen=True)
class Scores:
    """A panel of scores against a factor.

    Attributes:
        title: what all its lines have in common.
        lines: name -> level of the factor -> scores of the folds.
    """

    title: str
    lines: Mapping[str, Mapping[str, Sequence[float]]]


AnyPanel = TypeVar("AnyPanel", Curves, Scores)


def draw_curves(panels: Sequence[Curves], value: str, label: str, *, rising: bool, shared: bool) -> Figure:
    """A value of every epoch, as small multiples.

    Args:
        panels: what is drawn.
        value: name of an attribute of :class:`~nnunet_norm.sweep.progress.Epoch`.
        label: of the vertical axis.
        rising: whether lines have an order (as batch sizes), and colours from dark to bright.
        shared: whether all panels have the same vertical axis.
    """
    parts = list(_parts(panels))
    figure, axes, columns = _small_multiples(len(parts), shared)
    looks = _looks([name for panel in panels for name in panel.lines], rising)
    width = window(panels)
    for place, (axis, panel) in enumerate(zip(axes, parts, strict=True)):
        for name, folds in panel.lines.items():
            numbers, means, low, high = _over_folds(folds, value, width)
            marker = "." if len(numbers) == 1 else None
            axis.plot(numbers, means, color=looks[name][0], linestyle=looks[name][2], marker=marker, label=name, lw=1.4)
            if len(folds) > 1:
                axis.fill_between(numbers, low, high, color=looks[name][0], alpha=0.15, linewidth=0)
        _dress(axis, panel.title, "" if place % columns else label)
        axis.set_xlabel("epoch", fontsize=8)
        _whole_numbers(axis)
    _legend(figure, axes)
    return figure


def window(panels: Sequence[Curves]) -> int:
    """Epochs over which curves are averaged: 1 for short trainings."""
    longest = max((len(fold) for panel in panels for folds in panel.lines.values() for fold in folds), default=0)
    return max(longest // SMOOTHED, 1)


def draw_scores(panels: Mapping[str, Sequence[Scores]], levels: Sequence[str], factor: str) -> Figure:
    """Scores against a factor: every fold a point, with mean and standard deviation.

    Args:
        panels: metric with its unit -> the same panels for each.
        levels: of the factor, in order.
        factor: its name, for the horizontal axis.
    """
    rows = [list(_parts(row)) for row in panels.values()]
    figure, axes = _figure(len(rows), max(map(len, rows)), 2.1 * len(rows) + 0.5, sharey="row", sharex=True)
    looks = _looks([name for row in rows for panel in row for name in panel.lines], False)
    for metric, row, of_row in zip(panels, rows, axes, strict=True):
        for axis, panel in zip(of_row, row, strict=False):
            for place, (name, line) in enumerate(panel.lines.items()):
                _points(axis, line, levels, _offset(place, len(panel.lines)), name, looks[name])
            _dress(axis, panel.title if row is rows[0] else "", metric if axis is of_row[0] else "")
            axis.set_xlabel(factor if row is rows[-1] else "", fontsize=8)
            axis.set_xticks(range(len(levels)), levels, fontsize=7, rotation=20 if max(map(len, levels)) > 8 else 0)
            axis.set_xlim(-0.5, len(levels) - 0.5)
    _legend(figure, [axis for of_row in axes for axis in of_row])
    return figure


def draw_differences(differences: Mapping[str, Mapping[str, Comparison | None]]) -> Figure:
    """Every model's difference to the baseline with its interval.

    Args:
        differences: metric with its unit -> model -> the comparison, None without one.
    """
    models = list(next(iter(differences.values())))
    figure, axes = _figure(1, len(differences), 0.9 + 0.22 * len(models), sharey=True)
    for axis, (metric, found) in zip(axes[0], differences.items(), strict=True):
        for place, model in enumerate(models):
            comparison = found[model]
            if comparison is None:
                continue
            if not math.isnan(comparison.low):
                axis.plot([comparison.low, comparison.high], [place, place], color=WORDS[0], linewidth=1.6)
            axis.plot(comparison.mean, place, marker="o", color=WORDS[0], markersize=5)
        axis.axvline(0, color="#777777", linewidth=1)
        _dress(axis, "", "", grid="x")
        axis.set_xlabel(f"difference in {metric}", fontsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.set_yticks(range(len(models)), models, fontsize=7)
        axis.set_ylim(len(models) - 0.4, -0.6)
    return figure


def _points(
    axis: Axes, line: Mapping[str, Sequence[float]], levels: Sequence[str], offset: float, name: str, look: Any
) -> None:
    """A line's folds, means and spreads."""
    colour, marker, dashes = look
    places, means, deviations = [], [], []
    for place, level in enumerate(levels):
        spread = Spread.of(line.get(level, ()))
        if spread.count == 0:
            continue
        scores = [score for score in line[level] if not math.isnan(score)]
        beside = [place + offset + 0.04 + 0.015 * fold for fold in range(len(scores))]
        axis.plot(beside, scores, ".", color=colour, alpha=0.6, markersize=4)
        places.append(place + offset)
        means.append(spread.mean)
        deviations.append(0.0 if math.isnan(spread.deviation) else spread.deviation)
    axis.errorbar(
        places,
        means,
        deviations,
        color=colour,
        marker=marker,
        linestyle=dashes,
        markersize=5,
        lw=1,
        capsize=2,
        label=name,
    )


def _over_folds(folds: Sequence[Sequence[Epoch]], value: str, width: int) -> tuple[Any, Any, Any, Any]:
    """Epochs, and of each the mean, lowest and highest of the folds that have reached it."""
    by_epoch: dict[int, list[float]] = {}
    for fold in folds:
        values = _smoothed(np.array([getattr(epoch, value) for epoch in fold], dtype=float), width)
        for epoch, of_epoch in zip(fold, values, strict=True):
            by_epoch.setdefault(epoch.number, []).append(of_epoch if math.isfinite(of_epoch) else math.nan)
    numbers = sorted(by_epoch)
    spans = [[v for v in by_epoch[number] if not math.isnan(v)] or [math.nan] for number in numbers]
    return numbers, [sum(s) / len(s) for s in spans], [min(s) for s in spans], [max(s) for s in spans]


def _smoothed(values: Any, width: int) -> Any:
    """The running mean; narrower at both ends, and over values that are there."""
    if width < 2 or len(values) < 2:
        return values
    there, kernel = np.isfinite(values), np.ones(min(width, len(values)))
    sums = np.convolve(np.where(there, values, 0), kernel, "same")
    counts = np.convolve(there.astype(float), kernel, "same")
    return np.where(there, sums / np.maximum(counts, 1), np.nan)


def _parts(panels: Sequence[AnyPanel]) -> Iterator[AnyPanel]:
    """The same panels, with no more than :data:`MOST_LINES` lines in each."""
    for panel in panels:
        names = list(panel.lines)
        for first in range(0, len(names), MOST_LINES):
            more = f" ({first // MOST_LINES + 1})" if len(names) > MOST_LINES else ""
            lines: Any = {name: panel.lines[name] for name in names[first : first + MOST_LINES]}
            yield replace(panel, title=panel.title + more, lines=lines)


def _looks(names: Sequence[str], rising: bool) -> dict[str, tuple[Any, str, str]]:
    """Colour, marker and dashes of every line; the same name looks the same in all panels."""
    from matplotlib import colormaps

    unique = list(dict.fromkeys(names))
    looks = {}
    for place, name in enumerate(unique):
        colour: Any = WORDS[place % len(WORDS)]
        if rising and len(unique) > 1:
            colour = colormaps["viridis"](0.8 * place / (len(unique) - 1))
        dashes = DASHES[place // len(WORDS) % len(DASHES)] if not rising else "-"
        looks[name] = (colour, MARKERS[place % len(MARKERS)], dashes)
    return looks


def _offset(place: int, count: int) -> float:
    """Lines stand beside each other, so that no point hides another's."""
    return 0.0 if count == 1 else 0.6 * (place / (count - 1) - 0.5) * min(1.0, count / 4)


def _small_multiples(count: int, shared: bool) -> tuple[Figure, list[Axes], int]:
    columns = min(count, 2 if count == 4 else COLUMNS)
    rows = math.ceil(count / columns)
    figure, axes = _figure(rows, columns, 2.2 * rows + 0.3, sharey=shared)
    flat = [axis for row in axes for axis in row]
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count], columns


def _figure(rows: int, columns: int, height: float, *, sharey: Any, sharex: bool = False) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey, sharex=sharex)


def _dress(axis: Axes, title: str, label: str, grid: Any = "y") -> None:
    axis.set_title(textwrap.fill(title, TITLE), fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.grid(axis=grid, color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _whole_numbers(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, above them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        columns = min(len(handles), max(1, 100 // (8 + max(map(len, handles)))))
        figure.legend(
            handles.values(), handles.keys(), fontsize=8, frameon=False, ncols=columns, loc="outside upper center"
        )
