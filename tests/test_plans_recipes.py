"""Named recipes: every module of plans/ is one, and the shallow U-Net is shallow enough for its halo."""

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

import nnunet_norm.plans
from nnunet_norm.errors import PlansError
from nnunet_norm.planning import resolve_configuration
from nnunet_norm.plans import amos, shallow

STOCK = Path(__file__).resolve().parent / "stock_plans"


@pytest.fixture
def plans() -> dict:
    return json.loads((STOCK / "nnUNetPlans.json").read_text())


def reach(plans: dict, configuration: str, size: int) -> list[tuple[int, int]]:
    """Before and after, per axis: which input voxels the outputs around the middle depend on, by gradient.

    All weights are positive, norms and nonlinearities are gone, so no path can cancel another.
    """
    architecture = resolve_configuration(plans, configuration)["architecture"]
    kwargs = architecture["arch_kwargs"] | {"norm_op": None, "nonlin": None}
    network = get_network_from_plans(
        architecture["network_class_name"],
        kwargs,
        ["conv_op", "dropout_op"],
        1,
        2,
        allow_init=False,
        deep_supervision=False,
    ).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.01)
    ndim = len(architecture["arch_kwargs"]["strides"][0])
    stride = 2 ** (len(kwargs["strides"]) - 1)
    reaches = []
    for axis in range(ndim):
        before = after = 0
        for phase in range(stride):
            voxel = size // 2 + phase
            image = torch.zeros(1, 1, *[size] * ndim, dtype=torch.double, requires_grad=True)
            network(image)[0, 0].select(axis, voxel).sum().backward()
            other = [dim for dim in range(ndim) if dim != axis]
            touched = image.grad[0, 0].abs().sum(other).nonzero().flatten()
            before, after = max(before, voxel - int(touched.min())), max(after, int(touched.max()) - voxel)
        reaches.append((before, after))
    return reaches


def test_every_module_is_a_recipe() -> None:
    """Enforces what `nnunet-norm plan --recipe` relies on: a docstring and a function derive(plans, configuration)."""
    names = [module.name for module in pkgutil.iter_modules(nnunet_norm.plans.__path__)]
    assert "shallow" in names
    for name in names:
        module = importlib.import_module(f"nnunet_norm.plans.{name}")
        assert module.__doc__
        assert list(module.derive.__annotations__)[:2] == ["plans", "configuration"]


@pytest.mark.parametrize(("num_stages", "expected"), [(3, (20, 17)), (4, (44, 37))])
def test_the_reach_is_the_one_that_is_promised(plans: dict, num_stages: int, expected: tuple[int, int]) -> None:
    """Enforces the exact halo that the recipe's documentation names, found by brute force on the derived network."""
    derived = shallow.derive(plans, "2d", num_stages=num_stages, features_per_stage=[1] * num_stages)
    assert reach(derived, "2d", 96) == [expected, expected]


def test_four_stages_are_the_default_and_both_stages_of_a_cascade_are_shallow(plans: dict) -> None:
    """Enforces the default name and that options go on top."""
    derived = shallow.derive(plans, "3d_lowres", seed=2)
    assert derived["plans_name"] == "nnUNetPlans_s4_seed2"
    for name in ("3d_lowres", "3d_cascade_fullres"):
        assert resolve_configuration(derived, name)["architecture"]["arch_kwargs"]["n_stages"] == 4


@pytest.mark.parametrize("num_stages", [2, 5])
def test_other_depths_are_refused(plans: dict, num_stages: int) -> None:
    """Enforces that a network that is called shallow has 3 or 4 stages."""
    with pytest.raises(PlansError, match=f"recipe shallow: num_stages is {num_stages}; choose 3 or 4"):
        shallow.derive(plans, "2d", num_stages=num_stages)


def test_a_network_with_a_larger_reach_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """Enforces a warning for the residual encoder, whose blocks reach further than two convolutions per stage."""
    residual = json.loads((STOCK / "nnUNetResEncUNetMPlans.json").read_text())
    shallow.derive(residual, ["3d_fullres"])
    assert "3d_fullres: ResidualEncoderUNet has more convolutions per stage than PlainConvUNet" in caplog.text


STUDY = {
    "p160": (2, [64, 160, 160]),
    "p288": (2, [64, 288, 288]),
    "p352": (2, [64, 352, 352]),
    "p384": (2, [64, 384, 384]),
    "b2": (2, [64, 160, 160]),
    "b4": (4, [64, 160, 160]),
    "b16": (16, [64, 160, 160]),
    "b64": (64, [64, 160, 160]),
}


def scaled(plans: dict, configuration: str, setting: str, **options) -> tuple[int, list[int]]:
    resolved = resolve_configuration(amos.derive(plans, configuration, setting=setting, **options), configuration)
    return resolved["batch_size"], resolved["patch_size"]


def test_plans_with_the_studys_patch_get_exactly_its_numbers(plans: dict) -> None:
    """Enforces the batches and patches of the study's tables, and nothing else changed."""
    plans["configurations"]["3d_fullres"]["patch_size"] = [64, 160, 160]
    assert {setting: scaled(plans, "3d_fullres", setting) for setting in amos.SETTINGS} == STUDY
    derived = amos.derive(plans, "3d_fullres", setting="b16")["configurations"]["3d_fullres"]
    assert derived == plans["configurations"]["3d_fullres"] | {"batch_size": 16}


def test_other_plans_are_scaled_by_the_same_factors(plans: dict) -> None:
    """Enforces the factors within the slice, in 2d and where no axis is coarsest, enlarged to what the strides divide."""
    assert scaled(plans, "2d", "p288") == (12, [1024, 1024])  # 921.6, and a total stride of 128
    assert scaled(plans, "2d", "b16") == (96, [512, 512])
    assert scaled(plans, "3d_lowres", "p352") == (2, [112, 352, 288])  # 281.6, and a stride of 32
    plans["configurations"]["3d_lowres"]["spacing"] = [1.0, 1.0, 1.0]
    assert scaled(plans, "3d_lowres", "p384") == (2, [112, 384, 320])  # 307.2; the shortest axis stays
    plans["configurations"]["3d_lowres"]["spacing"] = [1.0, 1.0, 3.0]
    assert scaled(plans, "3d_lowres", "p384")[1] == [272, 384, 128]  # 268.8, and a stride of 16
    options = {"batch_size": 6, "seed": 1}
    assert scaled(plans, "3d_fullres", "b64", **options) == (6, [80, 160, 160])


def test_wrong_settings_of_the_study_are_refused(plans: dict) -> None:
    """Enforces the list of settings, and one configuration at a time: each is scaled by itself."""
    with pytest.raises(PlansError, match="recipe amos: setting is b8; choose from p160, p288"):
        amos.derive(plans, "3d_fullres", setting="b8")
    with pytest.raises(PlansError, match=r"recipe amos: configuration is 2d, 3d_fullres; .* give one"):
        amos.derive(plans, ["2d", "3d_fullres"], setting="b16")
