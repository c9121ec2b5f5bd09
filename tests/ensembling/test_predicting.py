import json
import pickle

import numpy as np
import pytest
import torch
from predicted import read
from tiny_models import segmentation, visible, write_image, write_model
from trained_models import flat, write_trained

from nnunet_norm.ensembling import Merging, Model, Prediction, predict_ensemble
from nnunet_norm.ensembling.merging import alone_in
from nnunet_norm.ensembling.models import pair_folder, postprocessing_of_ensemble
from nnunet_norm.ensembling.postprocessing import Postprocessing
from nnunet_norm.errors import EnsembleError, InputImageError, ModelFolderError, OutputError
from nnunet_norm.prediction import HaloPredictor

CHECKPOINT = "checkpoint_final.pth"
BRN, STOCK, FLAT = (
    "nnUNetTrainerBRN__p__3d_fullres",
    "nnUNetTrainer__q__3d_fullres",
    "nnUNetTrainerGN__r__3d_fullres",
)


@pytest.fixture
def place(tmp_path):
    """Two models of other trainers and folds, one of them two-dimensional, and two images."""
    write_trained(tmp_path / BRN, folds=(0, 1))
    write_model(tmp_path / STOCK)
    for name in ("a_0000", "b_0000"):
        write_image(tmp_path / "images", name, seed=ord(name[0]))
    return tmp_path


def predictor():
    return HaloPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)


def ensemble(place, models, *, keep=False, before=None, **options):
    prediction = Prediction(predictor, options, num_processes_preprocessing=0, num_processes_segmentation_export=0)
    merging = Merging(save_probabilities=True, progress=False)
    predict_ensemble(
        models, str(place / "images"), place / "out", prediction, merging, keep_members=keep, before=before
    )


def both(place):
    return [Model(place / BRN, (0, 1)), Model(place / STOCK, (0,))]


def alone(place, model, output):
    """Probabilities of the case a by the halo predictor and no ensemble."""
    one = predictor()
    one.initialize_from_trained_model_folder(str(model.folder), model.folds, CHECKPOINT)
    one.predict_from_files(str(place / "images"), str(output), True, True, 0, 0)
    return {case: np.load(output / f"{case}.npz")["probabilities"] for case in ("a", "b")}


def test_an_ensemble_is_the_average_of_what_each_predicts(place):
    """Different trainers, plans, dimensions and folds, in one go; nothing but the ensemble is left."""
    write_trained(place / FLAT, "nnUNetTrainerGN", change=flat)
    models = [*both(place), Model(place / FLAT, (0,))]
    ensemble(place, models)
    each = [alone(place, model, place / f"alone_{number}") for number, model in enumerate(models)]
    for case in ("a", "b"):
        total = each[0][case].copy()
        for other in each[1:]:
            total += other[case]
        expected = total / np.float32(3)
        np.testing.assert_array_equal(np.load(place / "out" / f"{case}.npz")["probabilities"], expected)
        np.testing.assert_array_equal(segmentation(place / "out" / f"{case}.nii.gz"), expected.argmax(0))
    files = [f"{case}.{end}" for case in "ab" for end in ("nii.gz", "npz", "pkl")]
    assert visible(place / "out") == sorted([*files, "dataset.json", "plans.json", "made_from.json"])


def test_members_are_kept_on_request(place):
    """Under names that are seen, as folders that can be averaged again."""
    ensemble(place, both(place), keep=True)
    assert visible(place / "out" / "members") == [f"{BRN}__fold_0_1", f"{STOCK}__fold_0"]
    assert {"a.npz", "a.pkl", "a.nii.gz", "plans.json", "dataset.json"} <= set(
        visible(place / "out" / "members" / f"{STOCK}__fold_0")
    )


def test_models_of_the_same_name_are_both_kept(place):
    """Trained in different places, so that only their folders differ."""
    other = write_model(place / "elsewhere" / STOCK, folds=(1,))  # the seed of its weights
    (other / "fold_1").rename(other / "fold_0")
    models = [Model(place / STOCK, (0,)), Model(place / "elsewhere" / STOCK, (0,))]
    ensemble(place, models, keep=True)
    kept = [place / "out" / "members" / f"{STOCK}__fold_0{number}" for number in ("", "__2")]
    for model, folder, name in zip(models, kept, ("alone_0", "alone_1"), strict=True):
        expected = alone(place, model, place / name)["a"]
        np.testing.assert_array_equal(np.load(folder / "a.npz")["probabilities"], expected)


def test_nothing_is_written_among_the_images(place):
    """Where the next run would take the segmentations for images."""
    (place / "out").symlink_to("images")
    before = visible(place / "images")
    with pytest.raises(EnsembleError, match="out is one of the folders that are predicted: choose another"):
        ensemble(place, both(place))
    assert visible(place / "images") == before


def test_a_second_run_into_the_same_folder_is_refused(place):
    """It would remove what the first one is predicting."""
    with alone_in(place / "out"), pytest.raises(OutputError, match=r"another process is writing .*out"):
        ensemble(place, both(place))
    assert visible(place / "out") == []


