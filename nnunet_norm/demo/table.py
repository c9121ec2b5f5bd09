"""The demo's table: one row per norm and way to predict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813

from nnunet_norm.demo.data import LABELS, SIMULATED
from nnunet_norm.demo.tilings import GAUSSIAN, HALO, HALO_SIZE, SHIFT, TILE_SIZE
from nnunet_norm.metrics import dice
from nnunet_norm.pages import markdown_table
from nnunet_norm.writing import written_beside

HEADER = (
    "norm",
    "prediction",
    "Dice grey",
    "Dice white",
    "train/eval disparity",
    "tile mismatch",
    "max dist",
    "labels changed",
    "seconds",
)

EXPLANATION = (
    "Train/eval disparity (1 - Dice of the same tiles in train and in eval mode) says whether a network predicts with the "
    "statistics that it learned with. Tile mismatch (median of 1 - Dice of the same voxels predicted from two tiles) and max "
    'dist say whether the result depends on where the tiles lie: "no" is what a seamless prediction has.'
)
"""What the numbers mean, in two sentences."""


@dataclass(frozen=True)
class Row:
    """What one model predicts in one way.

    Attributes:
        norm: ``InstanceNorm`` or ``BatchRenorm``.
        way: how the tiles are put together.
        dice: of the test image, grey and white matter.
        disparity: mean train/eval disparity in the final validation.
        mismatch: mean over the tissues of the median tile mismatch.
        verdict: max dist in words.
        changed: share of the voxels that get another label when the tiles move.
        seconds: for one window of the test image.
    """

    norm: str
    way: str
    dice: Sequence[float]
    disparity: float | None
    mismatch: float
    verdict: str
    changed: float
    seconds: float

    def cells(self) -> list[str]:
        """The row as text."""
        return [
            self.norm,
            self.way,
            *(f"{value:.3f}" for value in self.dice),
            "not measured" if self.disparity is None else f"{self.disparity:.4f}",
            "0" if self.mismatch == 0 else f"{self.mismatch:.4f}",
            self.verdict,
            "none" if self.changed == 0 else f"{self.changed:.2%}",
            f"{self.seconds:.1f}",
        ]


def dice_per_tissue(prediction: Path, reference: Path) -> list[float]:
    """Dice of grey and white matter of two label images."""
    masks = [
        np.stack([_read(path) == label for label in LABELS.values() if label])[None] for path in (prediction, reference)
    ]
    return [float(value) for value in dice(*masks)]


def _read(path: Path) -> npt.NDArray[np.generic]:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def rows_of(
    norm: str, numbers: Mapping[str, Mapping[str, Any]], dices: Mapping[str, Sequence[float]], report: Path
) -> list[Row]:
    """The rows of one model.

    Args:
        norm: its name.
        numbers: per way, what :func:`nnunet_norm.demo.tilings.measure` found.
        dices: per way, Dice of the tissues.
        report: ``norm_report.json`` of its final validation.
    """
    disparity = json.loads(report.read_text(encoding="utf-8"))["train_eval_disparity"]["mean"]
    rows = []
    for way in (GAUSSIAN, HALO):
        found = numbers[way]
        rows.append(
            Row(
                norm=norm,
                way=way,
                dice=dices[way],
                disparity=disparity,
                mismatch=mean(found["mismatch"]),
                verdict=found["verdict"],
                changed=found["changed"],
                seconds=found["seconds"],
            )
        )
    return rows


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table whose columns also line up in a terminal."""
    return markdown_table(HEADER, [row.cells() for row in rows])


def table_of(path: Path) -> str:
    """The table alone, out of the file that :func:`write_table` wrote."""
    return path.read_text(encoding="utf-8").split("\n\n")[0]


def notes() -> str:
    """What stands below the table: how it came about."""
    return (
        f"Tiles of {TILE_SIZE} x {TILE_SIZE} voxels, the patch of the training; the halo predictor cuts {HALO_SIZE} voxels "
        "off at every side, nnU-Net's blends with a step of half a tile; neither mirrors. Tile mismatch, max dist (of "
        "logits) and labels changed compare two predictions of the test image whose tile grids are shifted by "
        f"{SHIFT} voxels, box by box. Seconds are those of the tiles alone, without loading and export. InstanceNorm "
        "normalizes in the same way in train and in eval mode, so its disparity is 0 by construction; that of BatchRenorm is "
        "near 0 once its limits are open, if its running statistics are good. Cases are scaled to 0..1 by their own "
        "extremes; with z-scores, which depend on the air in a slab, BatchRenorm was worse than InstanceNorm on the test "
        "slab. One seed and minutes of training: differences of Dice are no benchmark."
    )


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the table with its notes, beside ``path`` first."""
    text = "\n\n".join([as_markdown(rows), SIMULATED, notes(), EXPLANATION]) + "\n"
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")
