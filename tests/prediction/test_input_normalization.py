"""What predicts networks whose input is normalized by quantiles: which way, with whose statistics, what the record says."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_models import plans, segmentation, write_image, write_model
from tiny_networks import INSTANCE_NORM, noise, predictor, randomized, unet
from torch.nn import functional

from nnunet_norm.errors import InputImageError, ModelFolderError, TilingError
from nnunet_norm.layers import set_input_normalization
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.stock_model import stock_export
from nnunet_norm.prediction.volumes import VolumeOptions, VolumePrediction

STRIDES = [(1, 1), (2, 2)]
IMAGE = noise(1, 2, 41, 30)
KINDS = ("image_quantile", "tile_quantile")


def network(kind, **options):
    made = unet(STRIDES, **options)
    if kind is not None:
        set_input_normalization(made, kind, 1)
    return randomized(made)


def normalized(image):
    low, high = np.quantile(image.numpy(), [0.01, 0.98])
    return ((image - low) / (high - low)).clamp(0, 1)


def test_tiles_are_predicted_as_if_each_had_been_normalized_before():
    """Enforces the result of the plain network for every normalized tile, in the core of each."""
    made = predictor(network("tile_quantile"), (16, 16), halo=4, fold_norms=False)
    found = made.predict_logits_from_preprocessed_data(IMAGE[:, :1])
    plain = network(None)
    plain.load_state_dict(made.list_of_parameters[0])
    plan = made.last_plan
    padded = functional.pad(IMAGE[:, 0], [0, plan.shape[1] % 2, 0, plan.shape[0] % 2])
    for tile in plan.tiles:
        with torch.no_grad():
            wanted = plain(normalized(padded[(slice(None), *tile.read)])[None])[0]
        inside = tuple(slice(w.start - r.start, w.stop - r.start) for w, r in zip(tile.write, tile.read, strict=True))
        torch.testing.assert_close(found[(slice(None), 0, *tile.write)], wanted[(slice(None), *inside)].to(found.dtype))


@pytest.mark.parametrize(
    ("norm", "population", "recorded"),
    [({}, None, "stored"), ({}, "stored", "stored"), ({}, "tile", "tile")]
    + [({"norm": INSTANCE_NORM}, word, "tile") for word in (None, "tile")],
)
def test_tiles_have_the_statistics_that_were_asked_for(norm, population, recorded):
    """Enforces tiles, never exact, with stored statistics where there are any and nothing else was asked for."""
    made = predictor(network("tile_quantile", **norm), (16, 16), population=population)
    made.predict_logits_from_preprocessed_data(IMAGE)
    record = json.loads(json.dumps(made.record()))
    assert (record["plan"], record["population"], record["exact"]) == ("tiles", recorded, False)
    assert (record["input_normalization"], record["statistics"]) == ("tile_quantile", "tile")
    assert "input_normalization tile_quantile" in record["reason"]


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ({}, {"execution": "stages"}, "execution 'stages' is not possible: .* its own quantiles"),
        ({}, {"population": "image"}, "population 'image' needs the whole image, .* choose tile$"),
        ({"norm": INSTANCE_NORM}, {"population": "image"}, "population 'image' needs the whole image"),
        ({"norm": INSTANCE_NORM}, {"population": "stored"}, "choose --population tile or batch$"),
        ({}, {"halo": "exact"}, "halo 'exact' does not exist for this network: .* tile_quantile"),
    ],
)
def test_what_tiles_cannot_have_is_refused_in_one_line(norm, options, message):
    """Enforces a reason and a choice."""
    made = predictor(network("tile_quantile", **norm), (16, 16), **options)
    with pytest.raises(TilingError, match=message) as refused:
        made.predict_logits_from_preprocessed_data(IMAGE)
    assert "\n" not in str(refused.value)


def test_normalized_images_are_predicted_as_any_other():
    """Enforces stages and the plain network's result for an image from 0 to 1, and a refusal of any other."""
    made, plain = predictor(network("image_quantile"), (16, 16)), predictor(network(None), (16, 16))
    image = normalized(IMAGE)
    plain.bare_network.load_state_dict(made.bare_network.state_dict())
    plain.list_of_parameters = made.list_of_parameters
    assert torch.equal(
        made.predict_logits_from_preprocessed_data(image), plain.predict_logits_from_preprocessed_data(image)
    )
    assert made.record() == plain.record() | {"input_normalization": "image_quantile"}
    for predict in (made.predict_logits_from_preprocessed_data, made.predict_sliding_window_return_logits):
        with pytest.raises(InputImageError, match=r"the preprocessed image has values from -\d.* 0 to 1 \("):
            predict(IMAGE)


