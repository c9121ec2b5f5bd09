"""UNETR: MONAI's, of the size of the plans' patch, with norms that can be exchanged."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pydoc import locate
from typing import Any

from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import convert_norm
from nnunet_norm.settings import NormSettings, UnetrSettings

UNETR = "UNETR"
"""In a trainer's name, behind the norm."""

TOKEN = 16
"""Voxels per axis that the transformer takes for one token; MONAI's UNETR has no other, on any axis (section 3.1)."""

LEARNING_RATE = 1e-4
"""At the start, for AdamW (section 4.2)."""

_MODULE = "monai.networks.nets.unetr"


def trains_unetr(trainer_name: str) -> bool:
    """Whether a trainer of this package with that name trains a UNETR."""
    trainer, *options = trainer_name.split("_")
    norm = trainer.removeprefix("nnUNetTrainer")
    return norm not in ("", trainer) and options[:1] == [UNETR]


def is_unetr(network: nn.Module) -> bool:
    """Whether a network is MONAI's UNETR, which is not imported for that."""
    return any(f"{base.__module__}.{base.__name__}" == f"{_MODULE}.UNETR" for base in type(network).__mro__)


def refuse_patch(patch_size: Sequence[int], where: str) -> None:
    """Refuse a patch that tokens do not fill.

    MONAI would leave the rest of an axis out of the transformer, and fail when its maps meet those of the convolutions.

    Args:
        patch_size: of the configuration, which is the one extent that the network takes.
        where: what the line begins with, for example the configuration.

    Raises:
        PlansError: An axis is no multiple of 16.
    """
    if all(size % TOKEN == 0 for size in patch_size):
        return
    fitting = [max(-(-size // TOKEN), 1) * TOKEN for size in patch_size]
    raise PlansError(
        f"{where}: patch size {'x'.join(map(str, patch_size))} is not made of whole tokens of UNETR, {TOKEN} voxels on every "
        f"axis: derive plans with nnunet-norm plan --patch-size {' '.join(map(str, fitting))}"
    )


def build_unetr(
    configuration: Mapping[str, Any], num_input_channels: int, num_output_channels: int, *, where: str = "plans"
) -> nn.Module:
    """MONAI's UNETR for one configuration, in 2d or 3d, with the norm of the plans in its convolutional blocks.

    It takes inputs of the patch size alone, ``(N, C, *patch_size)``, because every token has a learned position; the output
    is ``(N, K, *patch_size)``, without deep supervision. Every voxel of the output depends on the whole tile.

    Departures: the norms are those of the plans, with their arguments (nnU-Net's InstanceNorm has affine parameters, MONAI's
    has none); the LayerNorms of the transformer stay. Layers that no forward pass uses, those of cross-attention, are left
    out: which of them are built depends on MONAI's version, and processes that train together would wait for their gradients.
    Keys of the last layer, ``out``, have ``seg_layers`` in them, as those of nnU-Net's networks, so that
    ``-pretrained_weights`` leaves it to the labels.

    Args:
        configuration: Of the plans, inheritance resolved; sizes are those of ``nnunet_norm.unetr``.
        num_input_channels: C.
        num_output_channels: K.
        where: What a refusal begins with.

    Raises:
        PlansError: The patch is not made of whole tokens (``refuse_patch``), the norm cannot be imported, or the block
            ``"nnunet_norm"`` is not valid.

    References:
        Hatamizadeh et al. 2022, arXiv:2103.10504, section 3.1.
    """
    patch_size = configuration["patch_size"]
    refuse_patch(patch_size, where)
    settings = NormSettings.from_configuration(configuration).unetr or UnetrSettings()
    from monai.networks.nets import unetr  # takes seconds: imported where it is needed

    network = unetr.UNETR(
        num_input_channels,
        num_output_channels,
        tuple(patch_size),
        norm_name=("instance", {"affine": True}),
        spatial_dims=len(patch_size),
        **dataclasses.asdict(settings),
    )
    for block in network.vit.blocks:
        block.cross_attn = block.norm_cross_attn = nn.Identity()
    network.add_module("out", nn.Sequential(OrderedDict(seg_layers=network.out)))
    return _with_norm_of(configuration, network, where)


def _with_norm_of(configuration: Mapping[str, Any], network: nn.Module, where: str) -> nn.Module:
    """The network with the norm that the plans give their own network; as it is if they give it none to choose."""
    kwargs = configuration.get("architecture", {}).get("arch_kwargs", {})
    if "norm_op" not in kwargs:
        return network
    if kwargs["norm_op"] is None:
        return convert_norm(network, "none")
    norm_op: Any = locate(kwargs["norm_op"])
    if norm_op is None:
        raise PlansError(
            f"{where}: norm_op is {kwargs['norm_op']!r}, which cannot be imported; give the path of a class"
        )
    norm_op_kwargs = kwargs.get("norm_op_kwargs") or {}
    return convert_norm(network, lambda channels, **_: norm_op(channels, **norm_op_kwargs))
