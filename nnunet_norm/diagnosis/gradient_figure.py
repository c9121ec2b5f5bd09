"""The map of the mean absolute gradient on a logarithmic scale, with the receptive fields as boxes."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from nnunet_norm.diagnosis.fields import AXES, Fields
from nnunet_norm.receptive_field import EffectiveField

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
DECADES = 6
"""How far below the largest gradient the colours go, at most."""

WIDEST = 2.2
"""The picture may reach beyond what was measured by this factor, to show the theoretical reach."""

Sides = Sequence[Sequence[int]]
"""(before, after) per axis."""


@dataclass(frozen=True)
class Frame:
    """One box of the figure.

    Attributes:
        name: for the legend.
        sides: (before, after) the output voxel, per axis.
        colour: of the line.
        style: of the line.
    """

    name: str
    sides: Sides
    colour: str
    style: Literal["-", "--"]


def frames_of(fields: Fields, patch: Sequence[int]) -> list[Frame]:
    """Patch, theoretical reach and effective one, as far as they are known."""
    found = [Frame("patch around the voxel", [(p // 2, p - p // 2 - 1) for p in patch], "#777777", "--")]
    if fields.theoretical is not None and fields.unbounded is None:
        found.append(Frame("theoretical receptive field", fields.theoretical.any_voxel, "#d62728", "-"))
    if fields.effective is not None:
        found.append(Frame("effective receptive field (3 sigma)", fields.effective.halo, "#1f77b4", "-"))
    return found


def logarithm(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """log10 of gradients, and the ends of the colour scale; what is 0 is at the lower end."""
    largest = float(values.max())
    top = math.log10(largest)
    positive = values[values > 0]
    bottom = max(math.log10(float(positive.min())), top - DECADES)
    if bottom >= top:
        bottom = top - 1
    return np.log10(np.maximum(values, 10**bottom)), bottom, top


def draw_gradient_map(fields: Fields, patch: Sequence[int], name: str = "", *, with_caption: bool = True) -> Figure:
    """The figure: one panel per plane through the output voxel.

    Args:
        fields: measured; the effective field must be there.
        patch: of the plans, in voxels; the halo's tiles.
        name: of the model, for the caption.
        with_caption: write it below; else it is to be had from ``caption``.

    References:
        Buglakova et al. 2025, figure 4.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    effective = fields.effective
    assert effective is not None
    ndim = effective.gradient.ndim
    planes = list(itertools.combinations(range(ndim), 2)) or [(0, 0)]
    values, bottom, top = logarithm(effective.gradient)
    frames = frames_of(fields, patch)
    shown = [frame for frame in frames if _fits(frame, effective)]
    width = 4.1 * len(planes) + 1.1 if len(planes) > 1 else 6.6
    text = "\n".join(textwrap.wrap(caption(fields, patch, name), int(width * 15.5))) if with_caption else ""
    below = (0.155 * (text.count("\n") + 1) if text else -0.15) + 1.25
    height = (4.3 if len(planes) > 1 else 5.2) + below
    figure = Figure(figsize=(width, height), dpi=DPI)
    places = {
        "left": 0.75 / width,
        "right": 1 - 1.15 / width,
        "top": 1 - 0.35 / height,
        "bottom": (below + 0.35) / height,
    }
    axes = figure.subplots(1, len(planes), squeeze=False, gridspec_kw={**places, "wspace": 0.32})[0]
    for axis, (rows, columns) in zip(axes, planes, strict=True):
        index = tuple(slice(None) if a in (rows, columns) else effective.origin[a] for a in range(ndim))
        plane = values[index] if ndim > 1 else values[None]
        _draw_plane(axis, plane, effective.origin, (rows, columns), (bottom, top), frames, shown)
    colours = figure.colorbar(axes[-1].images[0], cax=_beside(figure, axes[-1]))
    colours.set_label("log10 of the mean |d output / d input|", fontsize=9)
    handles = [Line2D([], [], color=f.colour, linestyle=f.style, label=_label(f)) for f in frames]
    place = (0.2 / width, (below - 1.0) / height)
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=place, fontsize=8.5, frameon=False, borderpad=0)
    figure.text(0.02, 0.08 / height, text, fontsize=8.5, va="bottom")
    return figure