@pytest.fixture(params=KINDS)
def model(request, tmp_path, monkeypatch):
    """A trained model of this package's trainer with an input normalization."""
    from importlib.resources import files

    monkeypatch.setenv("nnUNet_extTrainer", str(files("nnunet_norm.trainers")))
    folder = write_model(tmp_path / "model", trainer="nnUNetTrainerNorm")
    plan = plans()
    plan["configurations"]["3d_fullres"]["nnunet_norm"] = {"input_normalization": request.param}
    (folder / "plans.json").write_text(json.dumps(plan))
    return folder


def load(folder, **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(folder), (0,))
    return made


def test_volumes_and_files_have_the_same_labels(model, tmp_path):
    """Enforces that the streamed quantiles of a zarr volume are those of the image in memory; parts of tiles are refused."""
    import zarr

    write_image(tmp_path / "images", "case_0_0000")
    array = segmentation(tmp_path / "images" / "case_0_0000.nii.gz")
    zarr.create_array(str(tmp_path / "volumes" / "case_0.zarr"), data=array, chunks=(8, 8, 8))
    load(model).predict_from_files_sequential(str(tmp_path / "images"), str(tmp_path / "out"))
    VolumePrediction(load(model), str(tmp_path / "volumes"), str(tmp_path / "out_zarr"), VolumeOptions()).run()
    labels = zarr.open_group(str(tmp_path / "out_zarr" / "case_0.zarr"), mode="r")["0"][:]
    assert (labels == segmentation(tmp_path / "out" / "case_0.nii.gz")).mean() > 0.999
    kind = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["nnunet_norm"]
    for folder in ("out", "out_zarr"):
        (how,) = json.loads((tmp_path / folder / "halo_prediction.json").read_text()).values()
        assert how["input_normalization"] == kind["input_normalization"]
    if kind["input_normalization"] == "tile_quantile":
        options = VolumeOptions(num_parts=2)
        with pytest.raises(TilingError, match=r"^-num_parts 2 divides a volume, .* predict it in one part$"):
            VolumePrediction(load(model), str(tmp_path / "volumes"), str(tmp_path / "parts"), options)


def test_stock_nnunet_cannot_have_the_model(model):
    """Enforces one line in place of an export that would predict something else."""
    with pytest.raises(
        ModelFolderError, match=r"\(input_normalization \w+_quantile\), which stock nnU-Net does not do"
    ):
        stock_export(model)


def test_tile_quantiles_are_warned_about_once(model, caplog):
    """Enforces the warning for tiles, and none for images."""
    load(model)
    found = [
        record.message for record in caplog.records if re.match("input_normalization tile_quantile", record.message)
    ]
    tile = "tile_quantile" in (model / "plans.json").read_text()
    assert len(found) == tile


def test_the_network_tells_how_it_was_trained_and_not_the_plans(model, tmp_path):
    """Enforces z-scores for a stock trainer's model whose plans have the key, which that trainer has not read."""
    import zarr

    write_image(tmp_path / "images", "case_0_0000")
    array = segmentation(tmp_path / "images" / "case_0_0000.nii.gz")
    zarr.create_array(str(tmp_path / "volumes" / "case_0.zarr"), data=array, chunks=(8, 8, 8))
    files = [str(tmp_path / "images" / "case_0_0000.nii.gz")]
    of_ours, _ = load(model).preprocessing(files, None)
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(path, weights_only=False) | {"trainer_name": "nnUNetTrainer"}, path)
    stock = load(model)
    assert stock.input_normalization is None
    given, _ = stock.preprocessing(files, None)
    np.testing.assert_allclose(given[0], (array - array.mean()) / array.std(), atol=1e-5)
    assert (of_ours.min() >= 0) == ("image_quantile" in (model / "plans.json").read_text())
    VolumePrediction(stock, str(tmp_path / "volumes"), str(tmp_path / "out_zarr"), VolumeOptions()).run()
    stock.predict_from_files_sequential(str(tmp_path / "images"), str(tmp_path / "out"))
    labels = zarr.open_group(str(tmp_path / "out_zarr" / "case_0.zarr"), mode="r")["0"][:]
    assert (labels == segmentation(tmp_path / "out" / "case_0.nii.gz")).mean() > 0.999
    (how,) = json.loads((tmp_path / "out_zarr" / "halo_prediction.json").read_text()).values()
    assert "input_normalization" not in how
