"""PreciseBN, FrozenBN and GhostBN within nnU-Net's own loop."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import FrozenBatchNorm, GhostBatchNorm3d, find_norms
from nnunet_norm.statistics import estimate_population_statistics
from nnunet_norm.training import progress
from nnunet_norm.training.reestimating import POPULATION_SAMPLES

EPOCHS, STEPS = 4, 3
PRECISE, FROZEN, GHOST = (f"nnUNetTrainer{norm}_{EPOCHS}epochs" for norm in ("PreciseBN", "FrozenBN", "GhostBN"))


@pytest.fixture
def plans(dataset):
    dataset.plans(
        name="seeded",
        seed=3,
        population_samples=5,
        frozen_share=0.5,
        reestimate_every=3,
        batch_size=4,
        normalization_batch_size=2,
    )
    return dataset


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def statistics_of(network):
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k}


class StoppedError(Exception):
    pass


def stopped_in(trainer, method, call):
    """The trainer raises in the given call of a method, as if the process ended there."""
    original, calls = getattr(trainer, method), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise StoppedError
        return original(*args, **kwargs)

    setattr(trainer, method, counted)
    return trainer


@pytest.mark.parametrize(
    ("name", "method", "call"),
    [
        (PRECISE, "train_step", 8),  # in the epoch after which the statistics are re-estimated
        (PRECISE, "train_step", 11),  # after it
        (PRECISE, "reestimate", 2),  # before the final checkpoint
        (FROZEN, "train_step", 2 * STEPS),  # before the freezing
        (FROZEN, "reestimate", 1),
        (FROZEN, "train_step", 2 * STEPS + 2),  # in the warm-up
        (FROZEN, "train_step", 3 * STEPS + 2),  # after it
        (GHOST, "train_step", 7),
    ],
)
def test_a_training_stopped_at_any_moment_and_continued_is_the_uninterrupted_one(plans, name, method, call):
    """Weights, statistics, learning rates and log are the same to the last bit."""
    straight = plans.trainer(name, plans="seeded")
    straight.run_training()
    expected = {k: v.clone() for k, v in straight.network.state_dict().items()}

    stopped = plans.trainer(name, plans="seeded", fold=1)
    stopped.fold, stopped.save_every = 0, 1  # the same split in another results folder
    with pytest.raises(StoppedError):
        stopped_in(stopped, method, call).run_training()
    continued = plans.trainer(name, plans="seeded", fold=1, continued=True)
    continued.fold = 0
    continued.load_checkpoint(f"{stopped.output_folder}/checkpoint_latest.pth")
    assert 0 < continued.current_epoch < EPOCHS
    continued.run_training()
    for key, value in continued.network.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for key in (progress.DISPARITY, "lrs", "train_losses", "mean_fg_dice"):
        np.testing.assert_array_equal(continued.logger.get_value(key, None), straight.logger.get_value(key, None))


def test_precise_bn_ends_with_the_statistics_of_training_patches(plans):
    """The final checkpoint holds what the estimator gives for the same patches and weights, and nothing else changes."""
    trainer = plans.trainer(PRECISE, plans="seeded")
    estimates, reestimate = [], trainer.reestimate

    def watched():
        before = copy.deepcopy(trainer.network)
        patches = [next(trainer.dataloader_train) for _ in range(2)]  # 5 samples in batches of 4
        trainer.seed_estimate()
        loader, trainer.dataloader_train = trainer.dataloader_train, iter(patches)
        reestimate()
        trainer.dataloader_train = loader
        estimate_population_statistics(before, patches, progress=False)
        estimates.append((trainer.current_epoch, before))

    trainer.reestimate = watched
    trainer.run_training()
    assert [epoch for epoch, _ in estimates] == [2, EPOCHS]  # after every third epoch, and at the end
    final = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)["network_weights"]
    for key, value in estimates[-1][1].state_dict().items():
        assert torch.equal(value, final[key]), key
    assert "re-estimated from 8 training patches (batches of 4)" in log_of(trainer)
    assert {type(m) for m in find_norms(trainer.network).values()} == {nn.BatchNorm3d}


def test_precise_bn_takes_a_thousand_patches_unless_the_plans_say_otherwise(dataset, monkeypatch):
    trainer = dataset.trainer("nnUNetTrainerPreciseBN_1epochs")
    asked = []
    monkeypatch.setattr(
        "nnunet_norm.training.reestimating.estimate_population_statistics",
        lambda network, batches, num_iters, **_: asked.append(num_iters),
    )
    trainer.run_training()
    assert asked == [POPULATION_SAMPLES // 2]
    assert POPULATION_SAMPLES == 1000


def test_frozen_bn_trains_its_last_epochs_with_fixed_statistics_after_a_warm_up(plans):
    """From the freezing on the buffers stay, whatever ``train()`` is called, while weights and affine parameters go on."""
    trainer = plans.trainer(FROZEN, plans="seeded")
    seen, step = [], trainer.train_step

    def watched(batch):
        result = step(batch)
        lr = trainer.optimizer.param_groups[0]["lr"]
        seen.append((trainer.current_epoch, lr, statistics_of(trainer.network)))
        trainer.network.train()
        return result

    trainer.train_step = watched
    trainer.run_training()
    assert trainer.freeze_epoch == 2
    frozen = [buffers for epoch, _, buffers in seen if epoch >= 2]
    assert all(torch.equal(buffers[k], frozen[0][k]) for buffers in frozen for k in frozen[0])
    moving = [buffers for epoch, _, buffers in seen if epoch < 2]
    assert any(not torch.equal(moving[0][k], moving[1][k]) for k in moving[0])
    scheduled = trainer.logger.get_value("lrs", None)
    rates = [lr for epoch, lr, _ in seen if epoch == 2]
    np.testing.assert_allclose(rates, [scheduled[2] * k / STEPS for k in range(1, STEPS + 1)])
    assert [lr for epoch, lr, _ in seen if epoch == 3] == [scheduled[3]] * STEPS
    assert {type(m) for m in find_norms(trainer.network).values()} == {FrozenBatchNorm}
    assert trainer.logger.get_value(progress.DISPARITY, None)[2:] == [0, 0] or all(
        np.isnan(trainer.logger.get_value(progress.DISPARITY, None)[2:])
    )
    assert "disparity against plain batch statistics" in log_of(trainer)
    trainer.perform_actual_validation()
    final = plans.trainer(FROZEN, plans="seeded", continued=True)  # as nnUNetv2_train --val does
    final.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    assert {type(m) for m in find_norms(final.network).values()} == {FrozenBatchNorm}


def test_frozen_bn_keeps_parameters_buffers_and_optimizer(plans):
    """The freezing exchanges classes, not tensors: what optimizer and DDP hold stays what trains."""
    trainer = plans.trainer(FROZEN, plans="seeded")
    trainer.initialize()
    before = {k: v.data_ptr() for k, v in trainer.network.state_dict(keep_vars=True).items()}
    parameters = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trainer._freeze()
    assert {k: v.data_ptr() for k, v in trainer.network.state_dict(keep_vars=True).items()} == before
    assert {id(p) for p in trainer.network.parameters()} == parameters


@pytest.mark.parametrize(("epochs", "share", "first"), [(1000, None, 800), (10, 0.25, 8), (2, 0.1, 1), (1, 0.5, 1)])
def test_the_frozen_share_counts_epochs_from_the_end(dataset, epochs, share, first):
    name = f"share{share}"
    dataset.plans(name=name, **({} if share is None else {"frozen_share": share}))
    assert dataset.trainer(f"nnUNetTrainerFrozenBN_{epochs}epochs", plans=name).freeze_epoch == first


def test_ghost_bn_normalizes_parts_of_the_size_in_the_plans(plans):
    trainer = plans.trainer(GHOST, plans="seeded")
    trainer.run_training()
    norms = list(find_norms(trainer.network).values())
    assert {type(m) for m in norms} == {GhostBatchNorm3d}
    assert {m.normalization_batch_size for m in norms} == {2}
    assert {int(m.num_batches_tracked) for m in norms} == {EPOCHS * STEPS}  # once per step
    assert "2 of 4 samples are normalized together" in log_of(trainer)


def test_ghost_bn_needs_its_size_from_the_plans(dataset):
    with pytest.raises(PlansError, match="normalization_batch_size is missing, which -tr nnUNetTrainerGhostBN needs"):
        dataset.trainer("nnUNetTrainerGhostBN")
    dataset.plans(name="odd", batch_size=4, normalization_batch_size=3)
    with pytest.raises(PlansError, match="normalization_batch_size is 3, and the batch has 4 samples"):
        dataset.trainer("nnUNetTrainerGhostBN", plans="odd")
    assert not (dataset.root / "results").exists()


def test_continuing_a_finished_precise_bn_leaves_its_statistics(dataset):
    """nnU-Net ends such a training once more, before the validation that was missing; no seed is needed."""
    dataset.plans(name="short", population_samples=4)
    trainer = dataset.trainer("nnUNetTrainerPreciseBN_1epochs", plans="short")
    trainer.run_training()
    final = f"{trainer.output_folder}/checkpoint_final.pth"
    before = torch.load(final, weights_only=False)["network_weights"]
    again = dataset.trainer("nnUNetTrainerPreciseBN_1epochs", plans="short", continued=True)
    again.load_checkpoint(final)
    again.run_training()
    after = torch.load(final, weights_only=False)["network_weights"]
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_checkpoint_from_before_the_freezing_is_not_frozen(plans):
    """nnU-Net's --val_best loads one into the trainer that has just ended."""
    trainer = plans.trainer(FROZEN, plans="seeded")
    trainer.initialize()
    trainer.on_train_start()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_best.pth")
    trainer._freeze()
    trainer.load_checkpoint(f"{trainer.output_folder}/checkpoint_best.pth")
    assert {type(m) for m in find_norms(trainer.network).values()} == {nn.BatchNorm3d}


def test_a_patch_that_is_not_finite_costs_the_estimate_and_not_the_training(plans):
    trainer = plans.trainer(PRECISE, plans="seeded")
    trainer.initialize()
    trainer.dataloader_train = iter([{"data": torch.full((4, 1, 16, 16, 16), torch.inf)}] * 2)
    before = statistics_of(trainer.network)
    trainer.reestimate()
    assert all(torch.equal(before[k], v) for k, v in statistics_of(trainer.network).items())
    assert "WARNING: running statistics stay as they are" in log_of(trainer)
