"""The predictor folds norms where it loads a model from a folder, and nowhere else; only rounding differs."""

import functools
import json

import pytest
import torch
from tiny_models import segmentation, write_checkpoint, write_image, write_model
from tiny_networks import noise, predictor, randomized, unet

from nnunet_norm.layers import find_norms
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.folding import fold_model


def loaded(folder, folds=(0, 1), **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(folder), folds)
    return made


@pytest.fixture
def model(tmp_path):
    """Two folds whose weights and statistics are none of the defaults."""
    folder = write_model(tmp_path / "model", folds=(0, 1))
    network = loaded(folder, fold_norms=False).bare_network
    for fold in (0, 1):
        torch.manual_seed(fold)
        write_checkpoint(folder / f"fold_{fold}", randomized(network).float().state_dict())
    return folder


WAYS = {
    "stages": {"execution": "stages"},
    "tiles": {"execution": "tiles", "halo": "exact", "tile_size": 16},
    "effective halo": {"halo": "erf"},
}


@pytest.mark.parametrize("way", WAYS)
def test_folding_changes_nothing_but_rounding(model, way):
    """Averaged over two folds and mirrored passes; in float64, whose rounding is far below what a mistake would do."""
    results = {}
    for fold_norms in (False, True):
        made = loaded(model, fold_norms=fold_norms, **WAYS[way])
        made.bare_network.double()
        made.list_of_parameters = [{k: v.double() for k, v in w.items()} for w in made.list_of_parameters]
        results[fold_norms] = made.predict_logits_from_preprocessed_data(noise(1, 21, 18, 19))
        assert made.folded_norms == (3 if fold_norms else 0)
        assert len(find_norms(made.bare_network)) == 3 - made.folded_norms
        assert made.record().get("folded_norms", 0) == made.folded_norms
    # The folded weights were rounded to float32 when they were made, as they are used.
    scale = results[False].abs().max()
    assert (results[True] - results[False]).abs().max() < 2e-6 * scale
    assert not torch.equal(results[True], results[False])


def test_in_double_precision_the_difference_is_that_of_double_precision(model):
    """What is folded keeps its dtype, and is computed in float64."""
    made = loaded(model, fold_norms=False)
    network, weights = made.bare_network.double().eval(), made.list_of_parameters
    weights[:] = [{key: value.double() for key, value in of_fold.items()} for of_fold in weights]
    image, expected = noise(1, 1, 16, 16, 16), []
    for of_fold in weights:
        network.load_state_dict(of_fold)
        expected.append(network(image).detach())
    assert len(fold_model(network, weights)) == 3
    for of_fold, result in zip(weights, expected, strict=True):
        network.load_state_dict(of_fold)
        assert (network(image) - result).abs().max() < 1e-12 * result.abs().max()


def test_every_fold_s_weights_are_folded(model):
    """Each with its own statistics: a fold alone predicts what it predicts without folding."""
    both = loaded(model)
    image = noise(1, 16, 16, 16, dtype=torch.float32)
    for fold in (0, 1):
        alone = loaded(model, (fold,), fold_norms=False)
        both.bare_network.load_state_dict(both.list_of_parameters[fold])
        mine, theirs = (m.predict_sliding_window_return_logits(image) for m in (both, alone))
        assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_segmentations_are_the_same(model, tmp_path):
    """From a folder of images to a folder of segmentations, and how many norms were folded stands beside them."""
    write_image(tmp_path / "images", "a_0000")
    for name, fold_norms in (("folded", True), ("plain", False)):
        loaded(model, fold_norms=fold_norms).predict_from_files_sequential(
            str(tmp_path / "images"), str(tmp_path / name)
        )
    mine, theirs = (segmentation(tmp_path / name / "a.nii.gz") for name in ("folded", "plain"))
    assert (mine != theirs).mean() < 1e-3
    records = [json.loads((tmp_path / name / "halo_prediction.json").read_text())["a"] for name in ("folded", "plain")]
    assert [record.get("folded_norms") for record in records] == [3, None]


def test_the_network_of_a_training_is_never_touched():
    """What is handed over is somebody else's, and goes on training."""
    network = unet(((1, 1), (2, 2)))
    before = list(network.state_dict())
    made = predictor(network, (8, 8))
    made.predict_logits_from_preprocessed_data(noise(1, 1, 12, 12))
    assert (made.fold_norms, made.folded_norms) == (True, 0)
    assert list(network.state_dict()) == before
    assert made.bare_network is network


def test_norms_of_the_image_stay(tmp_path):
    """InstanceNorm has nothing that could be folded."""
    made = loaded(write_model(tmp_path / "model", norm="torch.nn.InstanceNorm3d"), (0,))
    assert made.folded_norms == 0
    assert len(find_norms(made.bare_network)) == 3


def test_a_network_that_cannot_be_followed_stays_as_it_is(model, monkeypatch):
    """It is predicted as it is, in tiles."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    build = nnUNetTrainer.build_network_architecture

    @functools.wraps(build)
    def hooked(*args, **kwargs):
        network = build(*args, **kwargs)
        network.encoder.stages[0][0].convs[0].conv.register_forward_hook(lambda *_: None)
        return network

    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(hooked))
    made = loaded(model)
    assert made.folded_norms == 0
    assert len(find_norms(made.bare_network)) == 3


def test_a_compiled_network_is_folded_inside(model, monkeypatch):
    """nnUNet_compile wraps the network before it is folded; the weights of further folds are loaded into what is inside."""
    monkeypatch.setenv("nnUNet_compile", "t")
    made = loaded(model)
    assert isinstance(made.network, torch._dynamo.OptimizedModule)
    assert made.folded_norms == 3
    assert find_norms(made.bare_network) == {}
    for weights in made.list_of_parameters:
        made.bare_network.load_state_dict(weights)