def test_what_was_predicted_is_not_predicted_again(place, monkeypatch):
    """A run that ended in the middle goes on with what is missing; a finished one does nothing; a changed image is redone."""
    predicted = []
    predict = HaloPredictor.predict_to

    def counted(self, sink, image, work=None):
        predicted.append(len(predicted))
        if len(predicted) == 4:
            raise KeyboardInterrupt
        predict(self, sink, image, work)

    monkeypatch.setattr(HaloPredictor, "predict_to", counted)
    with pytest.raises(KeyboardInterrupt):
        ensemble(place, both(place))
    assert not list(place.glob("out/*.nii.gz"))
    ensemble(place, both(place))
    assert len(predicted) == 5
    ensemble(place, both(place))
    assert len(predicted) == 5
    write_image(place / "images", "b_0000", seed=7)
    ensemble(place, both(place))
    assert len(predicted) == 7
    ensemble(place, both(place), option="another")
    assert len(predicted) == 11


def test_a_bad_image_does_not_stop_the_others(place):
    """It is named at the end; the others are averaged, and are not predicted again when it is mended."""
    write_image(place / "images", "b_0000", value=np.nan)
    with pytest.raises(InputImageError, match="'b' has 1 values that are not finite"):
        ensemble(place, both(place))
    assert {"a.nii.gz", "a.npz"} <= set(visible(place / "out"))
    assert "b.nii.gz" not in visible(place / "out")
    stamp = (place / "out" / "a.nii.gz").stat().st_mtime_ns
    write_image(place / "images", "b_0000", seed=3)
    ensemble(place, both(place))
    assert (place / "out" / "a.nii.gz").stat().st_mtime_ns == stamp
    assert "b.nii.gz" in visible(place / "out")


def test_each_models_own_postprocessing_comes_first(place):
    """Of one model only here: its removed voxels count as background."""
    models = both(place)
    post = Postprocessing(place, ({"labels_or_regions": 1}, {"labels_or_regions": 2}))
    ensemble(place, models, before=[None, post])
    first, second = (alone(place, model, place / f"alone_{number}") for number, model in enumerate(models))
    before = read(place / "alone_1" / "a.nii.gz")
    removed = post(before) != before
    assert removed.any()
    second["a"][:, removed] = np.array([1, 0, 0], np.float32)[:, None]
    expected = (first["a"] + second["a"]) / np.float32(2)
    np.testing.assert_array_equal(np.load(place / "out" / "a.npz")["probabilities"], expected)


def _missing_fold(place):
    return [Model(place / BRN, (0, 3)), Model(place / STOCK, (0,))]


def _cascade(place):
    path = place / STOCK / "plans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    path.write_text(json.dumps(plans))
    return both(place)


def _inherited_cascade(place):
    path = place / STOCK / "plans.json"
    plans = json.loads(path.read_text())
    own = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {
        "base": own | {"previous_stage": "3d_lowres"},
        "3d_fullres": {"inherits_from": "base"},
    }
    path.write_text(json.dumps(plans))
    return both(place)


def _other_dataset(place):
    path = place / STOCK / "plans.json"
    path.write_text(path.read_text().replace("Dataset901_Tiny", "Dataset902_Other"))
    return both(place)


def _other_labels(place):
    path = place / STOCK / "dataset.json"
    path.write_text(path.read_text().replace('"b"', '"tumour"'))
    return both(place)


def _other_channels(place):
    path = place / STOCK / "dataset.json"
    path.write_text(path.read_text().replace('"T0"', '"CT"'))
    return both(place)


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        (_missing_fold, ModelFolderError, rf"{BRN}' has no {CHECKPOINT} for fold 3; folds that have it .*: 0, 1"),
        (_cascade, EnsembleError, rf"model {STOCK} continues the cascade's 3d_lowres"),
        (_inherited_cascade, EnsembleError, rf"model {STOCK} continues the cascade's 3d_lowres"),
        (
            _other_dataset,
            EnsembleError,
            rf"models of different datasets: {STOCK} is of Dataset902_Other, {BRN} of",
        ),
        (_other_labels, EnsembleError, rf"{STOCK} and {BRN} are of different datasets: labels .*tumour"),
        (_other_channels, EnsembleError, r"different datasets: channels \[.CT"),
        (lambda place: [Model(place / STOCK, (0,))] * 2, EnsembleError, rf"model {STOCK} is given twice"),
    ],
)
def test_models_that_do_not_go_together_are_refused(place, change, error, what):
    """In one line, before anything is predicted or written."""
    with pytest.raises(error, match=what):
        ensemble(place, change(place))
    assert not (place / "out").exists()


def test_the_postprocessing_of_an_ensemble_is_that_of_the_pair(place):
    """In either order of the models; for three, or with different folds, there is none."""
    models = [Model(place / name, (0,)) for name in (BRN, STOCK)]
    folder = pair_folder(*models)
    folder.mkdir(parents=True)
    (folder / "postprocessing.pkl").write_bytes(pickle.dumps(([], [])))
    for pair in (models, models[::-1]):
        assert postprocessing_of_ensemble(pair).path == folder / "postprocessing.pkl"
    for others in (both(place), [*models, models[0]]):
        with pytest.raises(EnsembleError, match="is known only for two with the same folds"):
            postprocessing_of_ensemble(others)
