"""Trainer names through nnU-Net's own finder."""

from importlib.resources import files
from itertools import product

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_norm import cli
from nnunet_norm.errors import TrainerNameError
from nnunet_norm.training import NormTrainer
from nnunet_norm.training.losses import LOSSES

NORMS = (
    "BRN",
    "GN",
    "InstanceNorm",
    "INTracked",
    "BatchNorm",
    "PreciseBN",
    "FrozenBN",
    "GhostBN",
    "BEN",
    "NoNorm",
    "Norm",
)


@pytest.fixture(autouse=True)
def trainers_folder(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(files("nnunet_norm.trainers")))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_is_found_with_and_without_a_number_of_epochs(norm):
    """These names stand in results folders and in checkpoints: they never change."""
    for suffix, epochs in (("", None), ("_1epochs", 1), ("_250epochs", 250)):
        trainer = recursive_find_trainer_class_by_name(f"nnUNetTrainer{norm}{suffix}")
        assert trainer.__name__ == f"nnUNetTrainer{norm}{suffix}"
        assert trainer.epochs == epochs
        assert trainer.loss_name is None
        assert issubclass(trainer, NormTrainer)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_found_with_and_without_a_number_of_epochs(loss):
    """Behind any norm; the class differs from the norm's own in these attributes alone."""
    for norm, (suffix, epochs) in product(("BRN", "PreciseBN", "Norm"), (("", None), ("_250epochs", 250))):
        trainer = recursive_find_trainer_class_by_name(f"nnUNetTrainer{norm}_{loss}{suffix}")
        assert trainer.__name__ == f"nnUNetTrainer{norm}_{loss}{suffix}"
        assert (trainer.loss_name, trainer.epochs) == (loss, epochs)
        assert trainer.__bases__[0].__name__ == f"nnUNetTrainer{norm}"


@pytest.mark.parametrize("norm", ["BRN", "PreciseBN", "Norm"])
def test_norms_are_found_as_a_unetr(norm):
    """Names that are in checkpoints: the architecture stands right behind the norm, before loss and epochs."""
    for options, said in (
        ("", {"loss_name": None, "epochs": None}),
        ("_DiceTopK", {"loss_name": "DiceTopK", "epochs": None}),
        ("_DiceFocal_5epochs", {"loss_name": "DiceFocal", "epochs": 5}),
    ):
        trainer = recursive_find_trainer_class_by_name(f"nnUNetTrainer{norm}_UNETR{options}")
        assert {name: getattr(trainer, name) for name in said} == said
        assert trainer.architecture == "UNETR"
        assert trainer.norm == recursive_find_trainer_class_by_name(f"nnUNetTrainer{norm}").norm
    with pytest.raises(TrainerNameError, match=rf"take nnUNetTrainer{norm}_UNETR_DiceTopK$"):
        recursive_find_trainer_class_by_name(f"nnUNetTrainer{norm}_DiceTopK_UNETR")


def test_the_losses_are_these():
    """Names of results folders and in checkpoints: they never change."""
    assert set(LOSSES) == {"DiceFocal", "DiceTopK", "DicePerim"}


def test_options_in_another_order_are_refused_with_the_right_name():
    with pytest.raises(TrainerNameError) as refusal:
        recursive_find_trainer_class_by_name("nnUNetTrainerGN_250epochs_DiceTopK")
    assert str(refusal.value) == (
        "-tr nnUNetTrainerGN_250epochs_DiceTopK: options stand in another order: take nnUNetTrainerGN_DiceTopK_250epochs"
    )


def test_what_each_name_means_never_changes():
    meaning = {n: recursive_find_trainer_class_by_name(f"nnUNetTrainer{n}").norm for n in NORMS}
    assert meaning == {
        "BRN": "batch_renorm",
        "GN": "group_norm",
        "InstanceNorm": "instance_norm",
        "INTracked": "instance_norm_tracked",
        "BatchNorm": "batch_norm",
        "PreciseBN": "batch_norm",
        "FrozenBN": "batch_norm",
        "GhostBN": "ghost_batch_norm",
        "BEN": "batch_norm",
        "NoNorm": "none",
        "Norm": None,
    }


@pytest.mark.parametrize(
    "suffix",
    [
        "_",
        "_10epoch",
        "_0epochs",
        "_epochs",
        "_DiceBoundary",
        "_-3epochs",
        "_5epochs_5epochs",
        "_5epochs_6epochs",
        "_DiceFocal_DiceTopK",
        "_dicefocal",
        "_DiceFocal_",
        "_DiceFocal_\u0663epochs",
        "_UNETR_UNETR",
        "_unetr",
    ],
)
def test_an_unknown_suffix_is_one_line_that_lists_the_choice(suffix):
    with pytest.raises(
        TrainerNameError,
        match=rf"^-tr nnUNetTrainerBRN{suffix}: choose one of nnUNetTrainerBRN, nnUNetTr.*, nnUNetTrainerNorm, "
        r"with or without _UNETR, _<Loss> \(_DiceFocal, _DiceTopK, _DicePerim\) and _<N>epochs behind it "
        r"\(such as _DiceFocal_250epochs\)$",
    ):
        recursive_find_trainer_class_by_name(f"nnUNetTrainerBRN{suffix}")


def test_a_name_that_is_not_ours_is_left_to_nnunet():
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerOther"):
        recursive_find_trainer_class_by_name("nnUNetTrainerOther")


def test_nnunets_own_trainers_are_still_found():
    assert recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs").__module__.startswith("nnunetv2")


def test_another_folder_may_have_a_trainer_whose_name_begins_like_ours(tmp_path, monkeypatch):
    (tmp_path / "my_trainers.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerBRN_mine(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", f"{files('nnunet_norm.trainers')}:{tmp_path}")
    assert recursive_find_trainer_class_by_name("nnUNetTrainerBRN_mine").__name__ == "nnUNetTrainerBRN_mine"


def test_the_command_lists_every_name_and_what_may_stand_behind_it(capsys):
    cli.main(["trainers"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].removeprefix("nnUNetTrainer") for line in lines[: len(NORMS)]] == list(NORMS)
    options = (
        "_UNETR, _<Loss> (_DiceFocal, _DiceTopK, _DicePerim) and _<N>epochs behind it (such as _DiceFocal_250epochs)"
    )
    assert f"Each also with {options}. nnU-Net finds them after" in lines
