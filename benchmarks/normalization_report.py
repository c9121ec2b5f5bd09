"""The report of ``normalization.py``: what its tables mean, a verdict, and the file with its numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from normalization_figures import draw_batches, draw_modes, draw_tiles, draw_transfer
from normalization_measure import MOST_GHOST_PATCHES, MOST_PATCHES
from normalization_settings import NORMALIZATION_BATCHES, ROWS
from normalization_tables import (
    BLENDED,
    WHOLE,
    batches_table,
    best_way,
    differences,
    in_seeds,
    means,
    modes_table,
    of_runs,
    seams_table,
    shown,
    tiles_table,
    transfer_table,
    whole_table,
)
from reporting import table

from nnunet_norm.training.trainer import LARGE_DISPARITY
from nnunet_norm.writing import write_json, written_beside

INSTANCE_NORM_BY = {
    None: "which is not measured yet",
    WHOLE: "by the whole image's statistics, which for InstanceNorm is the better of both over the seeds that are measured",
    BLENDED: "in blended tiles, which for InstanceNorm is the better of both over the seeds that are measured",
}

NOTES = {
    "modes": """\
Patches as large as in training, side by side over all validation images, in a random but fixed order and the same batches
in each mode, as many patches as in a training batch. Eval: the norms' running statistics (the patch's own for
InstanceNorm and GroupNorm). Train: the statistics of the batch, for BatchRenorm and FrozenBN as at the end of their
training. Disparity: 1 - Dice between both modes; *against the batch alone*: between eval mode and plain batch statistics,
where train mode has others. Dice of all patches together; means over the classes, without a class that is neither in the
labels nor predicted (for disparity: that neither mode predicts).""",
    "seams": """\
The same voxels predicted from two tiles, at least the halo of the network's convolutions away from every inner side
(UNETR sees all of a tile: its predictor's halo). Mismatch: median over the pairs of 1 - Dice. Max dist: largest
difference of any logit; "no" where it is zero or rounding. Tile and halo: of the last image. Networks with InstanceNorm
and GroupNorm use the tile's statistics here; by default this package's predictor takes those of the whole image instead:
the last column is what the trainings' own validation found.""",
    "whole": """\
Nothing mirrored; Dice of all validation images together. Halo predictor: as one pass over the whole image, with its
statistics for InstanceNorm and GroupNorm; tile quantiles and UNETR in tiles of the patch. Blending: nnU-Net's predictor,
tiles of the patch with step 0.5, where a prediction depends on the tiles. Less InstanceNorm: the halo predictor's mean less
that of InstanceNorm of the same seed, {best}.""",
    "tiles": """\
Tiles without overlap but for the halo, which is that of the convolutions and at most a quarter of a tile, each normalized
with its own statistics where the norm has no others. Mean over the classes; the last column is the whole image, "-" where
the network is always predicted in tiles.""",
    "batches": """\
GhostBN normalizes parts of a training batch by themselves, as several GPUs would; all else is the same; on at most {ghost}
patches. Below: networks trained at the batch of the table above, their train mode with other batches, on at most {most}
patches.""",
    "transfer": """\
Dice of membranes. Own: this dataset's validation images. Other images: as trained, and with running statistics
re-estimated on the other dataset's training images without their labels (`nnunet-norm recalibrate`; adaptive batch
normalization). Trained there: the same row of the other setting on its own images, if that was measured. Images of 2d
settings have no spacing, so they are not resampled (VNC: 4.6 nm a pixel, ISBI 2012: 4.0 nm); those of 3d ones are.""",
}


def write_report(result: dict[str, Any], path: Path) -> None:
    """JSON, Markdown and figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result, indent=2)
    rows = rows_of(result)
    figures = {}
    for name, draw in (("", draw_modes), ("tiles", draw_tiles), ("batches", draw_batches), ("transfer", draw_transfer)):
        file = path.with_name(f"{path.stem}{'_' * bool(name)}{name}.png")
        figures[name] = f"![{name or 'modes'}]({file.name})" if draw(rows, result, file) else ""
    there = path.with_name(f"normalization_{result['other']}.json")
    other = rows_of(json.loads(there.read_text())) if result["other"] and there.exists() else {}
    text = markdown(result, rows, figures, other)
    with written_beside(path.with_suffix(".md")) as beside:
        beside.write_text(text, encoding="utf-8")
    print(text)


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per row what was measured, by seed; rows of which nothing is known are empty."""
    return {row: {seed: found for seed, found in result["trained"].get(row, {}).items() if found} for row in ROWS} | {
        str(size): {seed: found for seed, found in result["trained"].get(str(size), {}).items() if found}
        for size in NORMALIZATION_BATCHES
    }


