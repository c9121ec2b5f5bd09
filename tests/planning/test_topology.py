"""Strides, patches and lists per stage, against nnU-Net's own planner."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import topology

# Written by the planners of nnU-Net 2.8.1 for a CT dataset of 260 x 512 x 512 voxels of 2 x 0.7 x 0.7 mm.
STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
PLANNED = [
    (json.loads(file.read_text())["configurations"][name], f"{file.stem}-{name}")
    for file in sorted(STOCK.glob("*.json"))
    for name in ("2d", "3d_lowres", "3d_fullres")
]
each_planned = pytest.mark.parametrize("planned", [pytest.param(plan, id=name) for plan, name in PLANNED])
strides = st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=2, max_size=3)


@given(
    strides.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(1, 700), min_size=len(s), max_size=len(s))))
)
def test_a_patch_is_enlarged_to_the_next_multiple(case: tuple[list[int], list[int]]) -> None:
    """Enforces that the corrected patch is divisible, not smaller than asked, and the smallest such patch."""
    stride, patch = case
    fitting = topology.divisible_patch(patch, stride)
    for size, step, asked in zip(fitting, stride, patch, strict=True):
        assert size % step == 0
        assert asked <= size < asked + step


@given(st.lists(st.integers(1, 300), min_size=3, max_size=3), st.lists(st.floats(0.3, 6), min_size=3, max_size=3))
def test_no_patch_that_nnunet_plans_is_below_the_minimum(patch: list[int], spacing: list[float]) -> None:
    """Enforces that the minimum is the rule of nnU-Net's planners: what they pad a patch to always fulfils it."""
    pools, strides_, _, padded, divisible_by = get_pool_and_conv_props(spacing, patch, 4, 999999)
    architecture = {"network_class_name": "x", "arch_kwargs": {"n_stages": len(strides_), "strides": strides_}}
    stride = topology.total_stride(architecture, 3, "3d_fullres")
    assert stride == tuple(divisible_by) == tuple(2**pool for pool in pools)
    assert topology.divisible_patch(patch, stride) == tuple(padded)
    assert all(size >= least for size, least in zip(padded, topology.smallest_patch(stride), strict=True))


def test_an_axis_that_is_never_pooled_has_no_minimum() -> None:
    """Enforces 4 voxels at the bottom of pooled axes and 1 on the others, as for five slices of anisotropic data."""
    assert topology.smallest_patch((1, 32, 16)) == (1, 128, 64)


@each_planned
def test_replanning_for_the_same_patch_changes_nothing(planned: dict) -> None:
    """Enforces that a replanned architecture is the one that nnU-Net's planner wrote, plain and residual, 2d and 3d."""
    before = copy.deepcopy(planned)
    again = topology.replan(planned["architecture"], planned["spacing"], planned["patch_size"], "x")
    assert again == planned["architecture"]
    assert planned == before


@each_planned
def test_replanning_there_and_back_changes_nothing(planned: dict) -> None:
    """Enforces that nothing of nnU-Net's sequences is lost on the way over a network of three or four stages."""
    small = topology.replan(planned["architecture"], planned["spacing"], [32] * len(planned["patch_size"]), "x")
    assert 3 <= small["arch_kwargs"]["n_stages"] <= 4 < planned["architecture"]["arch_kwargs"]["n_stages"]
    again = topology.replan(small, planned["spacing"], planned["patch_size"], "x")
    assert again == planned["architecture"]


