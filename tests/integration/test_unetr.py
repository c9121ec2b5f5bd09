"""A UNETR on hippocampus MRI through nnU-Net's own programs: planned, trained, and predicted by both predictors."""

import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everybody's name for it

pytestmark = pytest.mark.integration

DATASET = "Dataset014_Hippocampus"
TRAINER = "nnUNetTrainerBRN_UNETR_DiceFocal_1epochs"


def test_a_unetr_is_planned_trained_and_predicted(workspace):
    """Enforces the road of a user: the report names tiles and attention, and both predictors write the image's geometry."""
    workspace.add_hippocampus(DATASET, 5, 1)
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 14, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    planned = workspace.run(
        *("nnunet-norm", "plan", "-d", 14, "-c", "3d_fullres", "--plans-name", "unetr", "--num-stages", 3),
        *("--patch-size", 32, 48, 32, "--iterations-per-epoch", 3, "--val-iterations-per-epoch", 1, "--seed", 1),
        *("--unetr", "feature_size=2", "hidden_size=12", "mlp_dim=16", "num_heads=3"),
    ).stdout
    assert "UNETR (trainers with _UNETR), tokens of 16x16x16, feature_size 2" in planned
    assert "-p unetr -tr nnUNetTrainerBRN_UNETR" in planned
    workspace.train(14, "3d_fullres", 0, TRAINER, "unetr")
    model = workspace.model(DATASET, TRAINER, "unetr", "3d_fullres")
    report = json.loads((model / "fold_0" / "validation" / "norm_report.json").read_text())
    (plan, *_) = report["predictor"]["plans"]
    assert plan["tile_size"] == [32, 48, 32]
    assert not report["predictor"]["exact"]
    assert plan["reason"] == "no halo can make it exact, because vit.blocks.0.attn (SABlock: bmm) sees the whole tile"
    images = workspace.root / "raw" / DATASET / "imagesTs"
    (image,) = images.iterdir()
    for number, program in enumerate((["nnunet-norm", "predict"], ["nnUNetv2_predict"])):
        out = workspace.root / f"predicted_{number}"
        workspace.run(
            *(*program, "-i", images, "-o", out, "-d", 14, "-c", "3d_fullres", "-p", "unetr", "-tr", TRAINER),
            *("-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"),
        )
        labels = sitk.ReadImage(str(out / image.name.replace("_0000", "")))
        assert labels.GetSize() == sitk.ReadImage(str(image)).GetSize()
        assert set(np.unique(sitk.GetArrayFromImage(labels))) <= {0, 1, 2}
    refused = workspace.run(
        *("nnunet-norm", "predict", "-i", images, "-o", workspace.root / "none", "-d", 14, "-c", "3d_fullres"),
        *("-p", "unetr", "-tr", TRAINER, "-f", 0, "-device", "cpu", "--tile-size", 64),
        fails=True,
    )
    assert (
        "tile size 64 x 64 x 64 does not suit this network, which takes tiles of 32 x 48 x 32 alone" in refused.stderr
    )
