"""The demo's figure: what moving the tiles does to a prediction."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nnunet_norm.demo.data import LABELS
from nnunet_norm.demo.tilings import HALO_SIZE, SHIFT, TILE_SIZE, Grid
from nnunet_norm.tiling import Box
from nnunet_norm.writing import written_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]

GREY, WHITE = LABELS["grey matter"], LABELS["white matter"]

ZOOM = (60, 50)
"""Extent (y, x) of the enlarged part, in voxels (mm); the proportions of what the two windows share."""

WIDTH, DPI = 12.0, 150
"""Inches and dots per inch: 1800 pixels wide."""

FIRST_GRID, SECOND_GRID = "#4aa8ff", "#ff9f1c"


@dataclass(frozen=True)
class Picture:
    """What the figure shows of one test slice, all in the slice's voxels ``(y, x)``.

    Attributes:
        image: intensities as the network sees them.
        reference: labels.
        tilings: per norm the logits in both tilings, ``(2, C, y, x)``, NaN outside of each window.
        verdicts: per norm, max dist in words.
    """

    image: Array
    reference: npt.NDArray[np.uint8]
    tilings: Mapping[str, Array]
    verdicts: Mapping[str, str]

    @property
    def grid(self) -> Grid:
        """Windows and tiles."""
        return Grid(self.image.shape)

    def probabilities(self, norm: str) -> Array:
        """Softmax over the classes of both tilings."""
        logits = self.tilings[norm]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def difference(self, norm: str) -> Array:
        """Largest change of any class's probability between the two tilings, NaN where not both see the image."""
        first, second = self.probabilities(norm)
        result = np.full(self.image.shape, np.nan, dtype=np.float32)
        result[self.grid.common] = np.abs(first - second).max(0)[self.grid.common]
        return result

    def seams(self, norm: str) -> Array:
        """How much more the probabilities jump across a border of the first tiling than in the second, which has none there.

        Zero off the borders and where the second jumps more, so that edges of the anatomy, which are in both, do not count.
        """
        y, x = self.grid.common
        first, second = self.probabilities(norm)
        result = np.zeros(self.image.shape, dtype=np.float32)
        rows, columns = boundaries(self.grid.cores(0), self.grid.common)
        for row in rows:
            jumps = [np.abs(p[:, row, x] - p[:, row - 1, x]).max(0) for p in (first, second)]
            result[row, x] += np.maximum(jumps[0] - jumps[1], 0)
        for column in columns:
            jumps = [np.abs(p[:, y, column] - p[:, y, column - 1]).max(0) for p in (first, second)]
            result[y, column] += np.maximum(jumps[0] - jumps[1], 0)
        return result


def boundaries(cores: Iterable[Box], within: Box) -> tuple[list[int], list[int]]:
    """Where cores meet inside of ``within``: positions on the y axis and on the x axis."""
    every = list(cores)
    positions = [sorted({core[axis].start for core in every}) for axis in range(2)]
    y, x = ([p for p in of_axis if side.start < p < side.stop] for of_axis, side in zip(positions, within, strict=True))
    return y, x


