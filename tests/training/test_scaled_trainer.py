"""Trainers of large batches: micro-batches, checkpointing, warm-up and losses change what they say and nothing else."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import BatchNorm3d, BatchRenorm3d, find_norms
from nnunet_norm.training.scaled_trainer import ScaledTrainer

STEPS = 3


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def trained(trainer):
    """After one epoch, without the end of the training."""
    trainer.num_epochs = 2
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in range(STEPS)])
    return trainer


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.bare_network.state_dict().items()}


@pytest.mark.parametrize("norm", ["GN", "InstanceNorm", "NoNorm"])
def test_norms_of_single_samples_train_alike_whole_in_parts_and_checkpointed(dataset, norm):
    found = {}
    ways = {
        "whole": {},
        "parts": {"micro_batch_size": 2},
        "both": {"micro_batch_size": 1, "activation_checkpointing": True},
    }
    for name, options in ways.items():
        dataset.plans(name=name, seed=1, batch_size=3, **options)
        found[name] = weights_of(trained(dataset.trainer(f"nnUNetTrainer{norm}", plans=name)))
    for name in ("parts", "both"):
        for key, value in found["whole"].items():
            if key.endswith(("conv.bias", "all_modules.0.bias")) and norm == "InstanceNorm":
                continue  # the norm takes it out again: its gradient is rounding
            torch.testing.assert_close(found[name][key], value, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize(
    ("name", "norm", "says"),
    [
        ("nnUNetTrainerBRN", BatchRenorm3d, "norms over the batch normalize 2 samples at a time"),
        ("nnUNetTrainerBatchNorm", BatchNorm3d, "norms over the batch normalize 2 samples at a time"),
        ("nnUNetTrainerPreciseBN", BatchNorm3d, "norms over the batch normalize 2 samples at a time"),
    ],
)
def test_norms_over_the_batch_take_in_a_step_once(dataset, name, norm, says):
    dataset.plans(
        name="parts", batch_size=4, micro_batch_size=2, activation_checkpointing=True, seed=1, population_samples=4
    )
    trainer = dataset.trainer(f"{name}_1epochs", plans="parts")
    trainer.run_training()
    norms = find_norms(trainer.bare_network).values()
    assert {type(layer) for layer in norms} == {norm}
    assert {int(layer.num_batches_tracked) for layer in norms} == {STEPS}
    trainer.perform_actual_validation()
    assert trainer.normalization_batch_size == 2
    assert says in log_of(trainer)
    assert "segments are computed again" in log_of(trainer)


def test_ghost_batches_must_divide_micro_batches(dataset):
    dataset.plans(name="ghost", batch_size=4, normalization_batch_size=2, micro_batch_size=2)
    trainer = trained(dataset.trainer("nnUNetTrainerGhostBN", plans="ghost"))
    assert {int(layer.num_batches_tracked) for layer in find_norms(trainer.bare_network).values()} == {STEPS}
    block = trainer.plans_manager.plans["configurations"]["3d_fullres"]["nnunet_norm"]
    block["micro_batch_size"] = 3
    with pytest.raises(PlansError, match="a micro-batch has 3 samples"):
        type(trainer)(trainer.plans_manager.plans, "3d_fullres", 0, dataset.dataset_json, torch.device("cpu"))


def test_nothing_is_compiled_where_activations_are_computed_again(dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "t")
    for name, expected in (("tiny", True), ("again", False)):
        dataset.plans(name=name, activation_checkpointing=None if expected else True)
        trainer = dataset.trainer("nnUNetTrainerGN", plans=name)
        trainer.device = torch.device("cuda", 0)  # nnU-Net never compiles for a CPU
        assert trainer._do_i_compile() == expected


def test_the_learning_rate_rises_step_by_step_over_the_warm_up(dataset):
    dataset.plans(name="warm", warmup_epochs=2)
    trainer = dataset.trainer("nnUNetTrainerGN_4epochs", plans="warm")
    used = []
    trainer.on_train_start()
    step = trainer.optimizer.step

    def recorded(*args, **kwargs):
        used.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    trainer.optimizer.step = recorded
    for epoch in range(3):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(STEPS):
            trainer.train_step(next(trainer.dataloader_train))
    schedule = [0.01 * (1 - epoch / 4) ** 0.9 for epoch in range(3)]
    expected = [schedule[i // STEPS] * min((i + 1) / (2 * STEPS), 1) for i in range(3 * STEPS)]
    assert used == pytest.approx(expected)
    assert "Warm-up: it rises linearly from 0 over the first 2 epochs" in log_of(trainer)


@pytest.mark.parametrize("loss", ["DiceFocal", "DiceTopK", "DicePerim"])
def test_losses_train_with_every_norm_in_parts(dataset, loss):
    dataset.plans(name="parts", batch_size=3, micro_batch_size=2)
    trainer = trained(dataset.trainer(f"nnUNetTrainerBRN_{loss}_5epochs", plans="parts"))
    assert trainer.epochs == 5
    assert math.isfinite(trainer.logger.get_value("train_losses", step=-1))
    stock = dataset.trainer("nnUNetTrainerBRN", plans="parts")
    stock.initialize()
    assert type(trainer.loss) is type(stock.loss)
    assert trainer.loss.weight_factors == stock.loss.weight_factors
    assert str(trainer.loss.loss) != str(stock.loss.loss)


def test_a_loss_that_cannot_take_regions_is_refused_before_anything_is_written(make_dataset):
    dataset = make_dataset(labels={"background": 0, "whole": [1, 2], "tumor": 2}, regions_class_order=[1, 2])
    dataset.plans()
    with pytest.raises(PlansError, match="regions"):
        dataset.trainer("nnUNetTrainerBRN_DiceTopK")
    assert not (dataset.root / "results").exists()


def test_checkpoints_are_written_by_time_and_whole(dataset, monkeypatch):
    dataset.plans(name="often", checkpoint_minutes=0)
    dataset.plans(name="seldom")
    for name, expected in (("often", True), ("seldom", False)):
        trainer = dataset.trainer("nnUNetTrainerBRN_3epochs", plans=name)
        trainer.on_train_start()
        trainer.logger.local_logger.my_fantastic_logging.update(
            {
                key: [0.0]
                for key in ("train_losses", "val_losses", "mean_fg_dice", "epoch_start_timestamps", "ema_fg_dice")
            }
        )
        trainer.logger.local_logger.my_fantastic_logging["dice_per_class_or_region"] = [[0.0, 0.0]]
        names = []
        monkeypatch.setattr(trainer, "save_checkpoint", lambda filename, names=names: names.append(Path(filename).name))
        trainer.on_epoch_end()
        assert ("checkpoint_latest.pth" in names) == expected
        assert trainer.save_every == 50


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_one(dataset, monkeypatch):
    trainer = dataset.trainer("nnUNetTrainerBRN_2epochs")
    trainer.on_train_start()
    path = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()

    def stopped(content, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir() if "checkpoint" in file.name] == [path.name]


def test_stock_norms_of_the_plans_can_be_run_often(dataset):
    dataset.plans(
        name="stock",
        norm_op="torch.nn.BatchNorm3d",
        norm_op_kwargs={"momentum": 0.3},
        batch_size=4,
        micro_batch_size=2,
    )
    trainer = trained(dataset.trainer("nnUNetTrainerNorm", plans="stock"))
    norms = find_norms(trainer.bare_network).values()
    assert {(type(norm), norm.momentum, int(norm.num_batches_tracked)) for norm in norms} == {(BatchNorm3d, 0.3, STEPS)}
    fresh = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels, 3, True
    )
    fresh.load_state_dict(trainer.bare_network.state_dict())
    assert {type(norm) for norm in find_norms(fresh).values()} == {nn.BatchNorm3d}


def test_norms_that_wait_for_each_other_need_equally_many_micro_batches(dataset, monkeypatch):
    """Two processes with 3 and 2 samples in parts of 2 would run the network twice and once; the log counts both."""
    dataset.plans(name="wait", batch_size=5, micro_batch_size=2, batch_renorm={"sync": "full"})
    trainer = dataset.trainer("nnUNetTrainerBRN", plans="wait")
    trainer.initialize()
    assert "normalize 2 samples at a time" in log_of(trainer)
    monkeypatch.setattr(ScaledTrainer, "num_processes", 2)
    assert trainer.normalization_batch_size == 4
    with pytest.raises(PlansError, match=r"batch_size 5 gives the 2 processes 2 or 3 samples.*micro-batches of 2"):
        trainer._check_micro_batches()


def test_a_warm_up_longer_than_the_training_is_told(dataset):
    dataset.plans(name="warm", warmup_epochs=3)
    trainer = dataset.trainer("nnUNetTrainerGN_2epochs", plans="warm")
    trainer.initialize()
    assert "rises over 3 epochs, and the training has 2" in log_of(trainer)
