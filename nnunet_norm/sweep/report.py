"""The report of a sweep: CSV for programs, Markdown for notes, and one HTML file that needs nothing else."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nnunet_norm.errors import OutputError
from nnunet_norm.evaluation import tolerance_in_words
from nnunet_norm.pages import html_figure, html_page, html_table, markdown_table
from nnunet_norm.scores import DICE
from nnunet_norm.sweep.outcomes import Collection, Outcome
from nnunet_norm.sweep.pictures import Picture, curve_pictures, difference_pictures, score_pictures
from nnunet_norm.sweep.points import Point
from nnunet_norm.sweep.tables import (
    NONE,
    Comparisons,
    Table,
    about_fold_all,
    detail_tables,
    difference,
    factor_tables,
    named,
    points_table,
    spread,
)
from nnunet_norm.writing import written_beside

FOLDER = "report"
"""Of the report, in the sweep's folder."""


@dataclass(frozen=True)
class Written:
    """Files of a report."""

    html: Path
    markdown: Path
    runs: Path
    points: Path


def write_report(found: Collection, comparisons: Comparisons, folder: str | Path) -> Written:
    """Write the whole report.

    Args:
        found: the sweep and its outcomes.
        comparisons: of every point with the baseline.
        folder: is made if it is not there.

    Raises:
        OutputError: it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made ({error.strerror}): choose another folder with -o") from error
    written = Written(*(folder / name for name in ("report.html", "report.md", "runs.csv", "points.csv")))
    details = [*detail_tables(found), models_table(found)]
    _write_csv(written.runs, run_rows(found))
    _write_csv(written.points, point_rows(found, comparisons))
    with written_beside(written.markdown) as beside:
        beside.write_text(markdown_of(found, comparisons, details), encoding="utf-8")
    with written_beside(written.html) as beside:
        beside.write_text(html_of(found, comparisons, details), encoding="utf-8")
    return written


def title_of(found: Collection) -> str:
    """What the report is about."""
    return f"Sweep {found.grid.name} on {found.grid.dataset}, {found.grid.configuration}"


def sentences(found: Collection, comparisons: Comparisons) -> list[str]:
    """What stands at the top: how far the sweep is, what is best, how it was measured."""
    grid, done = found.grid, len(found.done)
    axes = ", ".join(f"{len(levels)} x {name.replace('_', ' ')}" for name, levels in found.factors.levels.items())
    far = f"{done} of {len(found.outcomes)} trainings are done: {len(grid.points)} models"
    far += f" ({axes})" if axes else ""
    far += f" in {len(grid.folds)} {'fold' if len(grid.folds) == 1 else 'folds'}."
    if done < len(found.outcomes):
        far += " All numbers are of what is done; of models with other folds done compare the differences only."
    far += about_fold_all(found)
    faults = sum(outcome.fault is not None for outcome in found.outcomes)
    if faults:
        far += f" {faults} more cannot be evaluated: the table of models says why."
    return [far, *_best(found, comparisons), _measured_how(found)]


def _best(found: Collection, comparisons: Comparisons) -> Iterator[str]:
    scored = [point for point in found.grid.points if found.spread(point, DICE).count]
    if not scored:
        return
    best = max(scored, key=lambda point: found.spread(point, DICE).mean)
    text = f"Highest mean {DICE}: {named(found, best)} with {spread(DICE, found.spread(best, DICE))}"
    base = found.grid.baseline
    if best.name != base.name and found.spread(base, DICE).count:
        text += f"; the baseline, {base.label}, has {spread(DICE, found.spread(base, DICE))}"
        comparison = comparisons[best.name][DICE]
        if comparison is not None:
            text += f"; difference {difference(DICE, comparison)} over {comparison.num_cases} common cases"
        text += f". It is the best of {len(scored)} on the cases by which it was chosen: on new ones expect less"
    yield text + "."


def _measured_how(found: Collection) -> str:
    if not found.settings:
        return "No validation is there yet."
    at = tolerance_in_words(found.settings)
    versions = ", ".join(f"{name} {version}" for name, version in found.settings["versions"].items())
    return (
        f"NSD (surface Dice) at a tolerance of {at}, in the images' own spacing. {found.settings['absent']} "
        f"Measured with {versions}."
    )


def models_table(found: Collection) -> Table:
    """Where every model lies, and what its trainings still lack."""
    rows = [(named(found, point), point.name, _state(found.of(point))) for point in found.grid.points]
    caption = (
        "Folders of the models among nnU-Net's results, and what their trainings lack to be done, or to be evaluated."
    )
    return Table("Models", caption, ("model", "folder", "not done"), tuple(rows), words=True)


def _state(outcomes: Sequence[Outcome]) -> str:
    open_ones = []
    for outcome in outcomes:
        fold = f"fold {outcome.run.fold}:"
        if outcome.missing is not None:
            epochs = f"{len(outcome.epochs)} of {outcome.run.point.epochs} epochs"
            open_ones.append(f"{fold} no {outcome.missing}, {epochs}")
        elif outcome.fault is not None:
            open_ones.append(f"{fold} {outcome.fault}")
    return "; ".join(open_ones) or NONE


def markdown_of(found: Collection, comparisons: Comparisons, details: Iterable[Table]) -> str:
    """The report as Markdown: sentences and tables."""
    parts = [f"# {title_of(found)}", *sentences(found, comparisons)]
    for table in (points_table(found, comparisons), *factor_tables(found, comparisons), *details):
        parts += [f"## {table.title}", markdown_table(table.header, table.rows), table.caption]
    return "\n\n".join(parts) + "\n"


def html_of(found: Collection, comparisons: Comparisons, details: Iterable[Table]) -> str:
    """The report as one HTML file."""
    first, *others = sentences(found, comparisons)
    colour = "fine" if len(found.done) == len(found.outcomes) else "unknown"
    parts = [
        f'<p class="verdict {colour}">{escape(first)}</p>',
        *(f"<p>{escape(text)}</p>" for text in others),
        *_html_table(points_table(found, comparisons)),
        *_html_pictures(difference_pictures(found, comparisons)),
        *(part for table in factor_tables(found, comparisons) for part in _html_table(table)),
        *_html_pictures(score_pictures(found)),
        *_html_pictures(curve_pictures(found)),
        *(part for table in details for part in _html_table(table)),
    ]
    return html_page(title_of(found), parts)


def _html_pictures(pictures: Iterable[Picture]) -> Iterator[str]:
    for picture in pictures:
        yield f"<h2>{escape(picture.title)}</h2>"
        yield html_figure(picture.png, picture.caption)


def _html_table(table: Table) -> list[str]:
    text = html_table(table.caption, table.header, table.rows, words=table.words)
    return [f"<h2>{escape(table.title)}</h2>", f'<div class="wide">{text}</div>']


def run_rows(found: Collection) -> Iterator[dict[str, Any]]:
    """One row per training that is done, metric and class ("all": the foreground's mean); in a form for data frames."""
    for outcome in found.done:
        point = outcome.run.point
        about = {"model": point.name, **_levels(found, point), "fold": outcome.run.fold, "cases": outcome.num_cases}
        for metric in found.metrics:
            for label, name in ((None, "all"), *found.labels.items()):
                yield {**about, "metric": metric, "class": name, "value": _cell(outcome.score(metric, label))}
        for metric, value in measured(outcome).items():
            yield {**about, "metric": metric, "class": "all", "value": _cell(value)}


def point_rows(found: Collection, comparisons: Comparisons) -> Iterator[dict[str, Any]]:
    """One row per model; what was measured is the mean over folds, and of ``max_dist`` the largest."""
    for point in found.grid.points:
        outcomes = found.of(point)
        counted = found.counted(point)
        row = {"model": point.name, **_levels(found, point), "baseline": point.name == found.grid.baseline.name}
        row |= {"folds_done": sum(outcome.summary is not None for outcome in counted), "folds": len(counted)}
        for metric in found.metrics:
            score, comparison = found.spread(point, metric), comparisons.get(point.name, {}).get(metric)
            row |= {f"{metric}_mean": _cell(score.mean), f"{metric}_sd": _cell(score.deviation)}
            row |= {
                f"{metric}_difference": "" if comparison is None else _cell(comparison.mean),
                f"{metric}_difference_low": "" if comparison is None else _cell(comparison.low),
                f"{metric}_difference_high": "" if comparison is None else _cell(comparison.high),
                f"{metric}_difference_cases": 0 if comparison is None else comparison.num_cases,
                f"{metric}_difference_partial": 0 if comparison is None else comparison.partial,
            }
        for key in measured(outcomes[0]):
            values = [value for value in (measured(outcome)[key] for outcome in outcomes) if not math.isnan(value)]
            over_folds = max if key.startswith("max") else statistics.fmean
            row[key] = _cell(over_folds(values)) if values else ""
        yield row


def measured(outcome: Outcome) -> dict[str, float]:
    """What is not of the evaluation; NaN for what was not measured."""
    return {
        "disparity": outcome.disparity,
        "tile_mismatch": outcome.tiles.mismatch,
        "max_dist": outcome.tiles.max_dist,
        "tile_mismatch_alone": outcome.tiles_alone.mismatch,
        "max_dist_alone": outcome.tiles_alone.max_dist,
        "seconds_per_epoch": outcome.seconds,
    }


def _levels(found: Collection, point: Point) -> dict[str, str]:
    return dict(found.factors.of(point))


def _cell(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    listed = list(rows)
    with written_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(listed[0]) if listed else ["model"])
        writer.writeheader()
        writer.writerows(listed)
