"""Figures of ``normalization.py``; each function tells whether there was anything to draw."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from normalization_settings import NORMALIZATION_BATCHES, ROWS

from nnunet_norm.training.trainer import LARGE_DISPARITY
from nnunet_norm.writing import written_beside

EVAL, TRAIN, BATCH = "#0072b2", "#e69f00", "#999999"
COLOURS = {
    "InstanceNorm": "#d55e00",
    "BatchNorm": "#000000",
    "BRN": "#0072b2",
    "GN": "#009e73",
    "INTracked": "#e69f00",
    "PreciseBN": "#56b4e9",
    "FrozenBN": "#cc79a7",
    "NoNorm": "#999999",
}
"""Colours that differ for everybody (Okabe and Ito)."""
LINES = {"": "-", "image_quantile": "--", "tile_quantile": ":"}

Rows = dict[str, dict[str, Any]]
Values = list[float | None]


def draw_modes(rows: Rows, result: dict[str, Any], path: Path) -> bool:
    """Bars per norm: Dice in both modes above, disparity below."""
    found = {
        row: [run["tables"]["modes"] for run in rows[row].values() if run.get("tables", {}).get("modes")]
        for row in ROWS
    }
    found = {row: runs for row, runs in found.items() if runs}
    if not found:
        return False
    figure = Figure(figsize=(10, 7.5), dpi=120)
    dice, disparity = figure.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.12})
    kinds = {
        "eval": ("eval mode", EVAL),
        "train": ("train mode", TRAIN),
        "batch": ("statistics of the batch alone", BATCH),
    }
    _bars(dice, found, "dice", kinds)
    _bars(disparity, found, "disparity", {mode: kind for mode, kind in kinds.items() if mode != "eval"})
    dice.set_ylabel("Dice with the labels")
    disparity.set_ylabel("disparity: 1 - Dice with eval mode")
    disparity.axhline(LARGE_DISPARITY, color="black", linewidth=0.8, linestyle=":")
    titles = [_title(row, runs, result) for row, runs in found.items()]
    disparity.set_xticks(range(len(found)), titles, rotation=25, ha="right", fontsize=9)
    for axis in (dice, disparity):
        axis.legend(fontsize=9, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98))
        axis.margins(x=0.02, y=0.12)
    size = next(iter(found.values()))[0]["batch_size"]
    words = (
        f"Mean over the classes, patches of images that were not trained on, in batches of {size}. Below: how far eval mode "
        f"is from the others on the same patches; dotted: {LARGE_DISPARITY}, from which on the trainers warn."
    )
    _finish(figure, words, result, path)
    return True


def draw_tiles(rows: Rows, result: dict[str, Any], path: Path) -> bool:
    """Dice against the size of the tiles, a plot per class."""
    found = {row: [run for run in rows[row].values() if "tiles" in run and "tables" in run] for row in ROWS}
    found = {row: runs for row, runs in found.items() if runs and runs[0]["tiles"]["sizes"]}
    if not found:
        return False
    first = next(iter(found.values()))[0]["tiles"]
    labels = [" x ".join(map(str, each["size"])) for each in first["sizes"]] + ["whole image"]
    figure = Figure(figsize=(max(3.4 * len(first["classes"]), 7), 5.4), dpi=120)
    axes = figure.subplots(1, len(first["classes"]), squeeze=False)[0]
    for number, (axis, name) in enumerate(zip(axes, first["classes"], strict=True)):
        for row, runs in found.items():
            series = [[each["dice"][number] for each in run["tiles"]["sizes"]] for run in runs]
            wholes = [_of_whole_image(run)[number] for run in runs]
            lines = [[*values, whole] for values, whole in zip(series, wholes, strict=True)]
            _line(axis, range(len(labels)), lines, row, _title(row, runs, result))
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
        axis.set_xlabel("tile")
    axes[0].set_ylabel("Dice with the labels")
    _legend(figure, axes[0])
    _finish(
        figure, "Tiles without overlap but for the halo (at most a quarter of a tile). Bands: seeds.", result, path, 0.4
    )
    return True


def draw_batches(rows: Rows, result: dict[str, Any], path: Path) -> bool:
    """Dice and disparity against the batch that normalizes: networks trained so, and train modes of others."""
    figure = Figure(figsize=(10, 5), dpi=120)
    trained, disparity = figure.subplots(1, 2)
    ghosts = [
        [run["ghost"]["modes"] for run in rows[str(size)].values() if run.get("ghost", {}).get("modes")]
        for size in NORMALIZATION_BATCHES
    ]
    drawn = False
    for mode, colour in (("eval", EVAL), ("train", TRAIN)):
        drawn |= _spots(
            trained, [[_mean(run["dice"][mode]) for run in runs] for runs in ghosts], f"GhostBN, {mode} mode", colour
        )
    drawn |= _spots(
        disparity, [[_mean(run["disparity"]["train"]) for run in runs] for runs in ghosts], "GhostBN", TRAIN
    )
    for row in ROWS:
        runs = [run["batches"]["sizes"] for run in rows[row].values() if run.get("batches", {}).get("sizes")]
        if runs:
            sizes = range(len(NORMALIZATION_BATCHES))
            colour = COLOURS[ROWS[row].norm]
            series = [[_mean(run[i]["dice"]["train"]) for run in runs if i < len(run)] for i in sizes]
            _spots(trained, series, _title(f"{row}, train mode", runs, result), colour, "--")
            series = [[_mean(run[i]["disparity"]["train"]) for run in runs if i < len(run)] for i in sizes]
            drawn |= _spots(disparity, series, _title(row, runs, result), colour, "--")
    if not drawn:
        return False
    trained.set_ylabel("Dice with the labels, mean over the classes")
    disparity.set_ylabel("disparity: 1 - Dice between train and eval mode")
    for axis in (trained, disparity):
        axis.set_xscale("log", base=2)
        axis.set_xticks(NORMALIZATION_BATCHES, list(map(str, NORMALIZATION_BATCHES)))
        axis.set_xlabel("samples that are normalized together")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    disparity.set_ylim(bottom=0)
    words = (
        "Solid: GhostBN, trained with such batches. Dashed: networks trained as in the table, evaluated with others."
    )
    trained_so = ", ".join(str(len(runs)) for runs in ghosts)
    if any(ghosts) and any(len(runs) != len(result["seeds"]) for runs in ghosts):
        words += f" Seeds of GhostBN that are measured, by batch: {trained_so} of {len(result['seeds'])}."
    _finish(figure, words + " Vertical lines: seeds.", result, path)
    return True


def draw_transfer(rows: Rows, result: dict[str, Any], path: Path) -> bool:
    """Bars per norm: Dice of membranes on own and on other images."""
    found = {row: [run for run in rows[row].values() if "transfer" in run and "tables" in run] for row in ROWS}
    found = {row: runs for row, runs in found.items() if runs}
    if not found:
        return False
    flat = {
        row: [
            {
                "dice": {
                    "own": [run["tables"]["whole"]["dice"][0]],
                    "there": [run["transfer"]["as_trained"]],
                    "adapted": [run["transfer"]["adapted"]],
                }
            }
            for run in runs
        ]
        for row, runs in found.items()
    }
    figure = Figure(figsize=(10, 5), dpi=120)
    axis = figure.subplots()
    kinds = {
        "own": ("own images", BATCH),
        "there": (f"images of {result['other']}, as trained", EVAL),
        "adapted": ("with the statistics of those", TRAIN),
    }
    _bars(axis, flat, "dice", kinds)
    axis.set_ylabel("Dice of membranes")
    titles = [_title(row, runs, result) for row, runs in found.items()]
    axis.set_xticks(range(len(flat)), titles, rotation=25, ha="right", fontsize=9)
    axis.legend(fontsize=9, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.99))
    _finish(figure, "Whole images that were not trained on.", result, path)
    return True


def _title(what: str, runs: Sequence[Any], result: dict[str, Any]) -> str:
    """What is drawn; with the seeds that it is of, where some are not measured yet."""
    seeds = len(result["seeds"])
    return what if len(runs) == seeds else f"{what} ({len(runs)} of {seeds} seeds)"


def _of_whole_image(run: dict[str, Any]) -> Values:
    """Dice per class, None where the network is predicted in tiles."""
    whole = run["tables"]["whole"]
    return [None] * len(whole["dice"]) if whole.get("in_tiles") else whole["dice"]


def _mean(values: Values | None) -> float | None:
    there = [value for value in values or [] if value is not None]
    return mean(there) if there else None


def _bars(axis: Axes, found: dict[str, list[Any]], key: str, kinds: dict[str, tuple[str, str]]) -> None:
    width = 0.8 / len(kinds)
    for number, (mode, (title, colour)) in enumerate(kinds.items()):
        places, heights, spans = [], [], []
        for place, runs in enumerate(found.values()):
            values = [value for run in runs if (value := _mean(run[key].get(mode))) is not None]
            if values:
                places.append(place + (number - (len(kinds) - 1) / 2) * width)
                heights.append(mean(values))
                spans.append((mean(values) - min(values), max(values) - mean(values)))
        axis.bar(places, heights, width, label=title, color=colour)
        if any(map(any, spans)):
            axis.errorbar(
                places, heights, list(zip(*spans, strict=True)), fmt="none", ecolor="black", elinewidth=0.8, capsize=2
            )
        for place, height in zip(places, heights, strict=True):
            axis.annotate(
                f"{height:.2f}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=6.5
            )


def _line(axis: Axes, places: Sequence[float], runs: list[Values], row: str, title: str) -> None:
    columns = [[value for value in column if value is not None] for column in zip(*runs, strict=True)]
    there = [(place, column) for place, column in zip(places, columns, strict=True) if column]
    if not there:
        return
    xs, colour = [place for place, _ in there], COLOURS[ROWS[row].norm]
    axis.plot(
        xs, [mean(c) for _, c in there], LINES[ROWS[row].inputs], color=colour, label=title, marker=".", linewidth=1.3
    )
    axis.fill_between(xs, [min(c) for _, c in there], [max(c) for _, c in there], color=colour, alpha=0.12, linewidth=0)


def _spots(axis: Axes, series: list[Values], title: str, colour: str, line: str = "-") -> bool:
    there = [
        (size, [v for v in values if v is not None]) for size, values in zip(NORMALIZATION_BATCHES, series, strict=True)
    ]
    there = [(size, values) for size, values in there if values]
    if there:
        sizes, middles = [size for size, _ in there], [mean(values) for _, values in there]
        spans = [(m - min(v), max(v) - m) for m, (_, v) in zip(middles, there, strict=True)]
        axis.errorbar(
            sizes, middles, list(zip(*spans, strict=True)), color=colour, label=title, fmt=line + "o", capsize=2
        )
    return bool(there)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.07))


def _finish(figure: Figure, words: str, result: dict[str, Any], path: Path, bottom: float = 0.26) -> None:
    figure.subplots_adjust(left=0.08, right=0.98, top=0.93, bottom=bottom, wspace=0.28)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    about = (
        f"{result['setting']}: {result['network']}; {result['epochs']} epochs of {result['iterations']} iterations; seeds "
        f"{', '.join(map(str, result['seeds']))}."
    )
    width = int(figure.get_figwidth() * 14)
    figure.text(0.03, 0.015, textwrap.fill(f"{words} {about}", width), fontsize=8, va="bottom")
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")
