"""Electron microscopy of 1024 x 1024: BRN has no tile mismatch, InstanceNorm has one."""

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
        *("nnunet-norm", "plan", "-d", 5, "-c", "2d", "--plans-name", "small", "--num-stages", 3, "--base-features", 4),
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


def test_brn_has_no_tile_mismatch_in_an_image_of_many_tiles(reports):
    report = reports[BRN]
    (decision,) = report["predictor"]["decisions"]
    assert decision["tiles"] > 16
    assert decision["exact"]
    assert decision["statistics"] == "fixed"
    mismatch = report["tile_mismatch"]
    assert mismatch["num_pairs"] > 0
    assert mismatch["verdict"] == "no" or mismatch["verdict"].startswith("no (float32 rounding")
    assert f"max dist: {mismatch['verdict']} ({mismatch['num_pairs']} pairs)" in report["log"]


def test_instance_norm_has_a_tile_mismatch_and_it_is_said_that_no_halo_helps(reports):
    report = reports[INSTANCE]
    mismatch = report["tile_mismatch"]
    assert mismatch["num_pairs"] > 0
    assert not mismatch["verdict"].startswith("no")
    assert mismatch["max_dist"] > 0.01
    assert not report["predictor"]["exact"]
    assert "no halo can make it seamless" in report["log"]
