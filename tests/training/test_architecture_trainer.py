"""UNETR within nnU-Net's own loop, on volumes small enough for a test."""

import json
from pathlib import Path

import pytest
import torch

from nnunet_norm.architectures import is_unetr
from nnunet_norm.errors import PlansError
from nnunet_norm.layers import BatchRenorm2d, find_norms

SIZES = {"feature_size": 2, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3}


@pytest.fixture
def flat(make_dataset):
    """A dataset with 2d plans for a UNETR of two tokens, three steps an epoch."""
    dataset = make_dataset()
    dataset.plans("2d", patch=[16, 32], unetr=SIZES)
    return dataset


def trainer_of(dataset, name, **kwargs):
    return dataset.trainer(name, "2d", **kwargs)


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def test_it_trains_validates_in_tiles_and_reports_what_it_did(flat):
    """No deep supervision, AdamW at 1e-4 with nnU-Net's schedule, and a validation in tiles of the patch, not exact."""
    trainer = trainer_of(flat, "nnUNetTrainerBRN_UNETR_2epochs")
    assert (trainer.initial_lr, trainer.enable_deep_supervision) == (1e-4, False)
    trainer.run_training()
    assert is_unetr(trainer.network)
    assert {type(norm) for norm in find_norms(trainer.network).values()} == {BatchRenorm2d}
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == trainer.weight_decay == 3e-5
    assert trainer.lr_scheduler.get_last_lr() == [pytest.approx(1e-4 * (1 / 2) ** 0.9)]
    trainer.perform_actual_validation()
    report = json.loads(Path(trainer.output_folder, "validation", "norm_report.json").read_text())
    (plan,) = report["predictor"]["plans"]
    assert plan["plan"] == "tiles"
    assert plan["tile_size"] == [16, 32]
    assert not report["predictor"]["exact"]
    assert plan["reason"] == "no halo can make it exact, because vit.blocks.0.attn (SABlock: bmm) sees the whole tile"
    assert report["train_eval_disparity"]["num_batches"] > 0
    assert "UNETR for tiles of 16x32 alone (feature_size 2, hidden_size 12, mlp_dim 16, num_heads 3); AdamW" in log_of(
        trainer
    )


def test_micro_batches_and_checkpointing_give_the_gradients_of_the_whole_batch(flat):
    """Three steps with the same seed, both at once against neither; with GroupNorm, which does not see the batch."""
    flat.plans("2d", "whole", patch=[16, 32], unetr=SIZES, seed=1)
    flat.plans("2d", "parts", patch=[16, 32], unetr=SIZES, seed=1, micro_batch_size=1, activation_checkpointing=True)
    weights = []
    for plans in ("whole", "parts"):
        trainer = trainer_of(flat, "nnUNetTrainerGN_UNETR_1epochs", plans=plans)
        trainer.run_training()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.network.parameters()]))
    assert "Activation checkpointing: 20 segments" in log_of(trainer)
    moved = (weights[0] - weights[1]).abs().max()
    assert moved < 2e-5  # AdamW's steps are of 1e-4, whatever the size of a gradient


def test_the_plans_learning_rate_wins_and_one_for_sgd_is_warned_of(flat):
    """A rate that the plans name is used as it is; 0.01 with AdamW is said to be too high."""
    flat.plans("2d", "fast", patch=[16, 32], unetr=SIZES, initial_lr=0.01)
    trainer = trainer_of(flat, "nnUNetTrainerInstanceNorm_UNETR", plans="fast")
    trainer.initialize()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01
    assert "WARNING: initial_lr of the plans is 0.01, as for SGD" in log_of(trainer)


def test_a_patch_without_whole_tokens_is_refused_before_anything_is_written(flat):
    """Plans that were not made for a UNETR may have any patch."""
    flat.plans("2d", "odd", patch=[24, 32])
    with pytest.raises(PlansError, match=r"^-tr nnUNetTrainerBRN_UNETR: patch size 24x32 .*--patch-size 32 32$"):
        trainer_of(flat, "nnUNetTrainerBRN_UNETR", plans="odd")
    assert not list((flat.root / "results").rglob("*UNETR*"))


def test_without_the_word_nothing_changes(flat):
    """A trainer without _UNETR trains the U-Net of the same plans, with SGD and deep supervision as nnU-Net does."""
    trainer = trainer_of(flat, "nnUNetTrainerBRN")
    trainer.initialize()
    assert not is_unetr(trainer.network)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert (trainer.initial_lr, trainer.enable_deep_supervision) == (0.01, True)
    assert trainer.network.decoder.deep_supervision
    trainer.set_deep_supervision_enabled(False)
    assert not trainer.network.decoder.deep_supervision
    (line,) = [line for line in log_of(trainer).splitlines() if "WARNING" in line]
    assert line.rstrip().endswith(
        "WARNING: the plans are for a UNETR, and nnUNetTrainerBRN trains their U-Net, with an initial learning rate of "
        "0.01: put _UNETR behind the norm of the trainer's name"
    )


def test_a_patch_for_tokens_alone_is_refused_for_the_u_net_of_the_same_plans(flat):
    """Six stages have a total stride of 32, which does not divide 48; three tokens do."""
    flat.plans("2d", "tokens", patch=[48, 48], num_stages=6, unetr=SIZES)
    trainer_of(flat, "nnUNetTrainerBRN_UNETR", plans="tokens")
    with pytest.raises(PlansError) as refusal:
        trainer_of(flat, "nnUNetTrainerBRN", plans="tokens")
    assert str(refusal.value) == (
        "-tr nnUNetTrainerBRN: patch size 48x48 is not divisible by the total stride 32x32 of the plans' U-Net: put _UNETR, "
        "which the plans are for, behind the norm of the trainer's name"
    )
