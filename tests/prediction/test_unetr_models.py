"""Models of UNETR: predicted in tiles of their patch alone, recalibrated, and never taken for a model of stock nnU-Net."""

import json

import numpy as np
import pytest
import torch
from tiny_models import write_image
from torch import nn
from trained_models import CONFIGURATION, write_trained

from nnunet_norm.diagnosis.model import DiagnosedModel
from nnunet_norm.errors import ModelFolderError, TilingError
from nnunet_norm.layers import find_norms
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.recalibration import Recalibration
from nnunet_norm.prediction.stock_model import stock_export
from nnunet_norm.training.pretrained import pretrained_weights

CPU = torch.device("cpu")
PATCH = (16, 32, 48)


def unetr(plan):
    """Make the plans' network a UNETR of a few tokens."""
    sizes = {"feature_size": 2, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3}
    plan["configurations"][CONFIGURATION] |= {"patch_size": PATCH, "nnunet_norm": {"unetr": sizes}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One with stored statistics, and one without."""
    folder = tmp_path_factory.mktemp("models")
    return {
        norm: write_trained(folder / norm, f"nnUNetTrainer{norm}_UNETR", change=unetr)
        for norm in ("BRN", "InstanceNorm")
    }


def predictor_of(folder, **options):
    predictor = HaloPredictor(use_mirroring=False, device=CPU, allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def test_every_voxel_is_that_of_its_tile(models):
    """Against the network run by hand on each tile of the patch size: halo of half the tile on the axis of 48, none on 16."""
    predictor = predictor_of(models["BRN"])
    image = torch.randn((1, 20, 30, 70), generator=torch.Generator().manual_seed(0))
    logits = predictor.predict_sliding_window_return_logits(image)
    plan = predictor.last_plan.decision
    assert (plan.tile_size, plan.halo, plan.exact) == (PATCH, ((0, 0), (0, 0), (8, 8)), False)
    padded = nn.functional.pad(image, (0, 10, 0, 2, 0, 12))[None]
    network = predictor.bare_network
    parts = {}
    with torch.inference_mode():
        for x in (0, 16):
            for z in (0, 32):
                parts[x, z] = network(padded[:, :, x : x + 16, :, z : z + 48])[0]
    # The two tiles along the last axis share 32 to 48; either has lost 8 voxels there, which leaves the cut at 40.
    rows = [torch.cat([parts[x, 0][..., :40], parts[x, 32][..., 8:]], dim=-1) for x in (0, 16)]
    assert torch.allclose(logits, torch.cat(rows, dim=1)[:, :20, :30, :70], atol=1e-6)


def test_an_image_below_the_patch_is_padded_to_it(models):
    """One tile, zeros at its far ends."""
    predictor = predictor_of(models["BRN"])
    image = torch.randn((1, 9, 32, 40), generator=torch.Generator().manual_seed(1))
    logits = predictor.predict_sliding_window_return_logits(image)
    with torch.inference_mode():
        whole = predictor.bare_network(nn.functional.pad(image, (0, 8, 0, 0, 0, 7))[None])[0]
    assert torch.allclose(logits, whole[:, :9, :, :40], atol=1e-6)
    assert predictor.last_plan.decision.tiles == 1


def test_another_tile_stages_and_the_statistics_of_the_image_are_refused(models, tmp_path):
    """One line each, before an image is read."""
    write_image(tmp_path / "in", "case_0000")
    for norm, options, line in (
        (
            "BRN",
            {"tile_size": (32, 32, 32)},
            r"^tile size 32 x 32 x 32 does not suit .* 16 x 32 x 48 alone, .* leave --tile-",
        ),
        (
            "BRN",
            {"execution": "stages"},
            r"^execution 'stages' is not possible: .*SABlock: bmm\) sees the whole image; else",
        ),
        ("InstanceNorm", {}, r"^the whole image's statistics cannot be had: .*; else choose --population tile"),
    ):
        predictor = predictor_of(models[norm], **options)
        with pytest.raises(TilingError, match=line):
            predictor.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"))


def test_instance_norm_is_recalibrated_to_a_unetr_with_stored_statistics(models, tmp_path):
    """The statistics of the first norm are those of the first convolution; the trainer builds what the plans name."""
    write_image(tmp_path / "in", "case_0000", shape=(16, 32, 48))
    recalibration = Recalibration(models["InstanceNorm"], device=CPU, progress=False)
    assert recalibration.trainer_name == "nnUNetTrainerNorm_UNETR"
    (target,) = recalibration.targets(tmp_path / "in", output=tmp_path / "new")
    estimate = recalibration.write(target)
    assert "this network takes tiles of 16 x 32 x 48 alone" not in estimate.way
    new = predictor_of(tmp_path / "new", fold_norms=False)
    kinds = {type(norm) for norm in find_norms(new.bare_network).values()}
    assert kinds == {nn.BatchNorm3d}
    first = new.bare_network.encoder1.layer
    noise = np.random.default_rng(0).normal(size=(16, 32, 48)).astype(np.float32)
    image = torch.from_numpy((noise - noise.mean()) / noise.std())[None, None]
    with torch.inference_mode():
        features = first.conv1(image).double()
    mean, variance = features.mean((0, 2, 3, 4)), features.var((0, 2, 3, 4), correction=0)
    assert torch.allclose(first.norm1.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(first.norm1.running_var.double(), variance, rtol=1e-3)
    assert json.loads((tmp_path / "new" / "plans.json").read_text())["plans_name"] == "nnUNetPlans_recalibrated"


def test_it_is_not_exported_as_a_stock_model(models):
    """Stock nnU-Net would build the U-Net of the plans."""
    with pytest.raises(
        ModelFolderError, match=r"is a UNETR, which stock nnU-Net does not build: use it with this package"
    ):
        stock_export(models["BRN"])


def test_its_weights_start_another_training(models):
    """Those of InstanceNorm with fresh statistics for BatchRenorm, all else as it was."""
    weights = pretrained_weights(models["InstanceNorm"], 0, "checkpoint_final.pth")
    wanted = predictor_of(models["BRN"], fold_norms=False).bare_network
    wanted.load_state_dict(weights)
    of_model = predictor_of(models["InstanceNorm"]).bare_network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in of_model.items())
    assert torch.equal(wanted.encoder1.layer.norm1.running_var, torch.ones(2))


def test_it_is_diagnosed_with_its_one_tile(models):
    """No other tile sizes are tried, tiles have the halo of the prediction, and no pass over the whole image is claimed."""
    model = DiagnosedModel(models["BRN"], device=CPU)
    image = torch.randn((1, 20, 30, 70), generator=torch.Generator().manual_seed(0))
    assert model.tile_sizes([image.shape[1:]]) == [PATCH]
    assert model.tiles_plan(image, PATCH, ((3, 3),) * 3).decision.halo == ((0, 0), (0, 0), (8, 8))
    assert model.whole_image_plan(image) == (
        "no halo can make it exact, because vit.blocks.0.attn (SABlock: bmm) sees the whole tile"
    )