def worst_place(values: Array, within: Box, size: tuple[int, int]) -> Box:
    """The box of ``size`` inside of ``within`` in which ``values`` have the largest sum."""
    sums = np.pad(values[within].cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    h, w = size
    boxes = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
    corner = np.unravel_index(int(boxes.argmax()), boxes.shape)
    return tuple(
        slice(side.start + int(c), side.start + int(c) + n) for side, c, n in zip(within, corner, size, strict=True)
    )


def draw(picture: Picture) -> "Figure":
    """The figure: image and reference, then one row of maps per norm."""
    from matplotlib.figure import Figure

    common = picture.grid.common
    zoom = worst_place(picture.seams(next(iter(picture.tilings))), common, ZOOM)
    figure = Figure(figsize=(WIDTH, 8.5), dpi=DPI)
    places = {"left": 0.045, "right": 0.92, "top": 0.955, "bottom": 0.2, "wspace": 0.2, "hspace": 0.14}
    axes = figure.subplots(2, 4, gridspec_kw=places)
    _show(axes[0, 0], picture.image, common, "unseen slice (simulated T1 scan)", cmap="gray")
    _show(axes[1, 0], picture.reference, common, "reference: grey and white matter", cmap="gray")
    scale = float(max(np.nanmax(picture.difference(norm)) for norm in picture.tilings))
    for row, norm in zip(axes, picture.tilings, strict=True):
        _draw_norm(row[1:], picture, norm, zoom, scale or 1.0)
        row[0].set_ylabel("y in mm")
    for axis in axes[-1]:
        axis.set_xlabel("x in mm")
    bar = figure.add_axes((0.945, 0.2, 0.011, 0.73))
    figure.colorbar(axes[0, 3].images[0], cax=bar).set_label("largest change of a class probability", fontsize=9)
    figure.text(0.045, 0.01, "\n".join(textwrap.wrap(caption(picture), 168)), fontsize=9, va="bottom")
    return figure


def _draw_norm(row: "npt.NDArray[Any]", picture: Picture, norm: str, zoom: Box, scale: float) -> None:
    """One row: the network's output, a part of it enlarged, and the change under a shift of the tiles."""
    common, cores = picture.grid.common, picture.grid.cores(0)
    first = picture.tilings[norm][0]
    margin = first[WHITE] - first[GREY]
    spread = float(np.nanpercentile(np.abs(margin[common]), 98))
    _show(row[0], margin, common, f"{norm}: logits, white - grey", cmap="PuOr_r", vmin=-spread, vmax=spread)
    _marks(row[0], cores, common)
    _frame(row[0], zoom)
    _show(row[1], margin, zoom, f"{norm}: enlarged", cmap="PuOr_r", vmin=-spread, vmax=spread)
    labels = np.nan_to_num(first).argmax(0)
    for label in (GREY, WHITE):
        y, x = (np.arange(side.start, side.stop) for side in zoom)
        row[1].contour(x, y, labels[zoom] == label, levels=[0.5], colors="black", linewidths=0.7)
    _marks(row[1], cores, zoom)
    change = picture.difference(norm)
    _show(row[2], change, common, f"{norm}: change when tiles move", cmap="inferno", vmin=0, vmax=scale)
    _marks(row[2], cores, common)
    _marks(row[2], picture.grid.cores(SHIFT), common, SECOND_GRID)
    largest = float(np.nanmax(change))
    words = "0 everywhere" if largest == 0 else f"up to {largest:.2g}"
    row[2].text(0.03, 0.03, words, transform=row[2].transAxes, color="white", fontsize=11, fontweight="bold")


def _show(axis: "Axes", values: npt.NDArray[Any], box: Box, title: str, **options: Any) -> None:
    """The part ``box`` of a slice, with voxel centres at their coordinates and the nose upwards."""
    y, x = box
    extent = (x.start - 0.5, x.stop - 0.5, y.start - 0.5, y.stop - 0.5)
    axis.imshow(values[box], origin="lower", extent=extent, interpolation="nearest", **options)
    axis.set_title(title, fontsize=9, pad=9)
    axis.tick_params(labelsize=8)


def _marks(axis: "Axes", cores: Iterable[Box], box: Box, colour: str = FIRST_GRID) -> None:
    """Marks outside of the picture where tiles meet: a line across it would look like the seam that it points to."""
    y, x = boundaries(cores, box)
    for position in y:
        at = (position - box[0].start) / (box[0].stop - box[0].start)
        axis.plot([1.0, 1.04], [at, at], transform=axis.transAxes, color=colour, linewidth=1.6, clip_on=False)
    for position in x:
        at = (position - box[1].start) / (box[1].stop - box[1].start)
        axis.plot([at, at], [1.0, 1.03], transform=axis.transAxes, color=colour, linewidth=1.6, clip_on=False)


def _frame(axis: "Axes", box: Box) -> None:
    from matplotlib.patches import Rectangle

    y, x = box
    size = (x.stop - x.start, y.stop - y.start)
    axis.add_patch(Rectangle((x.start - 0.5, y.start - 0.5), *size, fill=False, color="red", linewidth=1))


def caption(picture: Picture) -> str:
    """The caption, which can be understood without anything else."""
    verdicts = "; ".join(f"{norm}: {verdict}" for norm, verdict in picture.verdicts.items())
    return (
        "The same U-Net, trained for the same number of steps on the same cases with InstanceNorm (above) and with "
        "BatchRenorm (below), predicts a brain slab that it has not seen, in tiles of "
        f"{TILE_SIZE} x {TILE_SIZE} voxels of which a halo of {HALO_SIZE} voxels is cut away (the network's receptive field; "
        "nothing is blended). Blue marks: where tiles meet. Second column: difference of two of the network's outputs "
        "(logits), white minus grey matter, each row on its own scale. The red box lies where InstanceNorm's seams are "
        "strongest, and is enlarged beside it with the outlines of the predicted labels. Last column: a second prediction "
        f"with all tiles moved by {SHIFT} voxels (orange marks) should be the same; shown is, per voxel, the largest change "
        "of any class's probability, on one scale for both norms. Largest difference of the logits anywhere in the slab: "
        f"{verdicts}. Images: ICBM152 template, with simulated contrast, bias field and noise."
    )


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG, beside ``path`` first."""
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")
