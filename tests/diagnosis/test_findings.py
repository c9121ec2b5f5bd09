import math
from dataclasses import replace

import pytest

from nnunet_norm.diagnosis import Findings, verdict_of
from nnunet_norm.diagnosis.findings import NO_PROBLEM, PROBLEM, UNKNOWN, share
from nnunet_norm.metrics import TileMismatch

NOT_MEASURED = TileMismatch((), None, 0.0, 0, "float32")
SAME = TileMismatch((0.0, math.nan), 0.0, 10.0, 12, "float32")
ROUNDING = TileMismatch((0.0, 0.0), 1e-5, 10.0, 12, "float32")
DIFFERENT = TileMismatch((0.04, 0.07, math.nan), 8.14, 30.0, 12, "float32")

INSTANCE = Findings(
    tile_norms=22,
    norm="InstanceNorm2d",
    of_tiles=DIFFERENT,
    of_blocks=ROUNDING,
    halo_is_exact=False,
    in_stages=True,
    labels_changed=0.0247,
    larger_than_patch=True,
    disparity=0.0,
)
STORED = replace(INSTANCE, tile_norms=0, norm="BatchRenorm2d", of_tiles=SAME, of_blocks=SAME, labels_changed=0.0)


@pytest.mark.parametrize(
    ("found", "kind", "words"),
    [
        (
            INSTANCE,
            PROBLEM,
            "InstanceNorm2d normalizes with the statistics of each tile (max dist 8.14, 1 - Dice of two",
        ),
        (INSTANCE, PROBLEM, "tiles up to 0.070, 2.47 % of the labels differ"),
        (
            replace(INSTANCE, normalizes_tiles=True),
            PROBLEM,
            "it normalizes every tile by its own quantiles (input_norm",
        ),
        (
            replace(INSTANCE, normalizes_tiles=True),
            PROBLEM,
            "Train with the quantiles of the whole image: nnunet-norm pl",
        ),
        (INSTANCE, PROBLEM, "Predict with nnunet-norm predict, which uses the statistics of the whole image, or train"),
        (replace(INSTANCE, dice_nnunet=0.7, dice_whole=0.71), PROBLEM, "whole image (Dice 0.710 instead of 0.700 on"),
        (
            replace(INSTANCE, dice_nnunet=0.71, dice_whole=0.7),
            PROBLEM,
            "Train nnUNetTrainerBRN, whose statistics are sto",
        ),
        (replace(INSTANCE, dice_nnunet=0.71, dice_whole=0.7), PROBLEM, "scores lower (Dice 0.700 instead of 0.710 on"),
        (replace(INSTANCE, in_stages=False), PROBLEM, "cannot be run stage by stage, so it cannot have the statistics"),
        (replace(INSTANCE, larger_than_patch=False), PROBLEM, "(in images larger than the patch, which none of these"),
        (replace(INSTANCE, of_tiles=ROUNDING), NO_PROBLEM, "two tiles predict the same although InstanceNorm2d sees"),
        (replace(INSTANCE, of_tiles=NOT_MEASURED), UNKNOWN, "no image has two tiles that overlap (give larger images"),
        (replace(INSTANCE, tile_norms=None), UNKNOWN, "which norms see the tile is not known"),
        (replace(STORED, disparity=math.nan), UNKNOWN, "train/eval disparity, since neither mode predicts anything"),
        (replace(STORED, disparity=0.34), PROBLEM, "(train/eval disparity 0.34, above 0.1): re-estimate them with"),
        (replace(STORED, disparity=0.34), PROBLEM, "or open its limits further (nnunet-norm plan --batch-renorm)"),
        (replace(STORED, disparity=0.34, norm="BatchNorm2d"), PROBLEM, "or train nnUNetTrainerPreciseBN or"),
        (
            replace(INSTANCE, disparity=0.34),
            PROBLEM,
            "train nnUNetTrainerBRN. The statistics with which InstanceNorm2d",
        ),
        (
            STORED,
            NO_PROBLEM,
            "BatchRenorm2d has stored statistics, the same for every tile, and train and eval mode agree",
        ),
        (replace(STORED, norm="no norm"), NO_PROBLEM, "nothing in it normalizes, the same for every tile"),
        (
            replace(STORED, of_tiles=DIFFERENT),
            NO_PROBLEM,
            "max dist 8.14, comes from a halo smaller than the receptive",
        ),
        (replace(STORED, of_tiles=DIFFERENT, halo_is_exact=True), NO_PROBLEM, "through something that is no norm"),
        (replace(STORED, of_tiles=NOT_MEASURED), NO_PROBLEM, "BatchRenorm2d has stored statistics"),
        (replace(STORED, of_blocks=DIFFERENT), PROBLEM, "depends on its blocks, which it should not with any norm"),
    ],
)
def test_every_branch_has_its_sentence(found, kind, words):
    """What was found, as a kind and in words, with what to do; one line that ends as a sentence does."""
    verdict = verdict_of(found)
    assert verdict.kind == kind
    assert words in verdict.sentence
    assert verdict.sentence.endswith(".")
    assert "\n" not in verdict.sentence
    assert "nan" not in verdict.sentence


@pytest.mark.parametrize(("disparity", "kind"), [(0.1, NO_PROBLEM), (0.1001, PROBLEM)])
def test_the_border_is_that_of_the_trainers_warning(disparity, kind):
    """0.1 itself is no problem yet."""
    assert verdict_of(replace(STORED, disparity=disparity)).kind == kind


@pytest.mark.parametrize(("part", "words"), [(0.0, "none"), (0.0247, "2.47 %"), (0.00034, "0.034 %"), (1.0, "100 %")])
def test_shares_are_told_with_three_digits(part, words):
    """Without an exponent."""
    assert share(part) == words
