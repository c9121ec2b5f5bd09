"""The trainers within nnU-Net's own loop, on volumes small enough for a test."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import BatchRenorm2d, BatchRenorm3d, GroupNorm, TrackedInstanceNorm3d, find_norms
from nnunet_norm.training import progress

NORMS = {
    "nnUNetTrainerBRN": BatchRenorm3d,
    "nnUNetTrainerGN": GroupNorm,
    "nnUNetTrainerInstanceNorm": nn.InstanceNorm3d,
    "nnUNetTrainerINTracked": TrackedInstanceNorm3d,
    "nnUNetTrainerBatchNorm": nn.BatchNorm3d,
    "nnUNetTrainerNoNorm": None,
    "nnUNetTrainerNorm": nn.InstanceNorm3d,
}

DRAW = progress.NormLogger.plot_progress_png  # the fixtures leave it out


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def read_json(*parts):
    return json.loads(Path(*parts).read_text())


def report_of(trainer):
    return read_json(trainer.output_folder, "validation", "norm_report.json")


@pytest.mark.parametrize(("name", "norm"), NORMS.items())
def test_every_trainer_trains_validates_and_reports(dataset, name, norm):
    trainer = dataset.trainer(f"{name}_1epochs")
    trainer.run_training()
    trainer.perform_actual_validation(save_probabilities=True)
    assert {type(m) for m in find_norms(trainer.network).values()} == ({norm} if norm else set())
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert len(logged[progress.DISPARITY]) == 1
    assert len(logged[progress.DISPARITY_PER_CLASS][0]) == 2
    report = report_of(trainer)
    assert report["predictor"]["name"] == "nnunet_norm HaloPredictor"
    assert [plan["plan"] for plan in report["predictor"]["plans"]] == ["stages"]
    assert report["predictor"]["exact"]
    assert set(report["train_eval_disparity"]["per_class"]) == {"1", "2"}
    assert ("batch_renorm" in report) == (name == "nnUNetTrainerBRN")
    validation = read_json(trainer.output_folder, "validation", "summary.json")
    assert "foreground_mean" in validation
    (probabilities,) = Path(trainer.output_folder, "validation").glob("*.npz")
    assert np.load(probabilities)["probabilities"].dtype == np.float32
    assert "halo predictor" in log_of(trainer)


def test_the_plans_saved_with_a_model_are_those_that_were_given(dataset):
    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs")
    trainer.on_train_start()
    given = read_json(dataset.folder, "tiny.json")
    saved = read_json(trainer.output_folder_base, "plans.json")
    assert saved == given
    assert "InstanceNorm3d" in saved["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"]


@pytest.mark.parametrize("stock", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_plain_and_residual_networks_in_2d_and_3d_train_with_brn(make_dataset, stock, configuration):
    dataset = make_dataset(stock=stock)
    dataset.plans(configuration)
    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs", configuration)
    trainer.run_training()
    trainer.perform_actual_validation()
    expected = BatchRenorm2d if configuration == "2d" else BatchRenorm3d
    assert {type(m) for m in find_norms(trainer.network).values()} == {expected}
    (plan,) = report_of(trainer)["predictor"]["plans"]
    assert (plan["plan"], plan["population"], plan["exact"]) == ("stages", "stored", True)
    assert report_of(trainer)["tile_mismatch"]["verdict"].startswith("no")


def test_regions_are_measured_per_region(make_dataset):
    dataset = make_dataset(labels={"background": 0, "whole": [1, 2], "tumor": 2}, regions_class_order=[1, 2])
    dataset.plans()
    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs")
    trainer.run_training()
    trainer.perform_actual_validation()
    assert set(report_of(trainer)["train_eval_disparity"]["per_class"]) == {"(1, 2)", "2"}


def test_the_ignore_label_is_not_predicted(make_dataset):
    def edit(labels):
        labels[:4] = 3
        return labels

    dataset = make_dataset(labels={"background": 0, "kidney": 1, "tumor": 2, "ignore": 3}, edit=edit)
    dataset.plans()
    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs")
    trainer.run_training()
    trainer.perform_actual_validation()
    assert set(report_of(trainer)["train_eval_disparity"]["per_class"]) == {"1", "2"}


def test_without_deep_supervision(dataset):
    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs")
    trainer.enable_deep_supervision = False
    trainer.run_training()
    assert len(trainer.logger.get_value(progress.DISPARITY, None)) == 1


def test_the_cascade_goes_from_lowres_to_fullres(make_dataset):
    dataset = make_dataset()
    plans = dataset.plans("3d_cascade_fullres")
    dataset.preprocess(plans, "3d_lowres")
    lowres = plans["configurations"]["3d_lowres"]
    lowres["patch_size"] = [16, 16, 16]
    (dataset.folder / "tiny.json").write_text(json.dumps(plans))
    first = dataset.trainer("nnUNetTrainerBRN_1epochs", "3d_lowres", fold="all")
    first.run_training()
    first.perform_actual_validation()
    second = dataset.trainer("nnUNetTrainerBRN_1epochs", "3d_cascade_fullres", fold="all")
    second.run_training()
    second.perform_actual_validation()
    assert second.num_input_channels == 3
    assert report_of(second)["num_cases"] == 5


def test_brn_opens_its_limits_by_shares_of_the_planned_iterations(dataset):
    trainer = dataset.trainer("nnUNetTrainerBRN_10epochs")
    trainer.initialize()
    layer = trainer.renorms[0]
    assert (layer.warmup_steps, layer.ramp_steps) == (12, 9)  # 40 % and 30 % of 10 epochs with 3 iterations
    assert (
        "BatchNorm for 12 of 30 iterations, then limits that open over 9 to r_max=3.0, d_max=5.0; momentum 0.1"
        in log_of(trainer)
    )


def test_brn_takes_its_settings_from_the_plans_block(dataset):
    dataset.plans(name="mild", batch_renorm={"r_max": 2.0, "momentum": 0.05, "warmup": 0.1})
    trainer = dataset.trainer("nnUNetTrainerBRN_10epochs", plans="mild")
    trainer.initialize()
    layer = trainer.renorms[0]
    assert (layer.r_max, layer.d_max, layer.momentum, layer.warmup_steps) == (2.0, 5.0, 0.05, 3)


def test_settings_of_the_block_reach_the_training(dataset):
    dataset.plans(name="other", iterations_per_epoch=7, initial_lr=0.003, disparity_batches=2)
    trainer = dataset.trainer("nnUNetTrainerGN_4epochs", plans="other")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (4, 7, 2)
    assert (trainer.initial_lr, trainer.disparity_batches) == (0.003, 2)


def test_stock_plans_leave_nnunets_own_numbers(dataset):
    plans = read_json(dataset.folder, "tiny.json")
    del plans["configurations"]["3d_fullres"]["nnunet_norm"]
    (dataset.folder / "stock.json").write_text(json.dumps(plans))
    trainer = dataset.trainer("nnUNetTrainerBRN", plans="stock")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (
        1000,
        250,
        50,
    )
    assert trainer.disparity_batches == 5


def test_a_continued_training_is_the_uninterrupted_one(dataset):
    """Weights, running statistics, schedule, seeds and log: all of it, after a checkpoint in the middle of the ramp."""
    dataset.plans(name="seeded", seed=3)
    straight = dataset.trainer("nnUNetTrainerBRN_4epochs", plans="seeded")
    straight.save_every = 2
    straight.run_training()
    expected = {k: v.clone() for k, v in straight.network.state_dict().items()}

    interrupted = dataset.trainer("nnUNetTrainerBRN_4epochs", plans="seeded", fold=1)
    interrupted.fold = 0  # the same split in another results folder
    interrupted.save_every = 2
    interrupted.on_epoch_end = _raise_after(interrupted, 2)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run_training()
    continued = dataset.trainer("nnUNetTrainerBRN_4epochs", plans="seeded", fold=1, continued=True)
    continued.fold = 0
    continued.load_checkpoint(f"{interrupted.output_folder}/checkpoint_latest.pth")
    assert continued.current_epoch == 2
    assert continued.renorms[0].num_batches_tracked == 6
    continued.run_training()
    for key, value in continued.network.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for key in (progress.DISPARITY, progress.CLIPPED, "train_losses", "mean_fg_dice"):
        np.testing.assert_array_equal(continued.logger.get_value(key, None), straight.logger.get_value(key, None))


def _raise_after(trainer, epochs):
    original = trainer.on_epoch_end

    def on_epoch_end():
        original()
        if trainer.current_epoch == epochs:
            raise KeyboardInterrupt

    return on_epoch_end


def test_a_checkpoint_without_our_keys_is_continued_with_gaps(dataset):
    trainer = dataset.trainer("nnUNetTrainerBRN_3epochs")
    trainer.save_every = 1
    trainer.on_epoch_end = _raise_after(trainer, 2)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    path = f"{trainer.output_folder}/checkpoint_latest.pth"
    checkpoint = torch.load(path, weights_only=False)
    for key in progress.EVERY_NORM + progress.BATCH_RENORM:
        del checkpoint["logging"][key]
    torch.save(checkpoint, path)
    continued = dataset.trainer("nnUNetTrainerBRN_3epochs", continued=True)
    continued.load_checkpoint(path)
    continued.run_training()
    values = continued.logger.get_value(progress.CLIPPED, None)
    assert [math.isnan(v) for v in values] == [True, True, False]


@pytest.mark.parametrize(
    ("batch_size", "fold", "num_cases", "num_batches", "measured_size"),
    [(2, 0, 1, 1, 2), (4, "all", 5, 5, 4), (3, "all", 5, 5, 3), (12, 0, 1, 1, 8)],
)
def test_final_disparity_is_measured_on_batches_of_the_trainings_size(
    dataset, batch_size, fold, num_cases, num_batches, measured_size
):
    """It depends on that size. A case gives 8 tiles at most, so one case and a batch of 12 is measured on 8: that is said."""
    dataset.plans(name="batch", batch_size=batch_size, iterations_per_epoch=1)
    trainer = dataset.trainer("nnUNetTrainerBatchNorm_1epochs", plans="batch", fold=fold)
    trainer.run_training()
    trainer.perform_actual_validation()
    report = report_of(trainer)
    assert report["num_cases"] == num_cases
    disparity = report["train_eval_disparity"]
    assert (disparity["num_batches"], disparity["batch_size"]) == (num_batches, measured_size)


def test_the_progress_picture_has_a_panel_more(dataset):
    from PIL import Image

    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs")
    trainer.run_training()
    DRAW(trainer.logger.local_logger, trainer.output_folder)
    with Image.open(f"{trainer.output_folder}/progress.png") as picture:
        width, height = picture.size
        panel = np.asarray(picture.convert("L").crop((0, height - 1800, width, height)))
    assert (width, height) == (3000, 5400 + 1800)
    assert (panel < 100).mean() > 0.001  # something is drawn


@pytest.mark.parametrize("name", ["nnUNetTrainerBatchNorm", "nnUNetTrainerINTracked", "nnUNetTrainerBRN"])
def test_short_trainings_forget_the_initial_statistics(dataset, name):
    """Started from absurd values, the statistics after one epoch are the same as started from zeros and ones."""

    def trained(initial):
        trainer = dataset.trainer(f"{name}_1epochs", plans="seeded")
        trainer.initialize()
        for norm in find_norms(trainer.network).values():
            norm.running_mean.fill_(initial)
            norm.running_var.fill_(1 + initial)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        trainer.network.train()
        with torch.no_grad():  # the same weights at every step: only the statistics move
            for _ in range(trainer.num_iterations_per_epoch):
                trainer.network(next(trainer.dataloader_train)["data"])
        trainer.on_train_epoch_end([{"loss": np.array(0.0)}])
        return trainer.network.state_dict()

    dataset.plans(name="seeded", seed=5)
    ordinary, absurd = trained(0.0), trained(1000.0)
    for key, value in ordinary.items():
        # The schedule of BRN is in its warm-up here, where nothing depends on the running statistics.
        torch.testing.assert_close(absurd[key], value, rtol=2e-3, atol=2e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_a_new_training_starts_the_schedule_afresh_whatever_the_pretrained_weights_bring(dataset):
    trainer = dataset.trainer("nnUNetTrainerBRN_1epochs")
    trainer.initialize()
    for layer in trainer.renorms:
        layer.num_batches_tracked.fill_(100_000)
    trainer.on_train_start()
    assert all(layer.num_batches_tracked == 0 for layer in trainer.renorms)


def test_a_norm_in_the_plans_that_contradicts_the_trainers_name_is_refused_before_anything_is_written(dataset):
    dataset.plans(name="grouped", norm_op="nnunet_norm.layers.GroupNorm")
    with pytest.raises(
        PlansError, match=r"norm_op is 'nnunet_norm.layers.GroupNorm' and -tr nnUNetTrainerBRN says batch_renorm"
    ):
        dataset.trainer("nnUNetTrainerBRN", plans="grouped")
    assert not (dataset.root / "results").exists()


@pytest.mark.parametrize("name", ["nnUNetTrainerGN", "nnUNetTrainerNorm"])
def test_the_same_norm_in_plans_and_name_is_no_contradiction(dataset, name):
    dataset.plans(name="grouped", norm_op="nnunet_norm.layers.GroupNorm", norm_op_kwargs={"group_size": 2})
    trainer = dataset.trainer(name, plans="grouped")
    trainer.initialize()
    assert {type(m) for m in find_norms(trainer.network).values()} == {GroupNorm}
    assert find_norms(trainer.network)["encoder.stages.0.0.convs.0.norm"].num_groups == 2


def test_brn_of_the_plans_keeps_what_the_plans_give_it_and_takes_the_rest_from_the_block(dataset):
    changes = {"norm_op": "nnunet_norm.layers.BatchRenorm3d", "norm_op_kwargs": {"r_max": 2.0, "warmup_steps": 4}}
    dataset.plans(name="own", batch_renorm={"d_max": 1.5, "ramp": 0.5}, **changes)
    trainer = dataset.trainer("nnUNetTrainerNorm_10epochs", plans="own")
    trainer.initialize()
    layer = trainer.renorms[0]
    assert (layer.r_max, layer.d_max, layer.warmup_steps, layer.ramp_steps) == (2.0, 1.5, 4, 15)


def test_settings_of_brn_in_two_places_are_refused(dataset):
    dataset.plans(name="twice", norm_op="nnunet_norm.layers.BatchRenorm3d", norm_op_kwargs={"r_max": 2.0})
    with pytest.raises(PlansError, match=r"norm_op_kwargs has r_max, whose home .* is nnunet_norm.batch_renorm"):
        dataset.trainer("nnUNetTrainerBRN", plans="twice")


def test_a_block_that_is_not_valid_is_refused_before_anything_is_written(dataset):
    plans = read_json(dataset.folder, "tiny.json")
    plans["configurations"]["3d_fullres"]["nnunet_norm"]["itertions"] = 3
    (dataset.folder / "tiny.json").write_text(json.dumps(plans))
    with pytest.raises(PlansError, match=r"nnunet_norm.itertions is not a setting; valid ones are"):
        dataset.trainer("nnUNetTrainerBRN")
    assert not (dataset.root / "results").exists()


def test_a_norm_that_cannot_be_imported_is_refused(dataset):
    plans = read_json(dataset.folder, "tiny.json")
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.InstnceNorm3d"
    (dataset.folder / "tiny.json").write_text(json.dumps(plans))
    with pytest.raises(PlansError, match=r"norm_op is 'torch.nn.InstnceNorm3d', which cannot be imported"):
        dataset.trainer("nnUNetTrainerNorm")


def test_a_network_without_norms_has_none_to_exchange(dataset):
    plans = read_json(dataset.folder, "tiny.json")
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = None
    (dataset.folder / "tiny.json").write_text(json.dumps(plans))
    with pytest.raises(PlansError, match="norm_op is None and -tr nnUNetTrainerBRN says batch_renorm"):
        dataset.trainer("nnUNetTrainerBRN")
    dataset.trainer("nnUNetTrainerNoNorm").initialize()


def test_a_large_disparity_is_warned_about_once_with_a_remedy(dataset):
    from nnunet_norm.training.disparity import Disparity

    trainer = dataset.trainer("nnUNetTrainerBatchNorm_3epochs")
    trainer.initialize()
    for epoch, value in enumerate([0.05, 0.4, 0.5]):
        trainer.current_epoch = epoch
        trainer.log_disparity(Disparity(per_class=[value, value], num_batches=1))
    log = log_of(trainer)
    assert log.count("WARNING") == 1
    assert "train/eval disparity is 0.400" in log
    assert "train with a larger batch, or with nnUNetTrainerBRN" in log
