"""Model folders are written whole or not at all, and have what every command of nnU-Net reads."""

import copy
import json
import shutil

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_models import plans, visible
from trained_models import CONFIGURATION, add_what_a_training_leaves, residual, write_trained

from nnunet_norm.errors import ModelFolderError, OutputError, PlansError
from nnunet_norm.prediction.model_writing import (
    PlannedNorm,
    complete_folds,
    load_model,
    plans_with_norm,
    write_checkpoint,
    write_model,
)

BATCH_NORM = PlannedNorm("torch.nn.modules.batchnorm.BatchNorm3d", {"eps": 0.01, "affine": True})
CHANGED = {"norm": BATCH_NORM, "trainer_name": "nnUNetTrainer", "plans_name": "other"}


@pytest.fixture
def model(tmp_path):
    folder = write_trained(tmp_path / "model", folds=(0, 1, "all"))
    add_what_a_training_leaves(folder)
    return folder


def checkpoint(folder, fold=0):
    return torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)


def test_a_model_is_written_as_it_was_asked_for(model, tmp_path):
    """Trainer, norm and plans' name are those asked for in every file; weights and everything else are the source's."""
    write_model(model, tmp_path / "new", folds=(0, "all"), **CHANGED)
    assert visible(tmp_path / "new") == ["dataset.json", "dataset_fingerprint.json", "fold_0", "fold_all", "plans.json"]
    assert visible(tmp_path / "new" / "fold_0") == ["checkpoint_final.pth", "progress.png", "validation"]
    assert (tmp_path / "new" / "fold_0" / "progress.png").read_bytes() == b"a picture"
    written, before = (json.loads((folder / "plans.json").read_text()) for folder in (tmp_path / "new", model))
    assert written["plans_name"] == "other"
    for fold in (0, "all"):
        found, source = checkpoint(tmp_path / "new", fold), checkpoint(model, fold)
        assert found["trainer_name"] == "nnUNetTrainer"
        assert found["init_args"]["plans"] == written
        assert (found["init_args"]["configuration"], found["init_args"]["fold"]) == (CONFIGURATION, fold)
        assert found["inference_allowed_mirroring_axes"] == source["inference_allowed_mirroring_axes"] == (0,)
        assert list(found["network_weights"]) == list(source["network_weights"])
        assert all(torch.equal(value, source["network_weights"][k]) for k, value in found["network_weights"].items())
        assert "optimizer_state" not in found
    kwargs = written["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    assert (kwargs["norm_op"], kwargs["norm_op_kwargs"]) == (BATCH_NORM.op, dict(BATCH_NORM.kwargs))
    written["plans_name"] = before["plans_name"]
    kwargs |= {key: before["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"][key] for key in kwargs}
    assert written == before


def test_what_is_not_asked_for_stays(model, tmp_path):
    """Then the copy has the source's trainer, norm and plans."""
    write_model(model, tmp_path / "new", folds=(1,))
    assert (tmp_path / "new" / "plans.json").read_text() == json.dumps(
        json.loads((model / "plans.json").read_text()), indent=4
    ) + "\n"
    assert checkpoint(tmp_path / "new", 1)["trainer_name"] == "nnUNetTrainerBRN"
    assert not (tmp_path / "new" / "nnunet_norm.json").exists()


def test_weights_are_made_fold_by_fold(model, tmp_path):
    """From the fold and its state dict; what is written is what was returned."""

    def doubled(fold, state):
        return {key: value * 2 if key.endswith("running_mean") else value for key, value in state.items()}

    write_model(model, tmp_path / "new", folds=(0, 1), weights=doubled)
    for fold in (0, 1):
        key = "encoder.stages.0.0.convs.0.norm.running_mean"
        assert torch.equal(checkpoint(tmp_path / "new", fold)["network_weights"][key],
                           2 * checkpoint(model, fold)["network_weights"][key])  # fmt: skip


def test_notes_tell_the_whole_history(model, tmp_path):
    """The note of a model made from one that has a note holds that."""
    write_model(model, tmp_path / "first", folds=(0,), note={"written_by": "a"})
    write_model(tmp_path / "first", tmp_path / "second", folds=(0,), note={"written_by": "b"})
    note = json.loads((tmp_path / "second" / "nnunet_norm.json").read_text())
    assert note == {"written_by": "b", "before": {"written_by": "a"}}


def test_a_validation_of_other_weights_says_so(model, tmp_path):
    """The numbers stay, since sharing the model needs the file, but nobody can take them for the new model's."""
    write_model(model, tmp_path / "same", folds=(0,))
    write_model(model, tmp_path / "other", folds=(0,), outdated="of the model before it was recalibrated")
    found = [
        json.loads((tmp_path / n / "fold_0" / "validation" / "summary.json").read_text()) for n in ("same", "other")
    ]
    assert found[0] == {"foreground_mean": {"Dice": 0.5}}
    assert found[1] == {"nnunet_norm": "of the model before it was recalibrated", **found[0]}


def test_all_folds_that_have_the_checkpoint(model):
    """Numbers in order, and "all"; without any the refusal says what is there."""
    (model / "fold_3").mkdir()
    assert complete_folds(model, "checkpoint_final.pth") == [0, 1, "all"]
    with pytest.raises(ModelFolderError, match=r"no checkpoint_best.pth for fold 0 to 4"):
        complete_folds(model, "checkpoint_best.pth")


def test_what_is_there_is_never_overwritten(model, tmp_path):
    """Be it a model, an empty folder, or a link that leads nowhere."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("model", "empty", "link"):
        with pytest.raises(OutputError, match=rf"{name} is there already, and is not overwritten: choose another name"):
            write_model(model, tmp_path / name, folds=(0,))
    assert visible(tmp_path) == ["empty", "link", "model"]
    assert visible(tmp_path / "empty") == []


class StopError(Exception):
    pass


def fail(*_):
    raise StopError


@pytest.mark.parametrize("when", [{"weights": fail}, {"check": fail}])
def test_an_error_leaves_nothing_behind(model, tmp_path, when):
    """Neither under the final name nor beside it."""
    with pytest.raises(StopError):
        write_model(model, tmp_path / "new", folds=(0,), **when)
    assert visible(tmp_path) == ["model"]


def test_a_disk_that_is_full_leaves_nothing_behind(model, tmp_path, monkeypatch):
    """The refusal names the place, in one line."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\): make room"):
        write_model(model, tmp_path / "new", folds=(0,))
    assert visible(tmp_path) == ["model"]


