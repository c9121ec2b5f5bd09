"""Inheritance and cascades, against nnU-Net's PlansManager."""

import copy
import json
from pathlib import Path

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import cascade, resolve_configuration
from nnunet_norm.planning.configurations import heirs

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
CASCADE = "3d_cascade_fullres"


@pytest.fixture
def plans() -> dict:
    return json.loads((STOCK / "nnUNetPlans.json").read_text())


def test_inheritance_is_nnunets(plans: dict) -> None:
    """Enforces the merge of PlansManager over several generations: a child's key replaces the parent's as a whole."""
    plans["configurations"]["child"] = {"inherits_from": CASCADE, "batch_size": 5, "nnunet_norm": {"seed": 1}}
    plans["configurations"]["grandchild"] = {"inherits_from": "child", "nnunet_norm": {"initial_lr": 1.0}}
    before = copy.deepcopy(plans)
    for name in plans["configurations"]:
        assert resolve_configuration(plans, name) == PlansManager(plans).get_configuration(name).configuration
    resolve_configuration(plans, "grandchild")["architecture"]["arch_kwargs"].clear()
    assert plans == before
    assert heirs(plans, "3d_fullres") == [CASCADE, "child", "grandchild"]


def test_a_cascade_is_found_from_either_end(plans: dict) -> None:
    """Enforces the stages in the order of training, several next stages included, and no cascade for the others."""
    assert cascade(plans, "3d_lowres") == cascade(plans, CASCADE) == ["3d_lowres", CASCADE]
    assert cascade(plans, "3d_fullres") == ["3d_fullres"]
    plans["configurations"]["second"] = {"inherits_from": CASCADE}
    plans["configurations"]["3d_lowres"]["next_stage"] = [CASCADE, "second"]
    assert cascade(plans, "second") == ["3d_lowres", CASCADE, "second"]


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({CASCADE: {"previous_stage": None}}, "3d_lowres", r"3d_cascade_fullres's previous_stage is None; .*both ways"),
        ({"3d_lowres": {"next_stage": "3d_fullres"}}, "3d_lowres", r"3d_fullres's previous_stage is None"),
        ({"3d_lowres": {"next_stage": None}}, CASCADE, r"3d_lowres's next_stage is \[\]; .*both ways"),
        ({CASCADE: {"previous_stage": "3d_low"}}, CASCADE, r"configuration 3d_low is not in plans nnUNetPlans"),
        ({"3d_lowres": {"previous_stage": CASCADE}}, CASCADE, r"runs in a circle"),
        ({"2d": {"inherits_from": "2d"}}, "2d", r"inherits_from runs in a circle: 2d -> 2d"),
        ({"2d": {"inherits_from": "1d"}}, "2d", r"configuration 1d \(from which 2d inherits\) is not in plans"),
    ],
)
def test_what_does_not_hang_together_is_refused(plans: dict, changes: dict, asked: str, message: str) -> None:
    """Enforces a refusal where nnU-Net would fail in the middle of a training, or not end."""
    for name, keys in changes.items():
        plans["configurations"][name].update(keys)
    with pytest.raises(PlansError, match=message):
        cascade(plans, asked)
