import os

import pytest
import torch
from tiny_models import write_checkpoint, write_model

from nnunet_norm.errors import ModelFolderError, SetupError
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.model_folder import SEARCH_PATH, trainers_on_search_path


def load(folder, folds=(0,), checkpoint="checkpoint_final.pth"):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, fold_norms=False)
    made.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    return made


def test_a_model_is_loaded_as_nnunet_does(tmp_path):
    """Folds, weights and mirroring; without named folds all that are there."""
    folder = write_model(tmp_path / "model", folds=(0, 2))
    assert len(load(folder, None).list_of_parameters) == 2
    loaded = load(folder, (2,))
    expected = torch.load(folder / "fold_2" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert all(torch.equal(value, expected[key]) for key, value in loaded.network.state_dict().items())
    assert loaded.allowed_mirroring_axes == (0,)


def test_a_missing_folder_names_what_is_beside_it(tmp_path):
    """The usual mistake is a wrong trainer or configuration."""
    write_model(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    with pytest.raises(ModelFolderError, match=r"does not exist; beside it: nnUNetTrainer__nnUNetPlans__3d_fullres$"):
        load(tmp_path / "nnUNetTrainer__nnUNetPlans__2d")


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_file_is_named(tmp_path, name):
    """With what is there instead."""
    folder = write_model(tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ModelFolderError, match=rf"{name} is missing in model folder .*; it has: .*fold_0"):
        load(folder)


@pytest.mark.parametrize(
    ("folds", "checkpoint", "expected"),
    [
        ((0, 1, 3), "checkpoint_final.pth", r"no checkpoint_final.pth for fold 3; .* with -f\): 0, 1, all$"),
        ("all", "checkpoint_best.pth", r"no checkpoint_best.pth for fold all; .* with -f\): none$"),
        (None, "checkpoint_best.pth", r"no checkpoint_best.pth for fold 0 to 4; .* with -f\): none$"),
    ],
)
def test_missing_folds_are_named_with_those_that_are_there(tmp_path, folds, checkpoint, expected):
    """Folds that are wanted, folds that have the checkpoint."""
    folder = write_model(tmp_path / "model", folds=(0, 1))
    (folder / "fold_1").rename(folder / "fold_all")
    write_checkpoint(folder / "fold_1", {})
    (folder / "fold_2").mkdir()
    with pytest.raises(ModelFolderError, match=expected):
        load(folder, folds, checkpoint)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    """The first key whose shape differs, with both shapes; for a later fold too."""
    folder = write_model(tmp_path / "model")
    other = write_model(tmp_path / "other", features=8)
    weights = torch.load(other / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    write_checkpoint(folder / "fold_1", weights)
    expected = (
        r"not of the network .*: encoder.stages.0.0.convs.0.conv.weight has shape \(\[8, 1, 3, 3, 3\]\) and should"
    )
    for folds in ((1,), (0, 1)):
        with pytest.raises(ModelFolderError, match=expected):
            load(folder, folds)


def test_a_checkpoint_of_another_norm_is_refused(tmp_path):
    """InstanceNorm's weights lack the running statistics: the first missing key."""
    folder = write_model(tmp_path / "model")
    other = write_model(tmp_path / "other", norm="torch.nn.InstanceNorm3d")
    os.replace(other / "fold_0" / "checkpoint_final.pth", folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(ModelFolderError, match=r"encoder.stages.0.0.convs.0.norm.running_mean is missing"):
        load(folder)


def test_a_checkpoint_that_was_cut_off_is_refused(tmp_path):
    """A copy that broke off is the usual reason."""
    folder = write_model(tmp_path / "model")
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFolderError, match=r"checkpoint '.*fold_0/checkpoint_final.pth' is not whole"):
        load(folder)


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_file_that_is_no_json_is_refused(tmp_path, name):
    """As above."""
    folder = write_model(tmp_path / "model")
    (folder / name).write_text((folder / name).read_text()[:-5])
    with pytest.raises(ModelFolderError, match=rf"{name}' is no JSON \(.*\): copy the model again"):
        load(folder)


def test_an_unknown_trainer_is_refused_with_the_line_to_export(tmp_path):
    """nnU-Net's finder says so after this package's trainers were searched too."""
    with pytest.raises(SetupError, match=r"trainer 'nnUNetTrainerNoSuch' .*export nnUNet_extTrainer="):
        load(write_model(tmp_path / "model", trainer="nnUNetTrainerNoSuch"))


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_search_path_is_restored(monkeypatch, before):
    """The user's folders come first, and the variable is as it was, also after an error."""
    if before is not None:
        monkeypatch.setenv(SEARCH_PATH, before)
    folders: list[str] = []

    def look_up_in_vain():
        with trainers_on_search_path():
            folders.extend(os.environ[SEARCH_PATH].split(os.pathsep))
            raise KeyError

    with pytest.raises(KeyError):
        look_up_in_vain()
    assert folders[:-1] == ([before] if before else [])
    assert os.path.basename(folders[-1]) == "trainers"
    assert os.environ.get(SEARCH_PATH) == before


def test_this_packages_trainers_are_found_without_the_variable(tmp_path):
    """A model of nnUNetTrainerBRN loads although nnUNet_extTrainer is not set."""
    assert SEARCH_PATH not in os.environ
    folder = write_model(tmp_path / "model", norm="nnunet_norm.layers.BatchRenorm3d", trainer="nnUNetTrainerBRN")
    loaded = load(folder)
    assert "BatchRenorm3d" in {type(module).__name__ for module in loaded.network.modules()}
