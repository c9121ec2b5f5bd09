"""nnUNetTrainerBEN within nnU-Net's own loop: one experimental batch at a time, with statistics of its own if asked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everybody's name for it
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunet_norm.errors import ExperimentalBatchesError
from nnunet_norm.experimental_batches import FILE_NAME
from nnunet_norm.layers import find_norms
from nnunet_norm.layers.domains import get_domain_statistics
from nnunet_norm.training import progress
from nnunet_norm.training.disparity import Disparity, measure_disparity

BATCHES = {"case0": "a", "case1": "a", "case2": "b", "case3": "b", "case4": "new"}
NAMES = ["a", "b", "new"]
FIRST = "encoder.stages.0.0.convs.0.norm"


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def write_batches(dataset, batches=BATCHES):
    (dataset.folder / FILE_NAME).write_text(json.dumps({"batches": batches}))


@pytest.fixture
def dataset(make_dataset):
    """Cases of three experimental batches that differ; fold 0 validates on all, and never trains on "new"."""
    dataset = make_dataset()
    dataset.stock["configurations"]["3d_fullres"]["normalization_schemes"] = ["NoNormalization"]
    for seed in (2, 3):
        path = dataset.root / "raw" / f"case{seed}_0000.nii.gz"
        dataset._write(path, sitk.GetArrayFromImage(sitk.ReadImage(path)) * 4 + 10)
    write_batches(dataset)
    split = {"train": ["case0", "case1", "case2", "case3"], "val": ["case1", "case3", "case4"]}
    (dataset.folder / "splits_final.json").write_text(json.dumps([split] * 2))
    dataset.plans(name="plain", seed=3, iterations_per_epoch=8)
    dataset.plans(name="domains", seed=3, iterations_per_epoch=8, domain_statistics=NAMES)
    return dataset


def observed(trainer):
    """Every training batch's experimental batch, and the statistics of what went into the first norm."""
    seen, step = [], trainer.train_step
    trainer.initialize()

    def remember(norm, inputs):
        if norm.training and trainer.network.training:
            x = inputs[0].detach()
            seen.append([None, x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4))])

    def train_step(batch):
        result = step(batch)
        (seen[-1][0],) = {BATCHES[case] for case in batch["keys"]}
        return result

    hook = find_norms(trainer.network)[FIRST].register_forward_pre_hook(remember)
    end = trainer.on_train_end
    trainer.on_train_end = lambda: (hook.remove(), end())  # blocks of the halo predictor would not call it
    trainer.train_step = train_step
    return seen


@pytest.mark.parametrize("plans", ["plain", "domains"])
def test_it_trains_validates_and_its_model_is_loaded_without_the_file(dataset, plans):
    """Every step is of one experimental batch; nnU-Net's own predictor loads what comes out, strictly."""
    trainer = dataset.trainer("nnUNetTrainerBEN_2epochs", plans=plans)
    seen = observed(trainer)
    trainer.run_training()
    assert len(seen) == 16
    assert {name for name, *_ in seen} == {"a", "b"}
    trainer.perform_actual_validation()
    assert {type(norm) for norm in find_norms(trainer.network).values()} == {nn.BatchNorm3d}
    assert len(trainer.logger.get_value(progress.DISPARITY, None)) == 2
    assert "Experimental batch new: 0 training and 1 validation cases" in log_of(trainer)
    report = json.loads(Path(trainer.output_folder, "validation", "norm_report.json").read_text())
    assert (report["num_cases"], report["predictor"]["plans"][0]["plan"]) == (3, "stages")
    # 3 cases of 3 experimental batches, each measured with tiles of its own: 2 tiles a case are a batch.
    assert report["train_eval_disparity"]["num_batches"] == 3
    model = Path(trainer.output_folder_base)
    assert json.loads((model / FILE_NAME).read_text()) == {"batches": BATCHES}
    (dataset.folder / FILE_NAME).unlink()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    statistics = get_domain_statistics(predictor.network)
    if plans == "plain":
        assert statistics is None
    else:
        assert statistics.names == tuple(NAMES)
        predictor.network.load_state_dict(predictor.list_of_parameters[0], strict=True)
        assert statistics.num_batches.tolist() == trainer.domains.num_batches.tolist()
        assert [statistics.has_seen(name) for name in NAMES] == [True, True, False]