def caption(fields: Fields, patch: Sequence[int], name: str = "") -> str:
    """The caption, which can be understood without anything else; see ``draw_gradient_map``."""
    effective = fields.effective
    assert effective is not None
    planes = "in planes through that voxel" if effective.gradient.ndim > 2 else ""
    extent = " x ".join(map(str, fields.extent))
    text = (
        f"How far one output voxel of {name or fields.network} (at 0, 0) sees: the absolute gradient of the output there "
        f"with respect to the input, {planes or 'per input voxel'}, averaged over {effective.num_gradients} pairs of a real "
        f"tile ({extent} voxels) and a voxel in its middle, on a logarithmic scale (as figure 4 of Buglakova et al. 2025). "
        "The effective receptive field is 3 standard deviations of a Gaussian fitted to that gradient along each axis. "
    )
    if fields.unbounded is not None:
        text += f"The theoretical receptive field is unbounded, because of {fields.unbounded}. "
    elif fields.theoretical is None:
        text += "The theoretical receptive field is not known. "
    if fields.tile_norms:
        norms = " and ".join(fields.tile_norms)
        text += (
            f"{norms} normalizes with the statistics of the whole tile: gradients beyond the theoretical receptive field, "
            "which is that of the convolutions alone, come from there. "
        )
    hidden = [frame.name for frame in frames_of(fields, patch) if not _fits(frame, effective)]
    if hidden:
        text += f"Larger than the picture, in part or wholly: {', '.join(hidden)}."
    return text.strip()


def _draw_plane(
    axis: Axes,
    plane: NDArray[np.float64],
    origin: Sequence[int],
    at: tuple[int, int],
    scale: tuple[float, float],
    frames: Sequence[Frame],
    shown: Sequence[Frame],
) -> None:
    """One plane with the boxes, in voxels from the output voxel; it is as large as those of ``shown``."""
    from matplotlib.patches import Rectangle

    rows, columns = at
    lone = rows == columns  # one axis: a stripe
    y0, x0 = (0 if lone else -origin[rows]), -origin[columns]
    extent = (x0 - 0.5, x0 + plane.shape[1] - 0.5, y0 + plane.shape[0] - 0.5, y0 - 0.5)
    axis.imshow(
        plane, extent=extent, cmap="magma", vmin=scale[0], vmax=scale[1], interpolation="nearest", aspect="equal"
    )
    axis.set_facecolor("#f2f2f2")
    limits = [extent[0], extent[1], extent[3], extent[2]]
    for frame in frames:
        (left, right), (above, below) = frame.sides[columns], (0, 0) if lone else frame.sides[rows]
        box = Rectangle((-left - 0.5, -above - 0.5), left + right + 1, above + below + 1, fill=False, linewidth=1.6)
        box.set(edgecolor=frame.colour, linestyle=frame.style)
        axis.add_patch(box)
        if frame in shown and not lone:
            wanted = (-left - 2.5, right + 2.5, -above - 2.5, below + 2.5)
            limits = [pick(a, b) for pick, a, b in zip((min, max, min, max), limits, wanted, strict=True)]
    axis.set_xlim(limits[0], limits[1])
    axis.set_ylim(limits[3], limits[2])
    axis.set_xlabel(f"{AXES[columns]}: voxels from the output voxel", fontsize=9)
    axis.set_ylabel("" if lone else f"{AXES[rows]}: voxels from the output voxel", fontsize=9)
    axis.tick_params(labelsize=8)


def _fits(frame: Frame, effective: EffectiveField) -> bool:
    """Whether the box is not so large that what was measured would be a spot in it."""
    return all(
        side <= WIDEST * (measured + 1)
        for (before, after), n, origin in zip(frame.sides, effective.gradient.shape, effective.origin, strict=True)
        for side, measured in ((before, origin), (after, n - 1 - origin))
    )


def _label(frame: Frame) -> str:
    sides = ", ".join(f"{AXES[a]} {before}/{after}" for a, (before, after) in enumerate(frame.sides))
    return f"{frame.name}: {sides}"


def _beside(figure: Figure, axis: Axes) -> Axes:
    """A place for the colour bar, right of the last panel and as high."""
    place = axis.get_position()
    width = figure.get_figwidth()
    return figure.add_axes((place.x1 + 0.15 / width, place.y0, 0.13 / width, place.height))
