"""Which models become models of stock nnU-Net, under which norm and name, and which are refused with what can be done."""

import json

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_models import visible, write_model
from torch import nn
from trained_models import CONFIGURATION, flat, residual, write_trained

from nnunet_norm.errors import ModelFolderError, PlansError
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.stock_model import stock_export

STORED = ("BRN", "BatchNorm", "PreciseBN", "FrozenBN", "GhostBN", "BEN", "INTracked")


def exported(model, target, **options):
    stock_export(model, **options).write(target)
    plans = json.loads((target / "plans.json").read_text())
    return plans, plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]


def network(folder, fold=0):
    """The network as nnU-Net's own predictor loads it."""
    made = CasePredictor(device=torch.device("cpu"), allow_tqdm=False)
    made.initialize_from_trained_model_folder(str(folder), (fold,))
    return made.network.eval()


def same(model, target, axes=3, fold=0):
    image = torch.randn((2, 1, *[12] * axes), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return torch.equal(network(model, fold)(image), network(target, fold)(image))


@pytest.mark.parametrize("change", [lambda plan: None, residual, flat], ids=["plain", "residual", "2d"])
@pytest.mark.parametrize("norm", STORED)
def test_stored_statistics_become_batch_norm(tmp_path, norm, change):
    """The same to the last bit, key for key, with the network's own eps; trainer and plans are those of stock nnU-Net."""
    model = write_trained(tmp_path / "model", f"nnUNetTrainer{norm}", eps=0.05, change=change)
    plans, kwargs = exported(model, tmp_path / "new")
    axes = 2 if change is flat else 3
    assert plans["plans_name"] == f"nnUNetPlans_{norm}"
    assert kwargs["norm_op"] == f"torch.nn.modules.batchnorm.BatchNorm{axes}d"
    assert kwargs["norm_op_kwargs"] == {"eps": 0.05, "affine": True}
    old, new = (
        torch.load(folder / "fold_0" / "checkpoint_final.pth")["network_weights"]
        for folder in (model, tmp_path / "new")
    )
    assert list(old) == list(new)
    assert any(key.endswith("num_batches_tracked") for key in new)
    assert same(model, tmp_path / "new", axes)
    assert {type(m).__module__.split(".")[0] for m in network(tmp_path / "new").modules()} <= {
        "torch", "dynamic_network_architectures",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "op"), [("InstanceNorm", "torch.nn.modules.instancenorm.InstanceNorm3d"), ("NoNorm", None)]
)
def test_what_differs_in_the_trainer_s_name_alone_is_a_stock_model(tmp_path, norm, op):
    """InstanceNorm and no norm are things that plans can name."""
    model = write_trained(tmp_path / "model", f"nnUNetTrainer{norm}", eps=0.01)
    plans, kwargs = exported(model, tmp_path / "new")
    assert (plans["plans_name"], kwargs["norm_op"]) == (f"nnUNetPlans_{norm}", op)
    assert kwargs["norm_op_kwargs"] == ({"eps": 0.01, "affine": True} if op else {})
    assert same(model, tmp_path / "new")


def test_plans_that_name_our_norm_become_stock_plans(tmp_path):
    """The trainer is nnU-Net's already; the norm's class names the plans."""
    model = write_trained(tmp_path / "model", "nnUNetTrainer", norm="nnunet_norm.layers.BatchRenorm3d")
    plans, kwargs = exported(model, tmp_path / "new")
    assert plans["plans_name"] == "nnUNetPlans_BatchRenorm3d"
    assert kwargs["norm_op"] == "torch.nn.modules.batchnorm.BatchNorm3d"
    assert same(model, tmp_path / "new")


def test_every_fold_is_exported_and_the_number_of_epochs_names_the_plans(tmp_path):
    """All that are there by default, "all" too; or those that are named."""
    model = write_trained(tmp_path / "model", "nnUNetTrainerBRN_20epochs", folds=(1, 3, "all"))
    plans, _ = exported(model, tmp_path / "new")
    assert plans["plans_name"] == "nnUNetPlans_BRN_20epochs"
    assert all(same(model, tmp_path / "new", fold=fold) for fold in (1, 3, "all"))
    exported(model, tmp_path / "one", folds=[3], plans_name="mine")
    assert visible(tmp_path / "one") == ["dataset.json", "fold_3", "nnunet_norm.json", "plans.json"]


def test_the_origin_is_written_down(tmp_path):
    """Beside plans.json, and the settings of the training stay in the plans, where stock nnU-Net ignores them."""

    def with_block(plan):
        plan["configurations"][CONFIGURATION]["nnunet_norm"] = {"seed": 3}

    model = write_trained(tmp_path / "model", change=with_block)
    plans, _ = exported(model, tmp_path / "new")
    assert plans["configurations"][CONFIGURATION]["nnunet_norm"] == {"seed": 3}
    note = json.loads((tmp_path / "new" / "nnunet_norm.json").read_text())
    assert note["written_by"] == "nnunet-norm export"
    assert note["of"] == {
        "trainer": "nnUNetTrainerBRN", "plans": "nnUNetPlans", "checkpoint": "checkpoint_final.pth", "norm": "BatchRenorm3d",
    }  # fmt: skip