def test_a_domains_statistics_are_the_average_of_its_own_batches(dataset):
    """By hand, from what went into the first norm in every step: max(momentum, 1 / t), and nothing of zeros and ones."""
    trainer = dataset.trainer("nnUNetTrainerBEN_2epochs", plans="domains")
    seen = observed(trainer)
    trainer.run_training()
    for row, name in enumerate(NAMES[:2]):
        mean, var = torch.zeros(4), torch.zeros(4)
        mine = [step for step in seen if step[0] == name]
        for t, (_, batch_mean, batch_var) in enumerate(mine, 1):
            mean, var = (old + max(0.1, 1 / t) * (new - old) for old, new in ((mean, batch_mean), (var, batch_var)))
        torch.testing.assert_close(trainer.domains.mean[row, :4], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trainer.domains.var[row, :4], var, rtol=1e-4, atol=1e-5)
        assert trainer.domains.num_batches[row] == len(mine)


def test_checkpoints_hold_the_pooled_statistics_and_those_of_each_domain(dataset):
    trainer = dataset.trainer("nnUNetTrainerBEN_1epochs", plans="domains")
    trainer.run_training()
    weights = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)["network_weights"]
    plain = dataset.trainer("nnUNetTrainerBatchNorm_1epochs", plans="plain")
    plain.initialize()
    added = {f"domain_statistics.{key}" for key in ("mean", "var", "num_batches")}
    assert set(weights) - set(plain.network.state_dict()) == added
    count, mean, var = (weights[f"domain_statistics.{key}"][:2] for key in ("num_batches", "mean", "var"))
    share = (count / count.sum())[:, None]
    pooled = (share * mean).sum(0)
    torch.testing.assert_close(weights[f"{FIRST}.running_mean"], pooled[:4])
    expected = ((share * (mean.square() + var)).sum(0) - pooled.square())[:4]
    torch.testing.assert_close(weights[f"{FIRST}.running_var"], expected, rtol=1e-4, atol=1e-5)


def test_validation_uses_the_statistics_of_each_batch_and_case(dataset, monkeypatch):
    """Of its own experimental batch where that was trained on, else those of all together."""
    trainer = dataset.trainer("nnUNetTrainerBEN_1epochs", plans="domains")
    used = []

    def record(name):
        norm = find_norms(trainer.network)[FIRST]
        used.append((name, norm.running_mean.clone(), trainer.domains.mean[:, :4].clone()))

    measure = "nnunet_norm.training.trainer.measure_disparity"
    monkeypatch.setattr(measure, lambda *args, **kwargs: (record(None), measure_disparity(*args, **kwargs))[1])
    step = trainer.validation_step

    def validation_step(batch):
        result = step(batch)
        record(trainer._batch_of(batch["keys"]))
        return result

    trainer.disparity_batches = 2
    trainer.validation_step = validation_step
    trainer.run_training()
    predict = trainer.validation_predictor.predict_sliding_window_return_logits
    monkeypatch.setattr(
        trainer.validation_predictor,
        "predict_sliding_window_return_logits",
        lambda self, image: (record(trainer.validated[-1]), predict(self, image))[1],
    )
    trainer.perform_actual_validation()
    of_cases = [name for name, *_ in used][-3:]
    assert of_cases == ["a", "b", "new"]
    assert len(used) == 2 * 2 + 3
    count = trainer.domains.num_batches
    for number, (name, running_mean, means) in enumerate(used):
        name = name or used[number + 1][0]  # disparity is measured within the step
        pooled = (means * (count / count.sum())[:, None]).sum(0)
        expected = pooled if name == "new" else means[NAMES.index(name)]
        torch.testing.assert_close(running_mean, expected)
    assert not torch.equal(used[-3][1], used[-2][1])
    # Afterwards the network is that of all together again.
    torch.testing.assert_close(find_norms(trainer.network)[FIRST].running_mean, used[-1][1])


def test_statistics_of_their_own_fit_experimental_batches_that_differ(dataset):
    """With weights that hardly move, one average for batches that differ disagrees with every mini-batch."""
    split = {"train": ["case0", "case1", "case2", "case3"], "val": ["case1", "case3"]}
    (dataset.folder / "splits_final.json").write_text(json.dumps([split]))
    means = {}
    for plans, domains in (("one", None), ("each", NAMES)):
        changes = {"batch_size": 6, "iterations_per_epoch": 12, "initial_lr": 1e-6}
        dataset.plans(name=plans, seed=3, domain_statistics=domains, **changes)
        trainer = dataset.trainer("nnUNetTrainerBEN_1epochs", plans=plans)
        trainer.num_val_iterations_per_epoch = trainer.disparity_batches = 4
        trainer.run_training()
        (means[plans],) = trainer.logger.get_value(progress.DISPARITY, None)
    assert means["each"] < 0.8 * means["one"]  # what is left is augmentation, which validation batches have not seen


def _raise_after(trainer, epochs):
    original = trainer.on_epoch_end

    def on_epoch_end():
        original()
        if trainer.current_epoch == epochs:
            raise KeyboardInterrupt

    return on_epoch_end


