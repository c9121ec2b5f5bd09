"""What the numbers of a diagnosis say, in one sentence: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nnunet_norm.metrics import TileMismatch

HIGH_DISPARITY = 0.1
"""Above it the statistics of the training and those of the inference disagree; the trainers warn there, too."""

WORSE = 0.005
"""Mean Dice by which the whole image's statistics may fall behind before they are no longer the first advice."""

PROBLEM, NO_PROBLEM, UNKNOWN = "problem", "no problem", "not measured"


@dataclass(frozen=True)
class Findings:
    """The numbers that decide.

    Attributes:
        tile_norms: number of layers that normalize with statistics of the tile; None if that is not known.
        norm: what normalizes so, or what normalizes at all, for the user: "InstanceNorm3d".
        of_tiles: mismatch of tiles.
        of_blocks: mismatch of the prediction stage by stage; without pairs if there is none.
        halo_is_exact: whether the tiles' halo covers the theoretical receptive field.
        in_stages: whether nnunet-norm predict can run the network stage by stage, as one pass over the whole image.
        labels_changed: share of voxels that have another label in nnU-Net's prediction with the plans' patch than in that of
            the whole image; None if not measured.
        larger_than_patch: whether any image is larger than the patch.
        disparity: mean train/eval disparity; NaN if not measured.
        dice_nnunet: mean Dice of nnU-Net's prediction with the labels; None without labels.
        dice_whole: the same for the whole image.
        normalizes_tiles: whether the network normalizes its input by the quantiles of every tile.
    """

    tile_norms: int | None
    norm: str
    of_tiles: TileMismatch
    of_blocks: TileMismatch
    halo_is_exact: bool
    in_stages: bool
    labels_changed: float | None
    larger_than_patch: bool
    disparity: float
    dice_nnunet: float | None = None
    dice_whole: float | None = None
    normalizes_tiles: bool = False


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        kind: ``PROBLEM``, ``NO_PROBLEM`` or ``UNKNOWN``.
        sentence: plain, with what to do.
    """

    kind: str
    sentence: str


def verdict_of(found: Findings) -> Verdict:
    """Whether the model has a normalization problem, and what to do."""
    problems = [
        text for text in (_faulty_stages(found), _depends_on_tiles(found), _disagrees_with_training(found)) if text
    ]
    if problems:
        return Verdict(PROBLEM, " ".join(problems))
    missing = _not_measured(found)
    if missing:
        return Verdict(UNKNOWN, f"Not everything could be measured: {'; '.join(missing)}.")
    return Verdict(NO_PROBLEM, _all_is_well(found))


def _faulty_stages(found: Findings) -> str | None:
    blocks = found.of_blocks
    if not blocks.num_pairs or not _differs(blocks):
        return None
    return (
        "The prediction stage by stage depends on its blocks, which it should not with any norm (max dist "
        f"{blocks.verdict}): use nnunet-norm predict --execution tiles, and report it."
    )


def _depends_on_tiles(found: Findings) -> str | None:
    """For a network whose norms see the tile."""
    if not found.tile_norms or not found.of_tiles.num_pairs or not _differs(found.of_tiles):
        return None
    worst = _worst(found.of_tiles)
    numbers = [f"max dist {found.of_tiles.verdict}"]
    numbers += [f"1 - Dice of two tiles up to {worst:.3f}"] if not math.isnan(worst) else []
    if found.labels_changed is not None and found.larger_than_patch:
        numbers.append(
            f"{share(found.labels_changed)} of the labels differ between nnU-Net's tiles and the whole image"
        )
    where = "" if found.larger_than_patch else " (in images larger than the patch, which none of these is)"
    cause = f"{found.norm} normalizes with the statistics of each tile"
    if found.normalizes_tiles:
        cause = "it normalizes every tile by its own quantiles (input_normalization tile_quantile)"
    return f"Predictions of this model depend on the tile{where}: {cause} ({', '.join(numbers)}). {_instead_of_tiles(found)}"


def _instead_of_tiles(found: Findings) -> str:
    """What to do about tiles; the whole image's statistics are not advised where labels say that they are worse."""
    if found.normalizes_tiles:
        return "Train with the quantiles of the whole image: nnunet-norm plan --input-normalization image_quantile."
    if not found.in_stages:
        return (
            "This network cannot be run stage by stage, so it cannot have the statistics of the whole image: train "
            "nnUNetTrainerBRN, whose statistics are stored."
        )
    if found.dice_nnunet is None or found.dice_whole is None:
        return (
            "Predict with nnunet-norm predict, which uses the statistics of the whole image, or train nnUNetTrainerBRN."
        )
    dice = f"Dice {found.dice_whole:.3f} instead of {found.dice_nnunet:.3f} on these images"
    if found.dice_whole < found.dice_nnunet - WORSE:
        return (
            "Train nnUNetTrainerBRN, whose statistics are stored; nnunet-norm predict, which uses the statistics of the "
            f"whole image, removes the dependence, too, but scores lower ({dice})."
        )
    whole = f"which uses the statistics of the whole image ({dice})"
    return f"Predict with nnunet-norm predict, {whole}, or train nnUNetTrainerBRN."