def markdown(result: dict[str, Any], rows: dict[str, Any], figures: dict[str, str], other: dict[str, Any]) -> str:
    """The report."""
    own, seeds = {row: rows[row] for row in ROWS}, len(result["seeds"])
    words = {"best": INSTANCE_NORM_BY[best_way(own)], "ghost": MOST_GHOST_PATCHES, "most": MOST_PATCHES}
    notes = {kind: note.format(**words) for kind, note in NOTES.items()}
    batches, transfer = batches_table(rows, seeds), transfer_table(own, other, seeds)
    parts = [
        f"# Norms on {result['setting']}",
        f"`{result['command']}`",
        about(result),
        verdict(own),
        figures[""],
        *section("Modes of the norms", notes["modes"], modes_table(own, seeds)),
        *section("Seams", notes["seams"], seams_table(own, seeds)),
        *section("Whole images", notes["whole"], whole_table(own, seeds)),
        *section("Size of the tiles", notes["tiles"], tiles_table(own, seeds), figures["tiles"]),
        *section("Size of the batch that normalizes", notes["batches"], batches, figures["batches"]),
        *section(f"Images of {result['other']}", notes["transfer"], transfer, figures["transfer"]),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def section(title: str, note: str, cells: list[list[str]], figure: str = "") -> list[str]:
    """A table under its title; nothing where nothing was measured."""
    return [f"## {title}", note, table(cells), figure] if len(cells) > 1 else []


def about(result: dict[str, Any]) -> str:
    """What was trained, on what."""
    told = result["machine"] | result["versions"]
    network = f"- network: {result['network']}"
    if result["ghost_network"]:
        network += f"; for the size of the batch that normalizes: {result['ghost_network']}"
    length = f"- training: `nnUNetv2_train`, {result['epochs']} epochs of {result['iterations']} iterations; seeds "
    lines = [f"- {key}: {json.dumps(value)}" for key, value in told.items()]
    cases = ", ".join(f"{number} cases {role}" for role, number in result["cases"].items())
    lines += [
        f"- dataset: {result['dataset']}, {result['configuration']}; {cases}. {result['images']}".strip(),
        network,
    ]
    lines += [
        length + ", ".join(map(str, result["seeds"])) + "; in brackets: from the least to the most over the seeds"
    ]
    return "\n".join([*lines, *([f"- {result['note']}"] if result["note"] else [])])


def verdict(rows: dict[str, Any]) -> str:
    """BatchRenorm against InstanceNorm, and BatchNorm's two modes, in words."""
    lines = []
    whole, blended = (differences(rows, "BatchRenorm", way) for way in (WHOLE, BLENDED))
    if whole:
        lines.append(
            f"BatchRenorm less InstanceNorm, mean Dice of whole images{paired(whole)}: {shown(whole, '+.3f')} against "
            f"InstanceNorm by the halo predictor, {shown(blended, '+.3f')} against nnU-Net's blended tiles."
        )
    for row in ("BatchNorm", "BatchRenorm", "PreciseBN", "FrozenBN"):
        found = means(of_runs(rows[row], "tables", "modes", "disparity", "train"))
        values = [value for value in found if value is not None]
        if values:
            size = next(each for each in of_runs(rows[row], "tables", "modes", "batch_size") if each)
            large = "above" if mean(values) > LARGE_DISPARITY else "below"
            lines.append(
                f"Disparity of {row} at batch {size}: {shown(values)}, {large} {LARGE_DISPARITY} ({in_seeds(len(values))})."
            )
    return " ".join(lines)


def paired(found: Sequence[float]) -> str:
    """What differences are over."""
    return " (1 seed)" if len(found) == 1 else f", paired by seed ({in_seeds(len(found))})"
