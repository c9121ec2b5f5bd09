"""Electron microscopy of 1024 x 1024, six stages: neither norm has a mismatch stage by stage, InstanceNorm one in tiles."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.integration

DATASET = "Dataset005_VNC"
BRN, INSTANCE = "nnUNetTrainerBRN_2epochs", "nnUNetTrainerInstanceNorm_2epochs"
LABELS = {"background": 0, "membrane": 1, "mitochondria": 2, "glia": 3, "synapse": 4}


@pytest.fixture(scope="module")
def reports(workspace, real_images):
    """The final validation's report of both norms."""
    source = real_images("vnc_sstem")
    cases = [
        (f"slice_{i:02}", source / "raw" / f"{i:02}.png", _label_writer(source / "labels" / f"{i:02}.png"))
        for i in range(5)
    ]
    workspace.add_dataset(DATASET, {"0": "EM"}, LABELS, ".png", cases)
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 5, "-c", "2d", "-np", 1, "-npfp", 1)
    workspace.run(
        *("nnunet-norm", "plan", "-d", 5, "-c", "2d", "--plans-name", "small", "--num-stages", 6, "--base-features", 4),
        *("--patch-size", 128, 128, "--batch-size", 2, "--iterations-per-epoch", 12, "--val-iterations-per-epoch", 2),
        *("--seed", 1),
    )
    reports = {}
    for trainer in (BRN, INSTANCE):
        workspace.train(5, "2d", 0, trainer, "small")
        fold = workspace.model(DATASET, trainer, "small", "2d") / "fold_0"
        reports[trainer] = json.loads((fold / "validation" / "norm_report.json").read_text())
        reports[trainer]["log"] = max(fold.glob("training_log_*.txt")).read_text()
    return reports


def _label_writer(path):
    """nnU-Net wants a label image of one channel."""
    return lambda target: Image.open(path).convert("L").save(target)


def test_the_label_images_hold_class_numbers(real_images):
    with Image.open(real_images("vnc_sstem") / "labels" / "00.png") as labels:
        assert np.asarray(labels.convert("L")).max() == 4


def test_brn_of_six_stages_has_no_mismatch_in_an_image_of_many_blocks(reports):
    report = reports[BRN]
    (plan,) = report["predictor"]["plans"]
    assert (plan["plan"], plan["population"], plan["exact"]) == ("stages", "stored", True)
    assert plan["stride"] == [32, 32]
    assert plan["blocks"] > plan["pieces"]
    mismatch = report["tile_mismatch"]
    assert mismatch["num_pairs"] > 0
    assert mismatch["verdict"] == "no" or mismatch["verdict"].startswith("no (float32 rounding")
    assert f"max dist: {mismatch['verdict']} ({mismatch['num_pairs']} pairs)" in report["log"]
    assert "tile_mismatch_with_tile_statistics" not in report


def test_instance_norm_has_a_mismatch_in_tiles_and_none_with_the_statistics_of_the_image(reports):
    report = reports[INSTANCE]
    (plan,) = report["predictor"]["plans"]
    assert (plan["plan"], plan["population"], plan["exact"]) == ("stages", "image", True)
    assert report["predictor"]["exact"]
    exact, tiles = report["tile_mismatch"], report["tile_mismatch_with_tile_statistics"]
    assert exact["num_pairs"] > 0
    assert exact["verdict"] == "no" or exact["verdict"].startswith("no (float32 rounding")
    assert tiles["num_pairs"] > 0
    assert not tiles["verdict"].startswith("no")
    assert tiles["max_dist"] > 0.01
    assert "In tiles with statistics of their own it would be 1: " in report["log"]
    assert f", max dist: {tiles['verdict']} " in report["log"]
