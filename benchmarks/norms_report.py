"""Table and figure of ``norms.py``."""

import json
import textwrap
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from reporting import table

from nnunet_norm.training.trainer import LARGE_DISPARITY
from nnunet_norm.writing import written_beside

EVAL, TRAIN, BATCH = "#0072b2", "#e69f00", "#999999"
"""Colours that differ for everybody (Okabe and Ito)."""

NOTES = """\
- Dice eval, train, batch: mean over the classes, all validation tiles together, with the norms in eval mode (running
  statistics; the tile's own for InstanceNorm and GroupNorm), in train mode, and for BatchRenorm and FrozenBN, whose train
  mode is not that of BatchNorm, with the statistics of the mini-batch alone. The same mini-batches of tiles in each, as many
  tiles as in a training batch, patches side by side, in a random but fixed order.
- Disparity: 1 - Dice between train and eval mode, mean over the classes; against batch statistics: the same between those of
  the mini-batch alone and eval mode. Clipped: share of BatchRenorm's channels whose correction meets a limit.
- Dice, whole images: of nnU-Net's own validation with the halo predictor, mean over images and classes.
- Range over the seeds in brackets, where there are several.
"""


def average(values: list[float | None]) -> float | None:
    """Over what was measured."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def row(runs: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The numbers of one norm, one entry per seed."""
    measured, told = [run["measured"] for run in runs], [run["reported"] for run in runs]
    return {
        "eval": [average(m["dice"]["eval"]) for m in measured],
        "train": [average(m["dice"]["train"]) for m in measured],
        "batch": [average(m["dice"].get("batch", [])) for m in measured],
        "disparity": [average(m["disparity"]) for m in measured],
        "batch_disparity": [average(m["batch_disparity"] or []) for m in measured],
        "clipped": [m["clipped"] for m in measured],
        "whole": [average(t["dice"]) for t in told],
    }


