"""The stages of an nnU-Net architecture: strides, patch sizes that fit them, and the lists with one entry per stage.

An *architecture* is the dictionary under that key in a configuration (``network_class_name``, ``arch_kwargs``,
``_kw_requires_import``). PlainConvUNet and ResidualEncoderUNet spell their stages in the same keys; a network without
``strides`` has no topology that could be changed here. Functions return new architectures and leave their input alone.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from nnunet_norm.errors import PlansError

Architecture = dict[str, Any]

ENCODER_LISTS = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage")
"""Lists with one entry per stage, the finest first; nnU-Net also takes one int for all stages."""

DECODER_LIST = "n_conv_per_stage_decoder"
"""One entry per stage but the last, in the order of computation: the coarsest first."""

SMALLEST_BOTTOM = 4
"""nnU-Net halves an axis only while at least 4 voxels remain (its planners' ``UNet_featuremap_min_edge_length``)."""

SMALLEST_STAGES = 3
"""nnU-Net's deep supervision gives its coarsest output weight 0: with two stages it is the only one, and the loss is NaN."""

LARGEST_FEATURES = {2: 512, 3: 320}
"""Where nnU-Net's planners stop doubling the features, by number of spatial axes."""

RESIDUAL_BLOCKS = (1, 3, 4, 6)
"""Residual blocks of the first stages in nnU-Net's ResEncUNetPlanner; every further stage has as many as the last."""


def kwargs_of(architecture: Architecture, configuration: str) -> dict[str, Any]:
    """The arguments of the network.

    Raises:
        PlansError: the network is not described stage by stage, or its lists do not have one entry per stage.
    """
    kwargs: dict[str, Any] = architecture["arch_kwargs"]
    if "strides" not in kwargs or "n_stages" not in kwargs:
        name = architecture["network_class_name"].rsplit(".", 1)[-1]
        raise PlansError(
            f"configuration {configuration}: {name} has no strides and stages that could be changed; patch size, stages "
            "and features are derived for PlainConvUNet, ResidualEncoderUNet and networks with their arguments"
        )
    stages = kwargs["n_stages"]
    lengths = {key: (kwargs.get(key), stages) for key in ENCODER_LISTS} | {
        DECODER_LIST: (kwargs.get(DECODER_LIST), stages - 1)
    }
    for key, (value, length) in lengths.items():
        if isinstance(value, list | tuple) and len(value) != length:
            raise PlansError(
                f"configuration {configuration}: {key} has {len(value)} entries; {stages} stages need {length}"
            )
    return kwargs


def total_stride(architecture: Architecture, ndim: int, configuration: str) -> tuple[int, ...]:
    """Per axis the product of the encoder's strides: what a patch has to be divisible by."""
    kwargs = kwargs_of(architecture, configuration)
    per_stage = kwargs["strides"] if isinstance(kwargs["strides"], list | tuple) else [kwargs["strides"]]
    per_axis = [stride if isinstance(stride, list | tuple) else [stride] * ndim for stride in per_stage]
    return tuple(math.prod(stride[axis] for stride in per_axis) for axis in range(ndim))


def divisible_patch(patch_size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The smallest patch that is at least ``patch_size`` and a multiple of ``stride`` on every axis."""
    return tuple(-(-size // step) * step for size, step in zip(patch_size, stride, strict=True))


def smallest_patch(stride: Sequence[int]) -> tuple[int, ...]:
    """The network's minimum: on an axis that is pooled, 4 voxels at the bottom; on one that never is, a single voxel.

    This is the rule by which nnU-Net's planners place their strides, so no stock plan is below it. Anisotropic data may
    have an axis that no stage pools; its kernels are padded like all others, so nothing bounds it from below.
    """
    return tuple(SMALLEST_BOTTOM * step if step > 1 else 1 for step in stride)


def replan(
    architecture: Architecture, spacing: Sequence[float], patch_size: Sequence[int], configuration: str
) -> Architecture:
    """Strides, kernels and all other lists as nnU-Net's planners would choose them for this patch.

    Features keep doubling up to their cap (:func:`feature_cap`). The convolutions of a stage stay what they are; further
    stages continue nnU-Net's sequence (two convolutions, or 1, 3, 4, 6, 6, ... residual blocks).

    Raises:
        PlansError: the patch is too small to be pooled twice (:data:`SMALLEST_STAGES`).
    """
    kwargs = kwargs_of(architecture, configuration)
    _, strides, kernel_sizes, _, _ = get_pool_and_conv_props(spacing, patch_size, SMALLEST_BOTTOM, 999999)
    stages = len(strides)
    if stages < SMALLEST_STAGES:
        raise PlansError(
            f"configuration {configuration}: patch size {as_text(patch_size)} can be pooled {stages - 1} time(s); a network "
            f"needs {SMALLEST_STAGES} stages, thus {SMALLEST_BOTTOM * 2 ** (SMALLEST_STAGES - 1)} voxels on the axes of "
            f"finest spacing (half as much again where that is one axis)"
        )
    features = _per_stage(kwargs["features_per_stage"], kwargs["n_stages"])
    result = copy.deepcopy(architecture)
    new = result["arch_kwargs"]
    new["n_stages"] = stages
    new["strides"] = [list(stride) for stride in strides]
    new["kernel_sizes"] = [list(kernel) for kernel in kernel_sizes]
    new["features_per_stage"] = doubled_features(features[0], stages, feature_cap(features, len(spacing)))
    for key in ("n_conv_per_stage", "n_blocks_per_stage", "bottleneck_channels"):
        if isinstance(kwargs.get(key), list | tuple):
            new[key] = _continued(list(kwargs[key]), stages, RESIDUAL_BLOCKS if key == "n_blocks_per_stage" else ())
    if isinstance(kwargs[DECODER_LIST], list | tuple):
        # The decoder begins at the bottom: its last entry is the finest stage, which exists in every topology.
        new[DECODER_LIST] = _continued(list(kwargs[DECODER_LIST])[::-1], stages - 1, ())[::-1]
    return result


def _continued(own: list[int], length: int, table: Sequence[int]) -> list[int]:
    """The first ``length`` of a list; where it is too short, nnU-Net's table goes on if the list began like it."""
    if table and own == [*table, *[table[-1]] * len(own)][: len(own)]:
        own = own + list(table[len(own) :])
    return [*own, *[own[-1]] * length][:length]


def cut(architecture: Architecture, num_stages: int, configuration: str) -> Architecture:
    """The network without its coarsest stages: the finest ``num_stages`` remain as they are.

    Raises:
        PlansError: fewer than :data:`SMALLEST_STAGES`, or more than there are.
    """
    kwargs = kwargs_of(architecture, configuration)
    if not SMALLEST_STAGES <= num_stages <= kwargs["n_stages"]:
        raise PlansError(
            f"configuration {configuration}: num_stages is {num_stages}; choose {SMALLEST_STAGES} to {kwargs['n_stages']} "
            "(more stages need a larger patch together with --replan-topology)"
        )
    result = copy.deepcopy(architecture)
    new = result["arch_kwargs"]
    new["n_stages"] = num_stages
    for key in (*ENCODER_LISTS, "bottleneck_channels"):
        if isinstance(kwargs.get(key), list | tuple):
            new[key] = new[key][:num_stages]
    if isinstance(kwargs[DECODER_LIST], list | tuple):
        new[DECODER_LIST] = new[DECODER_LIST][-(num_stages - 1) :]
    return result


def feature_cap(features: Sequence[int], ndim: int) -> int:
    """Where doubling stops: at the plan's own maximum if its last stage did not double, else at nnU-Net's 512 or 320.

    A short network may end before its cap; its largest number of features then says nothing about the cap.
    """
    stopped = len(features) > 1 and features[-1] < 2 * features[-2]
    return max(features) if stopped else max(*features, LARGEST_FEATURES[ndim])


def doubled_features(base: int, num_stages: int, cap: int) -> list[int]:
    """``min(cap, base * 2**stage)`` for every stage."""
    return [min(cap, base * 2**stage) for stage in range(num_stages)]


def with_features(
    architecture: Architecture,
    ndim: int,
    configuration: str,
    *,
    base: int | None = None,
    each: Sequence[int] | None = None,
) -> Architecture:
    """The network with ``base`` features doubled per stage up to the plan's cap, or with ``each`` as it stands.

    Raises:
        PlansError: ``base`` above the cap, or ``each`` without one entry per stage.
    """
    kwargs = kwargs_of(architecture, configuration)
    stages = kwargs["n_stages"]
    result = copy.deepcopy(architecture)
    if each is not None:
        if len(each) != stages:
            raise PlansError(
                f"configuration {configuration}: features_per_stage {as_text(each)} has {len(each)} entries; "
                f"the network has {stages} stages"
            )
        result["arch_kwargs"]["features_per_stage"] = list(each)
    elif base is not None:
        cap = feature_cap(_per_stage(kwargs["features_per_stage"], stages), ndim)
        if base > cap:
            raise PlansError(
                f"configuration {configuration}: base_features is {base}, above the plan's cap of {cap}; "
                "give features_per_stage instead"
            )
        result["arch_kwargs"]["features_per_stage"] = doubled_features(base, stages, cap)
    return result


def _per_stage(value: int | Sequence[int], num_stages: int) -> list[int]:
    return [value] * num_stages if isinstance(value, int) else list(value)


def as_text(shape: Sequence[int]) -> str:
    """``64x160x160``."""
    return "x".join(str(size) for size in shape)
