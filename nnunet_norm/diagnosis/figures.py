"""Figures of a diagnosis as PNG: Dice against tile size, and where labels change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
MOST_CLASSES = 8
"""Classes that get a line of their own; more would be a tangle."""


DIFFERENT = "#ff00c8"
"""Colour of voxels whose labels differ; no class has it."""


def draw_tile_sizes(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], patch: Sequence[int]) -> Figure:
    """Dice against tile size, with the labels if there are any, and with the prediction of the whole image.

    Args:
        rows: as ``dice_against_tile_size`` of the diagnosis: ``tile_size`` (None for the whole image), ``dice`` and
            ``agreement`` per class, or None.
        classes: their names.
        patch: of the plans.
    """
    from matplotlib.figure import Figure

    panels = [
        (key, title)
        for key, title in (
            ("dice", "Dice with the labels"),
            ("agreement", "Dice with the prediction of the whole image"),
        )
        if any(row[key] is not None for row in rows)
    ]
    figure = Figure(figsize=(5.2 * len(panels) + 1.2, 3.9), dpi=DPI)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, title) in zip(axes, panels, strict=True):
        _lines(axis, [row for row in rows if row[key] is not None], key, classes, patch)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("Dice", fontsize=9)
    axes[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def _lines(
    axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, classes: Sequence[str], patch: Sequence[int]
) -> None:
    """A line per class and one for their mean, over sizes in equal steps."""
    from matplotlib import colormaps

    places = range(len(rows))
    for number, name in enumerate(classes[:MOST_CLASSES] if len(classes) <= MOST_CLASSES else []):
        values = [_or_nan(row[key].get(name)) for row in rows]
        axis.plot(places, values, marker="o", markersize=4, linewidth=1, color=colormaps["tab10"](number), label=name)
    means = [_mean(row[key].values()) for row in rows]
    axis.plot(places, means, marker="s", markersize=5, linewidth=2, color="black", label="mean")
    axis.set_xticks(list(places), [_size(row["tile_size"], patch) for row in rows], fontsize=8)
    axis.set_xlabel("tile size in voxels", fontsize=9)
    axis.set_xlim(-0.3, len(rows) - 0.7)
    axis.grid(axis="y", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw_change(picture: Mapping[str, Any], case: str, classes: Sequence[str]) -> Figure:
    """One slice: the image, both predictions, and where they differ.

    Args:
        picture: ``image``, ``tiles``, ``whole``, ``changed`` and ``reference`` (None without labels), each (y, z), and the
            number of the slice.
        case: its name.
        classes: names, in the order of the labels from 1.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    image = np.asarray(picture["image"], dtype=float)
    panels: list[tuple[str, Any]] = [(f"{case}, slice {picture['slice'] + 1} of {picture['slices']}", None)]
    panels += [("labels", picture["reference"])] if picture["reference"] is not None and classes else []
    panels += [("nnU-Net's tiles", picture["tiles"]), ("whole image", picture["whole"])]
    panels += [("where they differ", "changed")]
    height = 2.9 * min(max(image.shape[0] / image.shape[1], 0.45), 1.6)
    figure = Figure(figsize=(2.9 * len(panels), height + 0.75), dpi=DPI)
    axes = figure.subplots(1, len(panels))
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.3 / (height + 0.75), bottom=0.42 / (height + 0.75), wspace=0.04
    )
    colours = [_colour(number) for number in range(len(classes))]
    low, high = np.percentile(image, [1, 99])
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.imshow(image, cmap="gray", vmin=low, vmax=high if high > low else low + 1, interpolation="nearest")
        if isinstance(values, str):
            axis.images[0].set_alpha(0.45)
            mask = np.ma.masked_equal(np.asarray(picture["changed"]).astype(np.uint8), 0)
            axis.imshow(mask, cmap=ListedColormap([DIFFERENT]), interpolation="nearest")
        elif values is not None:
            shown = np.ma.masked_less_equal(np.asarray(values), 0)
            norm = BoundaryNorm(np.arange(0.5, len(classes) + 1), len(classes)) if len(classes) > 1 else None
            axis.imshow(shown, cmap=ListedColormap(colours), norm=norm, alpha=0.75, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, classes, strict=True)][:MOST_CLASSES]
    handles.append(Patch(color=DIFFERENT, label="label differs"))
    figure.legend(handles=handles, ncols=len(handles), loc="lower center", fontsize=8, frameon=False)
    return figure


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10" if number < 10 else "tab20"](number % 20)


def _size(size: Sequence[int] | None, patch: Sequence[int]) -> str:
    if size is None:
        return "whole\nimage"
    text = str(size[0]) if len(set(size)) == 1 else " x ".join(map(str, size))
    return f"{text}\n(patch)" if tuple(size) == tuple(patch) else text


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: Any) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else float("nan")