def test_further_residual_stages_continue_nnunets_sequence() -> None:
    """Enforces 1, 3, 4, 6, 6, ... blocks as in nnU-Net's ResEncUNetPlanner, and its cap of 320 features."""
    planned = next(plan for plan, name in PLANNED if name == "nnUNetResEncUNetMPlans-3d_fullres")
    larger = topology.replan(planned["architecture"], planned["spacing"], [160, 320, 320], "x")["arch_kwargs"]
    assert larger["n_stages"] == 7
    assert larger["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6, 6]
    assert larger["n_conv_per_stage_decoder"] == [1] * 6
    assert larger["features_per_stage"] == [32, 64, 128, 256, 320, 320, 320]


def plain(**changes: object) -> dict:
    kwargs = {
        "n_stages": 5,
        "features_per_stage": [10, 20, 30, 40, 50],
        "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 2, 3, 4, 5],
        "n_conv_per_stage_decoder": [4, 3, 2, 1],
    }
    return {"network_class_name": "a.PlainConvUNet", "arch_kwargs": kwargs | changes}


def test_cutting_removes_the_coarsest_stages_of_encoder_and_decoder() -> None:
    """Enforces that the decoder, whose list begins at the bottom, keeps its last entries."""
    kwargs = topology.cut(plain(), 3, "x")["arch_kwargs"]
    assert kwargs == {
        "n_stages": 3,
        "features_per_stage": [10, 20, 30],
        "kernel_sizes": [[1, 3, 3], [1, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 2, 3],
        "n_conv_per_stage_decoder": [2, 1],
    }


def test_replanning_keeps_convolutions_of_one_s_own() -> None:
    """Enforces that hand-made numbers of convolutions are cut or continued, the decoder's from the fine end."""
    fewer = topology.replan(plain(), [1, 1, 1], [32, 32, 32], "x")["arch_kwargs"]
    assert (fewer["n_conv_per_stage"], fewer["n_conv_per_stage_decoder"]) == ([1, 2, 3, 4], [3, 2, 1])
    more = topology.replan(plain(), [1, 1, 1], [128, 128, 128], "x")["arch_kwargs"]
    assert (more["n_conv_per_stage"], more["n_conv_per_stage_decoder"]) == ([1, 2, 3, 4, 5, 5], [4, 4, 3, 2, 1])


def test_one_int_for_all_stages_is_left_as_it_is() -> None:
    """Enforces nnU-Net's short notation, in which one int stands for every stage."""
    short = plain(
        n_conv_per_stage=2, n_conv_per_stage_decoder=2, features_per_stage=16, kernel_sizes=3, strides=[1] + [2] * 4
    )
    assert topology.total_stride(short, 3, "x") == (16, 16, 16)
    kwargs = topology.cut(short, 3, "x")["arch_kwargs"]
    assert (kwargs["n_conv_per_stage"], kwargs["n_conv_per_stage_decoder"], kwargs["strides"]) == (2, 2, [1, 2, 2])


@pytest.mark.parametrize(
    ("features", "ndim", "cap"),
    [
        ([32, 64, 128, 256, 320, 320], 3, 320),
        ([32, 64, 128, 256, 320], 3, 320),
        ([32, 64, 128, 256, 512, 512], 2, 512),
        ([16, 32, 48], 3, 48),
        ([32, 64, 128], 3, 320),
        ([32, 64, 128, 256, 512], 2, 512),
        ([64, 128, 256, 512, 1024], 3, 1024),
    ],
)
def test_the_cap_is_the_plans_own_where_it_shows(features: list[int], ndim: int, cap: int) -> None:
    """Enforces the plan's maximum where doubling stopped, and nnU-Net's 320 and 512 where the network ended before it."""
    assert topology.feature_cap(features, ndim) == cap


def test_features_double_up_to_the_cap() -> None:
    """Enforces min(cap, base * 2**stage) with the cap of the plan."""
    stock = plain(features_per_stage=[32, 64, 128, 256, 320])
    assert topology.with_features(stock, 3, "x", base=48)["arch_kwargs"]["features_per_stage"] == [
        48,
        96,
        192,
        320,
        320,
    ]


@pytest.mark.parametrize("num_stages", [0, 2, 6])
def test_too_few_and_too_many_stages_are_refused(num_stages: int) -> None:
    """Enforces 3 stages at least (with 2, nnU-Net's deep-supervision weights are 0/0) and no more than there are."""
    with pytest.raises(PlansError, match=rf"3d_fullres: num_stages is {num_stages}; choose 3 to 5"):
        topology.cut(plain(), num_stages, "3d_fullres")


def test_refusals_name_the_configuration_the_value_and_the_choice() -> None:
    """Enforces one telling line for a patch, features or an architecture that cannot be derived."""
    with pytest.raises(PlansError, match=r"patch size 8x14x14 can be pooled 1 time\(s\).*16 voxels"):
        topology.replan(plain(), [1, 1, 1], [8, 14, 14], "3d_fullres")
    with pytest.raises(PlansError, match=r"base_features is 64, above the plan's cap of 50"):
        topology.with_features(plain(), 3, "3d_fullres", base=64)
    with pytest.raises(PlansError, match=r"features_per_stage 8x16 has 2 entries; the network has 5 stages"):
        topology.with_features(plain(), 3, "3d_fullres", each=[8, 16])
    with pytest.raises(PlansError, match=r"3d_fullres: n_conv_per_stage has 2 entries; 5 stages need 5"):
        topology.cut(plain(n_conv_per_stage=[2, 2]), 3, "3d_fullres")
    with pytest.raises(PlansError, match=r"Primus has no strides"):
        topology.cut({"network_class_name": "a.b.Primus", "arch_kwargs": {}}, 3, "3d_fullres")
