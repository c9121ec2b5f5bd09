import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
from tiny_models import write_image, write_model

from nnunet_norm.diagnosis import DiagnosedModel, cases_of_folder
from nnunet_norm.diagnosis.cases import OUTSIDE, load, middle_of
from nnunet_norm.diagnosis.measure import labels_of, reference_masks

LABELS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


@pytest.fixture
def model(tmp_path):
    """A model with regions and an ignore label."""
    write_model(tmp_path / "model")
    path = tmp_path / "model" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": LABELS, "regions_class_order": [1, 2]}))
    # Regions have a channel each and background none: the checkpoint's three channels would be one too many.
    file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    weights = checkpoint["network_weights"]
    checkpoint["network_weights"] = {k: v[:2].clone() if "seg_layers" in k else v for k, v in weights.items()}
    torch.save(checkpoint, file)
    return DiagnosedModel(tmp_path / "model", device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("extents", "most", "patch", "expected"),
    [
        ((20, 40, 24), 10**6, (16, 16, 16), (20, 40, 24)),
        ((8, 64, 64), 16384, (32, 32), (4, 64, 64)),
        ((1, 256, 256), 32768, (64, 64), (1, 128, 256)),
        ((5, 5, 5), 1, (4, 4, 4), (1, 1, 1)),
    ],
)
def test_the_middle_has_no_more_voxels_than_asked_for(extents, most, patch, expected):
    """Slices of a 2d network go first; what is left lies in the middle."""
    part = middle_of(extents, most, patch)
    shape = tuple(side.stop - side.start for side in part)
    assert math.prod(shape) <= most
    assert shape[0] == expected[0] if len(patch) == 2 else shape == expected
    for side, n in zip(part, extents, strict=True):
        assert abs(side.start - (n - side.stop)) <= 1


def test_regions_and_ignored_voxels(model, tmp_path):
    """A region is the union of its labels; ignored voxels are marked, and in no region."""
    write_image(tmp_path / "images", "a_0000", shape=(6, 7, 8))
    labels = np.random.default_rng(0).integers(0, 4, (6, 7, 8)).astype(np.uint8)
    (tmp_path / "labels").mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(tmp_path / "labels" / "a.nii.gz"))
    chosen = cases_of_folder(model.nnunet, str(tmp_path / "images"), str(tmp_path / "labels"), 3)
    assert chosen.have_labels
    case = load(model.nnunet, chosen.cases[0], 10**6)
    assert not case.is_cut
    assert ((case.reference == OUTSIDE).numpy() == (labels == 3)).all()
    masks = reference_masks(model, case.reference)[0].numpy()
    np.testing.assert_array_equal(masks, [np.isin(labels, (1, 2)), labels == 2])
    np.testing.assert_array_equal(labels_of(masks), np.where(labels == 3, 0, labels))
    assert model.class_names == ["whole", "core"]


def test_tiles_grow_from_the_smallest_to_twice_the_patch(model):
    """From 4 voxels at the bottom by doubling; beyond the patch only for images that are larger."""
    assert model.tile_sizes([(16, 16, 16)]) == [(8, 8, 8), (16, 16, 16)]
    assert model.tile_sizes([(16, 16, 16), (16, 17, 16)]) == [(8, 8, 8), (16, 16, 16), (32, 32, 32)]


def test_the_predictor_has_its_tiles_back(model):
    """Another tile size is for one prediction only."""
    image = torch.randn(1, 12, 18, 20)
    first = model.predict_as_nnunet(image)
    model.predict_as_nnunet(image, (8, 8, 8))
    assert model.patch_size == (16, 16, 16)
    assert torch.equal(model.predict_as_nnunet(image), first)
    model.tiles_plan(image, (8, 8, 8))
    assert (model.halo.tile_size, model.halo.halo) == (None, "auto")


def test_the_whole_image_is_one_pass(model):
    """To rounding, by whichever plan."""
    image = torch.randn(1, 12, 18, 20)
    plan = model.whole_image_plan(image)
    with torch.no_grad():
        expected = model.network(image[None])[0]
    torch.testing.assert_close(model.halo.predict_with(plan, image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainer", ["nnUNetTrainerNorm", "nnUNetTrainer"])
def test_labels_change_nothing_about_the_image(tmp_path, trainer):
    """With labels, too, the network sees quantiles where its trainer has normalized by them, and z-scores elsewhere."""
    folder = write_model(tmp_path / "model", trainer=trainer)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["nnunet_norm"] = {"input_normalization": "image_quantile"}
    (folder / "plans.json").write_text(json.dumps(plans))
    write_image(tmp_path / "images", "a_0000", shape=(6, 7, 8))
    (tmp_path / "labels").mkdir()
    labels = SimpleITK.GetImageFromArray(np.ones((6, 7, 8), np.uint8))
    SimpleITK.WriteImage(labels, str(tmp_path / "labels" / "a.nii.gz"))
    predictor = DiagnosedModel(folder, device=torch.device("cpu")).nnunet
    with_labels, without = (
        load(predictor, cases_of_folder(predictor, str(tmp_path / "images"), given, 1).cases[0], 10**6)
        for given in (str(tmp_path / "labels"), None)
    )
    assert with_labels.reference.unique().tolist() == [1]
    assert torch.equal(with_labels.image, without.image)
    assert (with_labels.image.min() >= 0) == (trainer == "nnUNetTrainerNorm")