def test_a_checkpoint_that_cannot_be_written_is_refused(tmp_path):
    """torch has no class for that error."""
    with pytest.raises(OutputError, match=r"nowhere/a.pth cannot be written"):
        write_checkpoint(tmp_path / "nowhere" / "a.pth", {})


def test_the_new_model_is_loaded_before_it_has_its_name(model, tmp_path):
    """A norm whose keys are others is refused with the key and with the name that the folder was to have."""
    with pytest.raises(ModelFolderError, match=r"/new' is not of the network .*running_mean is unexpected"):
        write_model(
            model, tmp_path / "new", folds=(0,), norm=PlannedNorm("torch.nn.InstanceNorm3d", {"affine": True}),
            trainer_name="nnUNetTrainer",
        )  # fmt: skip
    assert visible(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["a__b", "a/b", ""])
def test_names_that_cannot_name_plans_are_refused(model, tmp_path, name):
    """nnU-Net splits a results folder's name at a double underscore."""
    with pytest.raises(PlansError, match="it names a file and a results folder"):
        write_model(model, tmp_path / "new", folds=(0,), plans_name=name)
    assert visible(tmp_path) == ["model"]


@pytest.mark.parametrize("fold", [0, 1])
def test_the_weights_of_every_fold_are_those_of_the_source(model, tmp_path, fold):
    """Loaded by nnU-Net's predictor, with stored statistics that do the same."""
    write_model(
        model,
        tmp_path / "new",
        folds=(0, 1),
        **CHANGED | {"norm": PlannedNorm(BATCH_NORM.op, {"eps": 1e-5, "affine": True})},
    )
    image = torch.randn(1, 1, 8, 8, 8)
    old, new = (load_model(folder, (fold,), "checkpoint_final.pth").network for folder in (model, tmp_path / "new"))
    with torch.inference_mode():
        assert torch.equal(old(image), new(image))