def _disagrees_with_training(found: Findings) -> str | None:
    if math.isnan(found.disparity) or found.disparity <= HIGH_DISPARITY:
        return None
    other = (
        "open its limits further (nnunet-norm plan --batch-renorm) and train again"
        if "BatchRenorm" in found.norm
        else "train nnUNetTrainerPreciseBN or nnUNetTrainerBRN"
    )
    return (
        f"The statistics with which {found.norm} predicts are not those that it was trained with (train/eval disparity "
        f"{found.disparity:.2f}, above {HIGH_DISPARITY}): re-estimate them with nnunet-norm recalibrate, or {other}."
    )


def _not_measured(found: Findings) -> list[str]:
    missing = []
    if found.tile_norms is None:
        missing.append("which norms see the tile is not known, since the network could not be traced")
    if not found.of_tiles.num_pairs and (found.tile_norms or found.tile_norms is None):
        missing.append(
            "whether predictions depend on the tile, since no image has two tiles that overlap (give larger images with -i)"
        )
    if math.isnan(found.disparity):
        missing.append("train/eval disparity, since neither mode predicts anything on these images")
    return missing


def _all_is_well(found: Findings) -> str:
    disparity = f"train and eval mode agree (disparity {found.disparity:.4f})"
    if not found.tile_norms:
        statistics = "nothing in it normalizes" if found.norm == "no norm" else f"{found.norm} has stored statistics"
        tiles = f"{statistics}, the same for every tile"
        if found.of_tiles.num_pairs and _differs(found.of_tiles):
            tiles += (
                f" (what differs between tiles, max dist {found.of_tiles.verdict}, comes from a halo smaller than the "
                "receptive field: nnunet-norm predict has none of it)"
                if found.in_stages and not found.halo_is_exact
                else f" (yet tiles differ, max dist {found.of_tiles.verdict}, through something that is no norm)"
            )
    else:
        tiles = f"two tiles predict the same although {found.norm} sees the tile (max dist: {found.of_tiles.verdict})"
    return f"No normalization problem was found: {tiles}, and {disparity}."


def _differs(mismatch: TileMismatch) -> bool:
    """By more than rounding; also if it is not finite."""
    return bool(mismatch.max_dist) and not mismatch.is_rounding


def _worst(mismatch: TileMismatch) -> float:
    present = [value for value in mismatch.per_class if not math.isnan(value)]
    return max(present) if present else math.nan


def share(part: float) -> str:
    """A share for the user: ``none``, ``0.034 %``, ``2.1 %``."""
    return "none" if part == 0 else f"{100 * part:.3g} %"