def shown(values: list[float | None], form: str = ".3f") -> str:
    """Mean, and the range in brackets."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    middle = format(mean(there), form)
    return middle if len(there) == 1 else f"{middle} ({format(min(there), form)} to {format(max(there), form)})"


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    settings, norms = result["settings"], result["norms"]
    head = [
        "norm",
        "batch",
        "Dice eval",
        "Dice train",
        "Dice batch",
        "disparity",
        "against batch statistics",
        "clipped",
    ]
    rows = [[*head, "Dice, whole images"]]
    for name, runs in norms.items():
        found = row(runs)
        cells = [shown(found[key]) for key in ("eval", "train", "batch", "disparity", "batch_disparity")]
        batch = str(runs[0]["measured"]["batch_size"]) + runs[0]["batch_note"]
        rows.append([name, batch, *cells, shown(found["clipped"], ".1%"), shown(found["whole"])])
    classes = [["norm", *[f"{c}: {m}" for c in result["classes"] for m in ("eval", "train", "disparity")]]]
    for name, runs in norms.items():
        per_class = []
        for number in range(len(result["classes"])):
            measured = [run["measured"] for run in runs]
            lists = [[m["dice"]["eval"] for m in measured], [m["dice"]["train"] for m in measured]]
            lists.append([m["disparity"] for m in measured])
            per_class += [shown([values[number] for values in each]) for each in lists]
        classes.append([name, *per_class])
    patch = " x ".join(map(str, settings["patch"]))
    told = result["machine"] | result["versions"]
    parts = [
        "# Norms on electron microscopy: Dice in train and eval mode, and disparity",
        f"`{result['command']}`",
        "\n".join(f"- {key}: {json.dumps(value)}" for key, value in told.items()),
        f"Drosophila VNC, sections {settings['train_sections']} for training and {settings['val_sections']} for validation; "
        f"`nnUNetv2_train`, 2d, {settings['stages']} stages, {settings['features']} features at the first, patch {patch}, "
        f"{settings['epochs']} epochs of {settings['iterations']} iterations, seed(s) "
        f"{', '.join(map(str, settings['seeds']))}. {settings['note']}",
        table(rows),
        control(norms),
        "![Dice and disparity per norm](norms.png)",
        "## Per class",
        table(classes),
        NOTES,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def control(norms: dict[str, Any]) -> str:
    """Whether BatchNorm at batch 2 shows what the measurement is there to find."""
    if "BatchNorm" not in norms:
        return ""
    found = average(row(norms["BatchNorm"])["disparity"])
    if found is None:
        return "Positive control: BatchNorm predicts no foreground in either mode, so there is no disparity to see."
    verdict = "clear" if found > LARGE_DISPARITY else "not clear"
    words = f"Positive control: the disparity of BatchNorm is {found:.3f}, which is {verdict} (bar: above {LARGE_DISPARITY})."
    others = {name: average(row(norms[name])["disparity"]) for name in ("BatchRenorm", "FrozenBN") if name in norms}
    told = [f"{name} {value:.3f}" for name, value in others.items() if value is not None]
    return words + (f" Under the same conditions: {', '.join(told)}." if told else "")


def draw(result: dict[str, Any], path: Any) -> None:
    """Bars per norm: Dice above, disparity below."""
    norms = {name: row(runs) for name, runs in result["norms"].items()}
    figure = Figure(figsize=(10, 7.5), dpi=120)
    dice, disparity = figure.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.2})
    figure.subplots_adjust(left=0.08, right=0.98, top=0.94, bottom=0.24)
    _bars(
        dice, norms, {"eval": ("eval mode", EVAL), "train": ("train mode", TRAIN), "batch": ("batch statistics", BATCH)}
    )
    dice.set_ylabel("Dice with the labels")
    below = {"disparity": ("train mode", TRAIN), "batch_disparity": ("batch statistics", BATCH)}
    _bars(disparity, norms, below)
    disparity.axhline(LARGE_DISPARITY, color="black", linewidth=0.8, linestyle=":")
    disparity.set_ylabel("disparity: 1 - Dice with eval mode")
    disparity.set_xticks(
        range(len(norms)), [_label(name, result) for name in norms], rotation=20, ha="right", fontsize=9
    )
    for axis in (dice, disparity):
        axis.legend(fontsize=9, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.96))
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02, y=0.15)
    figure.text(0.03, 0.02, textwrap.fill(_caption(result), 150), fontsize=8.5, va="bottom")
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")


def _bars(axis: Any, norms: dict[str, Any], kinds: dict[str, tuple[str, str]]) -> None:
    width = 0.8 / len(kinds)
    for number, (key, (title, colour)) in enumerate(kinds.items()):
        places, heights, lows, highs = [], [], [], []
        for place, found in enumerate(norms.values()):
            if (height := average(found[key])) is None:
                continue
            there = [value for value in found[key] if value is not None]
            places.append(place + (number - (len(kinds) - 1) / 2) * width)
            heights.append(height)
            lows.append(height - min(there))
            highs.append(max(there) - height)
        axis.bar(places, heights, width, label=title, color=colour)
        if any(lows) or any(highs):
            axis.errorbar(places, heights, [lows, highs], fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for place, height in zip(places, heights, strict=True):
            axis.annotate(f"{height:.2f}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=7)


def _label(name: str, result: dict[str, Any]) -> str:
    run = result["norms"][name][0]
    return f"{name}\nbatch {run['measured']['batch_size']}{run['batch_note']}"


def _caption(result: dict[str, Any]) -> str:
    settings = result["settings"]
    tiles = next(iter(result["norms"].values()))[0]["measured"]["tiles"]
    size = " x ".join(map(str, settings["patch"]))
    bars = "; lines: range over seeds" if len(settings["seeds"]) > 1 else ""
    return (
        f"Electron microscopy of the ventral nerve cord of Drosophila, sections not trained on, {tiles} tiles of {size} "
        f"pixels (4.6 nm) in mini-batches. Above: Dice with the labels, mean of {', '.join(result['classes'])}, the norms in "
        f"eval mode, in train mode, and, where that is not BatchNorm's, with the statistics of the mini-batch alone"
        f"{bars}. Below: how far eval mode is from the others on the same tiles; dotted: {LARGE_DISPARITY}, from which on "
        f"the trainers warn. {settings['epochs'] * settings['iterations']} iterations each, seed(s) "
        f"{', '.join(map(str, settings['seeds']))}. Images and labels: groundtruth-drosophila-vnc, CC BY-NC-SA 3.0."
    )