def inherited():
    """Plans with heirs: one that takes all, one that has an architecture of its own, one that inherits from an heir."""
    made = plans(norm="torch.nn.InstanceNorm3d")
    own = copy.deepcopy(made["configurations"][CONFIGURATION]["architecture"])
    own["arch_kwargs"]["features_per_stage"] = [8, 8]
    made["configurations"] |= {
        "heir": {"inherits_from": CONFIGURATION, "batch_size": 4},
        "own": {"inherits_from": CONFIGURATION, "architecture": own},
        "grandchild": {"inherits_from": "heir", "previous_stage": "3d_lowres"},
        "3d_lowres": {**copy.deepcopy(made["configurations"][CONFIGURATION]), "spacing": [2.0, 2.0, 2.0]},
    }
    return made


@pytest.mark.parametrize("configuration", [CONFIGURATION, "heir", "grandchild"])
def test_only_the_model_s_configuration_changes(configuration):
    """As nnU-Net resolves inheritance; the plans that were given stay as they are."""
    before = inherited()
    after = plans_with_norm(before, configuration, BATCH_NORM)
    assert before == inherited()
    for name in before["configurations"]:
        old, new = (PlansManager(p).get_configuration(name).configuration for p in (before, after))
        if name == configuration:
            assert new["architecture"]["arch_kwargs"]["norm_op"] == BATCH_NORM.op
            new["architecture"]["arch_kwargs"] |= {
                k: old["architecture"]["arch_kwargs"][k] for k in ("norm_op", "norm_op_kwargs")
            }
        assert new == old


def test_an_architecture_without_norm_op_is_refused():
    """Plans cannot name the norm of such a network."""
    made = plans()
    del made["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["norm_op"]
    with pytest.raises(ModelFolderError, match=r"PlainConvUNet of 3d_fullres takes no norm_op"):
        plans_with_norm(made, CONFIGURATION, BATCH_NORM)


def test_the_norm_is_among_what_nnunet_imports():
    """Plans in which the norm was no dotted path before (written by hand) would hand nnU-Net a string as a norm."""
    made = plans()
    made["configurations"][CONFIGURATION]["architecture"]["_kw_requires_import"] = ["conv_op", "nonlin"]
    changed = plans_with_norm(made, CONFIGURATION, BATCH_NORM)["configurations"][CONFIGURATION]["architecture"]
    assert changed["_kw_requires_import"] == ["conv_op", "nonlin", "norm_op"]


def test_plans_of_an_old_nnunet_get_the_architecture_that_it_means(tmp_path):
    """nnU-Net reconstructs it from keys of its own; an heir of such a configuration keeps the norm that it had."""
    made = plans()
    old = made["configurations"][CONFIGURATION]
    del old["architecture"]
    old |= {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 4,
        "n_conv_per_stage_encoder": [1, 1],
        "num_pool_per_axis": [1, 1, 1], "n_conv_per_stage_decoder": [1],
        "conv_kernel_sizes": [[3, 3, 3]] * 2, "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
    }  # fmt: skip
    made["configurations"]["heir"] = {"inherits_from": CONFIGURATION}
    with pytest.warns(UserWarning, match="old nnU-Net plans format"):
        changed = plans_with_norm(made, CONFIGURATION, BATCH_NORM)["configurations"]
    norms = [changed[name]["architecture"]["arch_kwargs"]["norm_op"] for name in (CONFIGURATION, "heir")]
    assert norms == [BATCH_NORM.op, "torch.nn.modules.instancenorm.InstanceNorm3d"]


def test_a_residual_network_is_written_too(tmp_path):
    """Its blocks name their norms otherwise."""
    model = write_trained(tmp_path / "model", change=residual)
    write_model(model, tmp_path / "new", folds=(0,), **CHANGED)
    assert type(load_model(tmp_path / "new", (0,), "checkpoint_final.pth").network).__name__ == "ResidualEncoderUNet"
