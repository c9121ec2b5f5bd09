"""Derived plans, checked through nnU-Net's own PlansManager and by building and running the network they describe."""

import copy
import json
import logging
import pydoc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import derive_plans
from nnunet_norm.settings import BatchRenormSettings, NormSettings

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
CASCADE = "3d_cascade_fullres"


@pytest.fixture
def plans() -> dict:
    return json.loads((STOCK / "nnUNetPlans.json").read_text())


@pytest.fixture
def residual() -> dict:
    return json.loads((STOCK / "nnUNetResEncUNetMPlans.json").read_text())


def resolved(plans: dict, configuration: str) -> dict:
    """As nnU-Net reads it."""
    return PlansManager(copy.deepcopy(plans)).get_configuration(configuration).configuration


def network(plans: dict, configuration: str, input_channels: int = 1) -> torch.nn.Module:
    """As nnU-Net's trainer builds it, with deep supervision."""
    manager = PlansManager(copy.deepcopy(plans)).get_configuration(configuration)
    return get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        input_channels,
        3,
        deep_supervision=True,
    )


def output_shapes(plans: dict, configuration: str, patch: list[int]) -> list[list[int]]:
    """Spatial shapes of the deep-supervision outputs for a patch, finest first; all values are finite."""
    with torch.no_grad():
        outputs = network(plans, configuration)(torch.randn(1, 1, *patch))
    assert all(bool(torch.isfinite(output).all()) for output in outputs)
    return [list(output.shape[2:]) for output in outputs]


def test_the_default_name_tells_what_was_asked_for(plans: dict) -> None:
    """Enforces the name of the results folder: every option, the corrected patch, in a fixed order."""
    derived = derive_plans(
        plans,
        "3d_fullres",
        seed=1,
        iterations_per_epoch=10,
        base_features=8,
        num_stages=4,
        patch_size=[61, 157, 160],
        batch_size=16,
    )
    assert derived["plans_name"] == "nnUNetPlans_b16_p64x160x160_s4_f8_it10_seed1"
    other = derive_plans(
        plans,
        "3d_fullres",
        replan_topology=True,
        features_per_stage=[4, 8, 8, 8, 8, 8],
        norm_op="torch.nn.BatchNorm3d",
        norm_op_kwargs={"eps": 1e-3},
        val_iterations_per_epoch=5,
        initial_lr=0.02,
        disparity_batches=2,
        batch_renorm={"r_max": 2.0},
    )
    assert other["plans_name"] == "nnUNetPlans_replan_f4-8-8-8-8-8_BatchNorm3d_eps0.001_vit5_lr0.02_disp2_brn-rmax2.0"


def test_only_the_named_configuration_changes_and_the_input_does_not(plans: dict) -> None:
    """Enforces a deep copy, the same preprocessed data, and every other configuration as it stood in the file."""
    before = copy.deepcopy(plans)
    derived = derive_plans(plans, "3d_fullres", batch_size=4, patch_size=[64, 128, 128], base_features=16, seed=3)
    assert plans == before
    assert derived["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    changed = {
        key
        for key, value in derived["configurations"]["3d_fullres"].items()
        if before["configurations"]["3d_fullres"].get(key) != value
    }
    assert changed == {"batch_size", "patch_size", "architecture", "nnunet_norm"}
    for name in ("2d", "3d_lowres", CASCADE):
        assert derived["configurations"][name] == before["configurations"][name]
    assert {key: value for key, value in derived.items() if key not in ("plans_name", "configurations")} == {
        key: value for key, value in before.items() if key not in ("plans_name", "configurations")
    }
    derived["configurations"]["2d"]["batch_size"] = 99
    assert plans == before


def test_derived_plans_are_json_as_they_stand(plans: dict) -> None:
    """Enforces plain lists and numbers: what a trainer is handed in memory is what a file would give it."""
    derived = derive_plans(plans, ["2d"], patch_size=(250, 250), replan_topology=True, norm_op="torch.nn.BatchNorm2d")
    assert json.loads(json.dumps(derived)) == derived