def test_group_norm_is_refused(tmp_path):
    """torch's has other arguments than plans can give."""
    model = write_trained(tmp_path / "model", "nnUNetTrainerGN")
    with pytest.raises(
        ModelFolderError, match=r"has GroupNorm, which plans cannot name .*: use the model with this package$"
    ):
        stock_export(model)


@pytest.mark.parametrize(
    ("norm", "end"), [("BatchNorm3d", "use it so$"), ("InstanceNorm3d", "recalibrate gives it stored statistics$")]
)
def test_what_runs_already_is_refused(tmp_path, norm, end):
    """For InstanceNorm with what would give it stored statistics."""
    with pytest.raises(ModelFolderError, match=rf"\(nnUNetTrainer\) runs in stock nnU-Net as it is: .*{end}"):
        stock_export(write_model(tmp_path / "model", norm=f"torch.nn.{norm}"))


def altered(monkeypatch, change):
    """Have this package's trainers change their network."""
    from nnunet_norm.training import NormTrainer

    build = NormTrainer.build_network_architecture.__func__

    def changed(cls, plans_manager, *args, **kwargs):
        made = build(cls, plans_manager, *args, **kwargs)
        change(made)
        return made

    monkeypatch.setattr(NormTrainer, "build_network_architecture", classmethod(changed))


def first_block(made):
    return made.encoder.stages[0][0].convs[0]


class Doubled(nn.BatchNorm3d):
    """A norm of somebody's own."""

    def forward(self, x):
        return 2 * super().forward(x)


def put(made, norm):
    block = first_block(made)
    block.norm = norm
    block.all_modules[1] = norm


REFUSALS = {
    "eps": (lambda made: setattr(first_block(made).norm, "eps", 0.5), r"different eps \(0.5, 1e-05\)"),
    "kinds": (lambda made: put(made, nn.InstanceNorm3d(4, affine=True)), "different kinds of norm .*BatchNorm3d, .*Instance"),
    "affine": (lambda made: put(made, nn.BatchNorm3d(4, affine=False)), r"different affine \(False, True\)"),
    "own": (lambda made: put(made, Doubled(4)), r"norm of the model in .* is a norm of class Doubled, which plans"),
    "batch statistics": (
        lambda made: put(made, nn.BatchNorm3d(4, track_running_stats=False)), "has BatchNorm3d, which plans cannot name",
    ),
    "more": (
        lambda made: setattr(made, "forward", lambda x, run=made.forward: 3 * run(x)),
        r"gives another result with nnUNetTrainer and .* \(relative difference 0.67\): its trainer nnUNetTrainerBRN does",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_plans_cannot_say_is_refused_and_leaves_nothing(tmp_path, monkeypatch, name):
    """In one line, with what differs."""
    change, message = REFUSALS[name]
    altered(monkeypatch, change)
    model = write_trained(tmp_path / "model")
    with pytest.raises(ModelFolderError, match=message):
        stock_export(model).write(tmp_path / "new")
    assert visible(tmp_path) == ["model"]


def test_of_several_experimental_batches_the_statistics_of_all_together_are_exported(tmp_path):
    """They are what nnU-Net's predictor uses; the others have no place in a stock model."""

    def two_domains(plan):
        plan["configurations"][CONFIGURATION]["nnunet_norm"] = {"domain_statistics": ["plate_1", "plate_2"]}

    model = write_trained(tmp_path / "model", "nnUNetTrainerBEN", change=two_domains)
    exported(model, tmp_path / "new")
    old, new = (
        torch.load(folder / "fold_0" / "checkpoint_final.pth")["network_weights"]
        for folder in (model, tmp_path / "new")
    )
    assert [key for key in old if key not in new] == [f"domain_statistics.{k}" for k in ("mean", "var", "num_batches")]
    assert same(model, tmp_path / "new")


def test_names_of_plans_are_checked(tmp_path):
    """Also that they differ from those of the source, whose results folder is another model's."""
    model = write_trained(tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"^--plans-name nnUNetPlans is the model's own"):
        stock_export(model, plans_name="nnUNetPlans")
    with pytest.raises(PlansError, match="plans_name is 'a__b'"):
        stock_export(model, plans_name="a__b")


def test_the_trainer_written_is_nnunets():
    """Its name resolves without any search path."""
    from nnunet_norm.prediction.stock_model import TRAINER

    assert nnUNetTrainer.__name__ == TRAINER