@pytest.mark.parametrize("plans", ["plain", "domains"])
def test_a_continued_training_is_the_uninterrupted_one(dataset, plans):
    """Weights, statistics of every experimental batch, counts, and the order of experimental batches."""
    straight = dataset.trainer("nnUNetTrainerBEN_3epochs", plans=plans)
    order = observed(straight)
    straight.run_training()
    interrupted = dataset.trainer("nnUNetTrainerBEN_3epochs", plans=plans, fold=1)
    interrupted.save_every = 1
    interrupted.on_epoch_end = _raise_after(interrupted, 2)
    first = observed(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run_training()
    continued = dataset.trainer("nnUNetTrainerBEN_3epochs", plans=plans, fold=1, continued=True)
    rest = observed(continued)
    continued.load_checkpoint(f"{interrupted.output_folder}/checkpoint_latest.pth")
    assert continued.current_epoch == 2
    continued.run_training()
    assert [name for name, *_ in [*first, *rest]] == [name for name, *_ in order]
    expected = straight.network.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in continued.network.state_dict().items())
    for key in (progress.DISPARITY, "train_losses", "mean_fg_dice"):
        np.testing.assert_array_equal(continued.logger.get_value(key, None), straight.logger.get_value(key, None))


def test_a_new_training_counts_anew_whatever_the_pretrained_weights_bring(dataset):
    trainer = dataset.trainer("nnUNetTrainerBEN_1epochs", plans="domains")
    trainer.initialize()
    trainer.domains.num_batches.fill_(1000)
    trainer.on_train_start()
    assert trainer.domains.num_batches.tolist() == [0, 0, 0]
    assert trainer._initial_statistics is None


def test_one_experimental_batch_is_batch_norm_and_is_said_to_be(dataset):
    write_batches(dataset, dict.fromkeys(BATCHES, "only"))
    trainer = dataset.trainer("nnUNetTrainerBEN_1epochs", plans="plain")
    trainer.on_train_start()
    assert "WARNING: all training cases are of experimental batch only: this is plain BatchNorm." in log_of(trainer)


def test_a_missing_file_is_refused_before_anything_is_written(dataset):
    (dataset.folder / FILE_NAME).unlink()
    with pytest.raises(
        ExperimentalBatchesError, match=r"there is no experimental_batches.json in .* or .*; write it as"
    ):
        dataset.trainer("nnUNetTrainerBEN", plans="plain")
    assert not (dataset.root / "results").exists()


def test_a_file_in_the_raw_dataset_comes_first(dataset):
    raw = dataset.root / "raw" / dataset.name
    raw.mkdir()
    shutil.copy(dataset.folder / FILE_NAME, raw)
    write_batches(dataset, dict.fromkeys(BATCHES, "stale"))
    assert dataset.trainer("nnUNetTrainerBEN", plans="plain").experimental_batches.names == tuple(NAMES)


def test_cases_without_an_experimental_batch_are_refused_before_the_training_starts(dataset):
    write_batches(dataset, {"case0": "a", "case_1": "a", "case2": "b"})
    trainer = dataset.trainer("nnUNetTrainerBEN", plans="plain")
    with pytest.raises(
        ExperimentalBatchesError,
        match=r"3 of 5 cases have no experimental batch: case1, case3, case4 \(case_1 in it are no cases",
    ):
        trainer.run_training()
    assert not Path(trainer.output_folder_base, FILE_NAME).exists()


def test_plans_with_statistics_for_other_experimental_batches_are_refused(dataset):
    dataset.plans(name="stale", domain_statistics=["a", "b", "old"])
    with pytest.raises(
        ExperimentalBatchesError,
        match=r"domain_statistics of the plans name old, which it does not have; derive plans anew",
    ):
        dataset.trainer("nnUNetTrainerBEN", plans="stale")
    assert not (dataset.root / "results").exists()
    dataset.plans(name="short", domain_statistics=["a", "new"])
    trainer = dataset.trainer("nnUNetTrainerBEN", plans="short")
    with pytest.raises(ExperimentalBatchesError, match="domain_statistics of the plans lack b; derive plans anew"):
        trainer.run_training()


def test_the_remedy_for_a_large_disparity_is_statistics_of_each_experimental_batch(dataset):
    """BatchNorm's, a larger batch, is no remedy while one set of statistics stands for batches that differ."""
    remedies = {"plain": "predict with the statistics of each", "domains": "train with a larger batch"}
    for plans, remedy in remedies.items():
        trainer = dataset.trainer("nnUNetTrainerBEN_1epochs", plans=plans)
        trainer.initialize()
        trainer.log_disparity(Disparity(per_class=[0.5, 0.5], num_batches=1))
        assert remedy in log_of(trainer)