@pytest.mark.parametrize("stock", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
@pytest.mark.parametrize(
    ("configuration", "options", "patch", "outputs"),
    [
        # Kept strides of (16, 32, 32); the coarsest stage has no output.
        (
            "3d_fullres",
            {"patch_size": [60, 100, 128], "base_features": 2},
            [64, 128, 128],
            [[64, 128, 128], [64, 64, 64], [32, 32, 32], [16, 16, 16], [8, 8, 8]],
        ),
        (
            "3d_fullres",
            {"patch_size": [15, 20, 32], "num_stages": 3, "features_per_stage": [2, 3, 4]},
            [16, 20, 32],
            [[16, 20, 32], [16, 10, 16]],
        ),
        (
            "3d_lowres",
            {"patch_size": [24, 32, 30], "replan_topology": True, "base_features": 2},
            [24, 32, 32],
            [[24, 32, 32], [12, 16, 16], [6, 8, 8]],
        ),
        ("2d", {"num_stages": 4, "base_features": 2, "patch_size": [64, 33]}, [64, 40], [[64, 40], [32, 20], [16, 10]]),
    ],
)
def test_the_network_of_derived_plans_runs(
    stock: str, configuration: str, options: dict, patch: list[int], outputs: list[list[int]]
) -> None:
    """Enforces that nnU-Net builds the derived network, plain and residual, and that it takes the derived patch."""
    plans = json.loads((STOCK / f"{stock}.json").read_text())
    derived = derive_plans(plans, configuration, **options)
    assert resolved(derived, configuration)["patch_size"] == patch
    assert output_shapes(derived, configuration, patch) == outputs


def test_a_shallow_network_is_the_fine_part_of_the_deep_one(plans: dict) -> None:
    """Enforces that cutting stages leaves the others alone: same names and shapes in the encoder's state dict."""
    small = {"base_features": 2}
    deep = network(derive_plans(plans, "3d_fullres", **small), "3d_fullres").state_dict()
    shallow = network(derive_plans(plans, "3d_fullres", num_stages=4, **small), "3d_fullres").state_dict()
    encoder = [key for key in shallow if key.startswith("encoder.")]
    assert {key: shallow[key].shape for key in encoder} == {
        key: deep[key].shape for key in deep if key.startswith("encoder.") and int(key.split(".")[2]) < 4
    }


def test_a_changed_norm_is_the_one_that_nnunet_builds(plans: dict) -> None:
    """Enforces that norm_op reaches every block with its arguments, although nnU-Net builds none for a typo."""
    options = {"norm_op": "torch.nn.BatchNorm3d", "norm_op_kwargs": {"eps": 1e-3, "affine": False}, "base_features": 2}
    derived = derive_plans(plans, "3d_fullres", num_stages=3, **options)
    built = network(derived, "3d_fullres")
    norms = [module for module in built.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    # Two per stage in the encoder and in the decoder; modules() lists one that has several names only once.
    assert len(norms) == 3 * 2 + 2 * 2
    assert {(type(norm), norm.eps, norm.affine) for norm in norms} == {(torch.nn.BatchNorm3d, 1e-3, False)}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["2d", "3d_lowres", "3d_fullres"]),
    st.integers(3, 6),
    st.lists(st.integers(1, 300), min_size=3, max_size=3),
)
def test_any_patch_is_enlarged_minimally_or_refused_below_the_minimum(
    name: str, num_stages: int, patch: list[int]
) -> None:
    """Enforces the smallest divisible patch that is at least what was asked; refused only below 4 at the bottom."""
    plans = json.loads((STOCK / "nnUNetPlans.json").read_text())
    patch = patch[: len(plans["configurations"][name]["patch_size"])]
    per_stage = plans["configurations"][name]["architecture"]["arch_kwargs"]["strides"][:num_stages]
    stride = [int(torch.tensor(per_stage)[:, axis].prod()) for axis in range(len(patch))]
    expected = [step * ((size + step - 1) // step) for size, step in zip(patch, stride, strict=True)]
    if any(size < 4 * step for size, step in zip(expected, stride, strict=True) if step > 1):
        with pytest.raises(PlansError, match="below the network's minimum"):
            derive_plans(plans, name, patch_size=patch, num_stages=num_stages)
    else:
        derived = derive_plans(plans, name, patch_size=patch, num_stages=num_stages)
        assert derived["configurations"][name]["patch_size"] == expected


def test_a_corrected_patch_is_said(plans: dict, caplog: pytest.LogCaptureFixture) -> None:
    """Enforces a warning that names the patch asked for, the strides and what it became; none for a fitting one."""
    derive_plans(plans, "3d_fullres", patch_size=[80, 150, 160])
    assert [record.levelno for record in caplog.records][:1] == [logging.WARNING]
    assert "80x150x160 is not divisible by the total stride 16x32x32 and was enlarged to 80x160x160" in caplog.text
    caplog.clear()
    derive_plans(plans, "3d_fullres", patch_size=[96, 160, 160])
    assert "enlarged" not in caplog.text


def test_fewer_stages_allow_smaller_patches(plans: dict) -> None:
    """Enforces that the minimum is that of the strides that remain, not of the plan's."""
    with pytest.raises(
        PlansError, match=r"16x64x64 is below the network's minimum of 64x128x128 \(total stride 16x32x32"
    ):
        derive_plans(plans, "3d_fullres", patch_size=[16, 64, 64])
    assert derive_plans(plans, "3d_fullres", patch_size=[16, 64, 64], num_stages=4)["configurations"]["3d_fullres"][
        "patch_size"
    ] == [16, 64, 64]


@pytest.mark.parametrize("named", ["3d_lowres", CASCADE])
def test_both_stages_of_a_cascade_are_derived(plans: dict, named: str) -> None:
    """Enforces that network and training go to both stages, batch and patch to the named one, 3d_fullres to nobody."""
    before = copy.deepcopy(plans)
    other = CASCADE if named == "3d_lowres" else "3d_lowres"
    derived = derive_plans(
        plans,
        named,
        batch_size=4,
        patch_size=[64, 128, 128],
        num_stages=4,
        base_features=4,
        seed=5,
        norm_op="torch.nn.BatchNorm3d",
        iterations_per_epoch=7,
    )
    for stage in (named, other):
        configuration = resolved(derived, stage)
        kwargs = configuration["architecture"]["arch_kwargs"]
        assert (kwargs["n_stages"], kwargs["features_per_stage"]) == (4, [4, 8, 16, 32])
        assert kwargs["norm_op"] == "torch.nn.BatchNorm3d"
        assert kwargs["strides"] == resolved(before, stage)["architecture"]["arch_kwargs"]["strides"][:4]
        assert configuration["nnunet_norm"] == {"num_iterations_per_epoch": 7, "seed": 5}
    assert (resolved(derived, named)["batch_size"], resolved(derived, named)["patch_size"]) == (4, [64, 128, 128])
    for key in ("batch_size", "patch_size"):
        assert resolved(derived, other)[key] == resolved(before, other)[key]
    assert derived["configurations"]["3d_fullres"] == before["configurations"]["3d_fullres"]
    manager = PlansManager(derived)
    assert manager.get_configuration("3d_lowres").next_stage_names == [CASCADE]
    assert manager.get_configuration(CASCADE).previous_stage_name == "3d_lowres"
    assert derived["configurations"][CASCADE]["inherits_from"] == "3d_fullres"
    assert resolved(derived, CASCADE)["data_identifier"] == "nnUNetPlans_3d_fullres"


def test_a_stage_with_fewer_stages_keeps_its_own(plans: dict) -> None:
    """Enforces that the other stage of a cascade is cut at most, never refused for having a shallower network."""
    shallow = derive_plans(plans, "3d_lowres", num_stages=3)["configurations"]["3d_lowres"]
    plans["configurations"]["3d_lowres"] = shallow
    derived = derive_plans(plans, CASCADE, num_stages=5)
    stages = [resolved(derived, name)["architecture"]["arch_kwargs"]["n_stages"] for name in ("3d_lowres", CASCADE)]
    assert stages == [3, 5]


def test_heirs_follow_and_are_validated(plans: dict, caplog: pytest.LogCaptureFixture) -> None:
    """Enforces nnU-Net's inheritance: 3d_cascade_fullres follows 3d_fullres, and one that no longer fits is refused."""
    caplog.set_level(logging.INFO)
    derived = derive_plans(plans, "3d_fullres", batch_size=8)
    assert resolved(derived, CASCADE)["batch_size"] == 8
    assert CASCADE in caplog.text
    plans["configurations"]["3d_odd"] = {"inherits_from": "3d_fullres", "patch_size": [72, 80, 80]}
    with pytest.raises(PlansError, match="3d_odd: patch size 72x80x80 is not divisible by the total stride 16x32x32"):
        derive_plans(plans, "3d_fullres", batch_size=8)


def test_settings_add_to_those_that_are_there(plans: dict) -> None:
    """Enforces that a further derivation keeps the block's other entries, also inside batch_renorm."""
    once = derive_plans(plans, "3d_fullres", seed=1, batch_renorm={"r_max": 2, "warmup": 0.2})
    twice = derive_plans(once, "3d_fullres", initial_lr=0.1, batch_renorm={"d_max": 1.0})
    settings_ = NormSettings.from_configuration(resolved(twice, "3d_fullres"))
    assert settings_ == NormSettings(
        seed=1, initial_lr=0.1, batch_renorm=BatchRenormSettings(r_max=2.0, warmup=0.2, d_max=1.0)
    )
    whole = derive_plans(twice, "3d_fullres", batch_renorm=BatchRenormSettings())
    assert resolved(whole, "3d_fullres")["nnunet_norm"] == {"initial_lr": 0.1, "seed": 1}


def test_population_statistics_are_settings_of_the_block(plans: dict) -> None:
    """Enforces the entries, plain JSON, the default name, and that a further derivation keeps them."""
    options = {
        "population_samples": 500,
        "reestimate_every": 10,
        "frozen_share": 0.3,
        "normalization_batch_size": 2,
        "domain_statistics": ("plate_2", "plate_1"),
        "batch_renorm": {"sync": "full"},
    }
    derived = derive_plans(plans, "3d_fullres", **options)
    block = {**options, "domain_statistics": ["plate_2", "plate_1"]}
    assert resolved(derived, "3d_fullres")["nnunet_norm"] == block
    assert json.loads(json.dumps(derived)) == derived
    assert derived["plans_name"] == "nnUNetPlans_pop500_every10_frozen0.3_nb2_domains2_brn-syncfull"
    more = derive_plans(derived, "3d_fullres", batch_renorm={"r_max": 2.0}, population_samples=9)
    expected = {**block, "population_samples": 9, "batch_renorm": {"r_max": 2.0, "sync": "full"}}
    assert resolved(more, "3d_fullres")["nnunet_norm"] == expected


@pytest.mark.parametrize(
    ("configuration", "options", "message"),
    [
        (
            "3d_fulres",
            {"batch_size": 4},
            r"configuration 3d_fulres is not in plans nnUNetPlans; there are 2d, 3d_lowres",
        ),
        ("2d", {}, r"nothing to change: give at least one of batch_size, batch_dice, patch_size"),
        ("2d", {"batch_size": 0}, r"batch_size is 0; .*at least 1"),
        ("2d", {"batch_size": True}, r"batch_size is True"),
        ("2d", {"patch_size": 64}, r"patch_size is 64; it must be a sequence"),
        ("2d", {"patch_size": [64, 64, 64]}, r"patch size 64x64x64 has 3 axes; this configuration has 2"),
        ("2d", {"patch_size": [64.5, 64]}, r"patch_size is 64\.5"),
        ("2d", {"base_features": 8, "features_per_stage": [8] * 8}, r"base_features and features_per_stage"),
        ("2d", {"seed": -1}, r"nnunet_norm\.seed is -1"),
        ("2d", {"batch_renorm": {"rmax": 2}}, r"batch_renorm\.rmax is not a setting"),
        ("2d", {"batch_renorm": {"sync": "all"}}, r"batch_renorm\.sync is 'all'; .*one of running, full, none"),
        ("2d", {"population_samples": 0}, r"population_samples is 0; .*at least 1"),
        ("2d", {"reestimate_every": 1.5}, r"reestimate_every is 1\.5"),
        ("2d", {"frozen_share": 1}, r"nnunet_norm\.frozen_share is 1; .*above 0 and below 1"),
        ("2d", {"normalization_batch_size": True}, r"normalization_batch_size is True"),
        ("2d", {"domain_statistics": ["a", "a"]}, r"nnunet_norm\.domain_statistics is \['a', 'a'\]; .*different names"),
        (
            "2d",
            {"batch_size": 4, "plans_name": "nnUNetPlans"},
            r"plans_name nnUNetPlans is that of the plans derived from",
        ),
        ("2d", {"batch_size": 4, "plans_name": "a__b"}, r"plans_name is 'a__b'.*double underscore"),
        ("2d", {"batch_size": 4, "plans_name": "../x"}, r"plans_name is '\.\./x'"),
        (
            "2d",
            {"batch_size": 4, "plans_name": "x" * 200},
            r"200 characters long; give one of at most 120 with --plans-name",
        ),
        ("2d", {"norm_op": "torch.nn.BatchNom2d"}, r"norm_op 'torch\.nn\.BatchNom2d' is nowhere to be found"),
        (
            "2d",
            {"norm_op": "torch.nn.BatchNorm3d"},
            r"BatchNorm3d does not work .* on 2 spatial axes: expected 5D input",
        ),
        ("2d", {"norm_op": "torch.nn.GroupNorm"}, r"GroupNorm does not work as norm_op\(channels, .*num_channels"),
        ("2d", {"norm_op": "builtins.dict"}, r"norm_op builtins\.dict does not work"),
        ("2d", {"norm_op_kwargs": {"eps": torch.float32}}, r"cannot stand in a JSON file"),
        (["2d", "3d_fullres"], {"norm_op": "torch.nn.BatchNorm2d"}, r"3d_fullres: norm_op torch\.nn\.BatchNorm2d"),
        ("2d", {"num_stages": 9}, r"2d: num_stages is 9; choose 3 to 8 .*--replan-topology"),
        ("2d", {"num_stages": 7, "replan_topology": True, "patch_size": [64, 64]}, r"num_stages is 7; choose 3 to 5"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(plans: dict, configuration: str, options: dict, message: str) -> None:
    """Enforces that every refusal names the parameter, the value and the choice, and that nothing was changed."""
    before = copy.deepcopy(plans)
    with pytest.raises(PlansError, match=message) as refusal:
        derive_plans(plans, configuration, **options)
    assert "\n" not in str(refusal.value)
    assert plans == before


@pytest.mark.parametrize(
    ("key", "path"),
    [("nonlin", "torch.nn.LeakyRelu"), ("conv_op", "torch.nn.modules.conv.Conv4d"), ("norm_op", "torch")],
)
def test_every_dotted_path_of_the_architecture_is_checked(plans: dict, key: str, path: str) -> None:
    """Enforces a refusal where nnU-Net's pydoc.locate finds nothing callable and would build on in silence."""
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"][key] = path
    assert not callable(pydoc.locate(path))
    with pytest.raises(PlansError, match=rf"2d: {key} '{path}' is nowhere to be found"):
        derive_plans(plans, "2d", batch_size=4)


def test_wrong_plans_are_refused(plans: dict) -> None:
    """Enforces a remedy for an unknown network class, a missing argument and plans of the format before 'architecture'."""
    wrong = copy.deepcopy(plans)
    wrong["configurations"]["2d"]["architecture"]["network_class_name"] = "dynamic_network_architectures.Unet"
    with pytest.raises(PlansError, match=r"2d: network_class_name 'dynamic_network_architectures\.Unet'"):
        derive_plans(wrong, "2d", batch_size=4)
    wrong = copy.deepcopy(plans)
    del wrong["configurations"]["2d"]["architecture"]["arch_kwargs"]["dropout_op"]
    with pytest.raises(PlansError, match=r"_kw_requires_import names dropout_op, which arch_kwargs lacks"):
        derive_plans(wrong, "2d", batch_size=4)
    wrong = copy.deepcopy(plans)
    del wrong["configurations"]["2d"]["architecture"]
    with pytest.raises(PlansError, match=r"2d has no architecture: .*run nnUNetv2_plan_experiment again"):
        derive_plans(wrong, "2d", batch_size=4)


def test_an_import_error_of_a_norm_is_passed_on(plans: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces that a module that fails to import is not taken for a typo in its name."""
    (tmp_path / "broken_norms.py").write_text("raise ImportError('needs apex')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlansError, match=r"norm_op 'broken_norms\.Norm' cannot be imported: needs apex"):
        derive_plans(plans, "2d", norm_op="broken_norms.Norm")


def test_sizes_of_unetr_stand_in_the_block_and_in_the_name(plans):
    """Enforces merging with what the plans say, a learning rate scaled from AdamW's, and patches of whole tokens."""
    first = derive_plans(plans, "3d_fullres", patch_size=[64, 64, 64], num_stages=4, unetr={"num_heads": 6})
    second = derive_plans(first, "3d_fullres", unetr={"feature_size": 8}, batch_size=4, lr_scaling="linear")
    block = second["configurations"]["3d_fullres"]["nnunet_norm"]
    assert block == {"unetr": {"num_heads": 6, "feature_size": 8}, "initial_lr": 2e-4}
    assert first["plans_name"].endswith("_unetr-numheads6")
    with pytest.raises(PlansError, match=r"^configuration 3d_fullres: patch size 40x64x64 .*--patch-size 48 64 64$"):
        derive_plans(first, "3d_fullres", patch_size=[40, 64, 64])
    with pytest.raises(PlansError, match="unetr is 3; it must be an object of settings"):
        derive_plans(first, "3d_fullres", unetr=3)


def test_a_patch_for_unetr_is_not_fitted_to_the_u_net_of_the_plans(plans, caplog):
    """Enforces three tokens where the strides of six stages would make 64 of 48, now and when such plans are derived from."""
    first = derive_plans(plans, "3d_fullres", patch_size=[48, 48, 16], unetr={"num_heads": 6})
    assert first["configurations"]["3d_fullres"]["patch_size"] == [48, 48, 16]
    second = derive_plans(first, "3d_fullres", patch_size=[16, 48, 48])
    assert second["configurations"]["3d_fullres"]["patch_size"] == [16, 48, 48]
    assert "enlarged" not in caplog.text
