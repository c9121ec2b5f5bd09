"""Learning rate and length of a training when its batch changes."""

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import derive_plans, resolve_configuration
from nnunet_norm.planning.schedule import (
    EPOCHS,
    INITIAL_LR,
    ITERATIONS_PER_EPOCH,
    VAL_ITERATIONS_PER_EPOCH,
    Schedule,
    kept_iterations,
    scaled_lr,
)

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
CASCADE = "3d_cascade_fullres"


@pytest.fixture
def plans() -> dict:
    return json.loads((STOCK / "nnUNetPlans.json").read_text())


def block(plans: dict, configuration: str = "3d_fullres") -> dict:
    return resolve_configuration(plans, configuration).get("nnunet_norm", {})


def test_what_no_plans_say_is_what_nnunet_trains_with(
    plans: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enforces nnU-Net's own learning rate, iterations and epochs where the plans have none."""
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    stock = copy.deepcopy(plans) | {"continue_training": False}
    trainer = nnUNetTrainer(stock, "3d_fullres", 0, description, device=torch.device("cpu"))
    iterations = (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch)
    assert iterations == (ITERATIONS_PER_EPOCH, VAL_ITERATIONS_PER_EPOCH)
    assert (trainer.initial_lr, trainer.num_epochs) == (INITIAL_LR, EPOCHS)
    assert Schedule.of(resolve_configuration(plans, "3d_fullres")) == Schedule(2, 250, 50, 0.01, 0)


@given(st.integers(1, 10_000), st.integers(1, 100), st.integers(1, 100))
def test_kept_iterations_see_as_many_samples_to_the_nearest(iterations: int, old: int, new: int) -> None:
    """Enforces that no other number of iterations, of at least one, is nearer to the samples of before."""
    kept = kept_iterations(iterations, old, new)
    missed = abs(kept * new - iterations * old)
    assert kept >= 1
    assert missed <= abs((kept + 1) * new - iterations * old)
    assert kept == 1 or missed <= abs((kept - 1) * new - iterations * old)


def test_learning_rates_follow_their_rule() -> None:
    """Enforces the closed forms, and that scaling back and forth changes nothing."""
    assert scaled_lr(0.01, 2, 16, "linear") == pytest.approx(0.08)
    assert scaled_lr(0.01, 2, 16, "sqrt") == pytest.approx(0.01 * math.sqrt(8))
    assert scaled_lr(0.01, 2, 16, "none") == 0.01
    for rule in ("linear", "sqrt"):
        assert scaled_lr(scaled_lr(0.02, 3, 40, rule), 40, 3, rule) == pytest.approx(0.02)


def test_a_larger_batch_scales_what_the_plans_have(plans: dict, caplog: pytest.LogCaptureFixture) -> None:
    """Enforces the entries from nnU-Net's values and, derived again, from the plans' own; and that rounding is told."""
    caplog.set_level(logging.INFO)
    once = derive_plans(plans, "3d_fullres", batch_size=16, lr_scaling="linear", keep_samples=True, warmup_epochs=5)
    assert once["plans_name"] == "nnUNetPlans_b16_keep_lrlin_warm5"
    assert block(once) == {
        "num_iterations_per_epoch": 31,
        "num_val_iterations_per_epoch": 6,
        "initial_lr": pytest.approx(0.08),
        "warmup_epochs": 5,
    }
    assert "3d_fullres: learning rate 0.01 -> 0.08 (linear, batch 2 -> 16)" in caplog.text
    assert "250 iterations of 2 samples become 31 of 16: rounded, 496 samples per epoch instead of 500" in caplog.text
    twice = derive_plans(once, "3d_fullres", batch_size=4, lr_scaling="sqrt", keep_samples=True)
    assert block(twice) == block(once) | {
        "num_iterations_per_epoch": 124,
        "num_val_iterations_per_epoch": 24,
        "initial_lr": pytest.approx(0.04),
    }
    given = derive_plans(plans, "3d_fullres", batch_size=500, keep_samples=True, val_iterations_per_epoch=7)
    assert block(given) == {"num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 7}
    most = derive_plans(plans, "3d_fullres", batch_size=500, keep_samples=True)
    assert block(most)["num_val_iterations_per_epoch"] == 1
    assert "31 iterations of 16 samples become 124 of 4\n" in caplog.text
    same = derive_plans(once, "3d_fullres", batch_size=4, lr_scaling="none")
    assert (block(same), same["plans_name"]) == (block(once), "nnUNetPlans_b16_keep_lrlin_warm5_b4_lrnone")


def test_what_follows_the_batch_stays_with_its_resolution(plans: dict) -> None:
    """Enforces that the other stage of a cascade keeps its batch, learning rate, iterations and parts of the batch."""
    options = {"batch_size": 8, "lr_scaling": "linear", "keep_samples": True, "micro_batch_size": 2}
    derived = derive_plans(plans, CASCADE, **options, activation_checkpointing=True, warmup_epochs=3)
    assert block(derived, CASCADE) == {
        "num_iterations_per_epoch": 62,
        "num_val_iterations_per_epoch": 12,
        "initial_lr": pytest.approx(0.04),
        "micro_batch_size": 2,
        "activation_checkpointing": True,
        "warmup_epochs": 3,
    }
    assert block(derived, "3d_lowres") == {"warmup_epochs": 3}
    assert resolve_configuration(derived, "3d_lowres")["batch_size"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scaling": "cubic", "batch_size": 4}, "lr_scaling is 'cubic'; it must be one of linear, sqrt, none"),
        ({"lr_scaling": "sqrt"}, "lr_scaling is 'sqrt' without batch_size; .*give batch_size too"),
        ({"keep_samples": True}, "keep_samples is True without batch_size"),
        ({"lr_scaling": "sqrt", "initial_lr": 0.1, "batch_size": 4}, "lr_scaling and initial_lr both say"),
        (
            {"keep_samples": True, "iterations_per_epoch": 9, "batch_size": 4},
            "keep_samples and iterations_per_epoch both",
        ),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; .*at least 0"),
        ({"checkpoint_minutes": -1}, r"nnunet_norm\.checkpoint_minutes is -1; .*at least 0"),
    ],
)
def test_contradictions_are_refused_in_one_line(plans: dict, options: dict, message: str) -> None:
    """Enforces that options that say the same, or mean nothing alone, are named with the remedy."""
    with pytest.raises(PlansError, match=message) as refusal:
        derive_plans(plans, "2d", **options)
    assert "\n" not in str(refusal.value)


def test_a_warm_up_can_be_taken_back(plans: dict) -> None:
    """Enforces that 0 epochs replace those of the plans derived from."""
    derived = derive_plans(derive_plans(plans, "2d", warmup_epochs=5), "2d", warmup_epochs=0)
    assert Schedule.of(resolve_configuration(derived, "2d")).warmup_epochs == 0
    assert derived["plans_name"] == "nnUNetPlans_warm5_warm0"


def test_off_is_an_answer_for_checkpointing_only(plans: dict) -> None:
    """Enforces that checkpointing can be turned off again, and checkpoints written each epoch, with names of their own."""
    on = derive_plans(plans, "2d", activation_checkpointing=True)
    off = derive_plans(on, "2d", activation_checkpointing=False, keep_samples=False, checkpoint_minutes=0)
    assert off["plans_name"] == "nnUNetPlans_ckpt_nockpt_save0"
    assert block(off, "2d") == {"activation_checkpointing": False, "checkpoint_minutes": 0}


def test_batch_dice_is_a_key_of_the_named_configuration(plans: dict) -> None:
    """Enforces both answers, under names of their own, and that the other stage of a cascade keeps its own."""
    derived = derive_plans(plans, CASCADE, batch_dice=True, batch_size=4)
    assert derived["plans_name"] == "nnUNetPlans_b4_bdice"
    assert resolve_configuration(derived, CASCADE)["batch_dice"] is True
    lowres = [resolve_configuration(each, "3d_lowres")["batch_dice"] for each in (plans, derived)]
    assert lowres[0] == lowres[1]
    assert derive_plans(plans, "2d", batch_dice=False)["plans_name"] == "nnUNetPlans_sdice"
    with pytest.raises(PlansError, match="batch_dice is 1; it must be true or false"):
        derive_plans(plans, "2d", batch_dice=1)  # type: ignore[arg-type]
