"""Normalization layers for channels-first feature maps, one method per file.

Everything here depends on torch alone. The classes take the place of torch's: ``norm_op(num_features, **norm_op_kwargs)``.
"""

from nnunet_norm.layers.activation_checkpointing import checkpoint_stages
from nnunet_norm.layers.batch_norm import BatchNorm2d, BatchNorm3d
from nnunet_norm.layers.batch_renorm import BatchRenorm2d, BatchRenorm3d
from nnunet_norm.layers.convert import (
    NORMS,
    convert_norm,
    find_norms,
    replace_modules,
    tracking_norms,
    tracks_statistics,
)
from nnunet_norm.layers.frozen_batch_norm import FrozenBatchNorm
from nnunet_norm.layers.ghost_batch_norm import GhostBatchNorm2d, GhostBatchNorm3d
from nnunet_norm.layers.group_norm import GroupNorm, group_count
from nnunet_norm.layers.input_normalization import (
    IMAGE,
    INPUT_NORMALIZATIONS,
    TILE,
    TILE_WARNING,
    InputNormalization,
    confirm_normalized_images,
    get_input_normalization,
    set_input_normalization,
)
from nnunet_norm.layers.instance_norm import TrackedInstanceNorm2d, TrackedInstanceNorm3d
from nnunet_norm.layers.plain import differs_from_batch_norm, plain_batch_statistics
from nnunet_norm.layers.renormalization import SYNC
from nnunet_norm.layers.stepping import fit_for_steps, one_step, repeated

__all__ = [
    "IMAGE",
    "INPUT_NORMALIZATIONS",
    "NORMS",
    "SYNC",
    "TILE",
    "TILE_WARNING",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "InputNormalization",
    "TrackedInstanceNorm2d",
    "TrackedInstanceNorm3d",
    "checkpoint_stages",
    "confirm_normalized_images",
    "convert_norm",
    "differs_from_batch_norm",
    "find_norms",
    "fit_for_steps",
    "get_input_normalization",
    "group_count",
    "one_step",
    "plain_batch_statistics",
    "repeated",
    "replace_modules",
    "set_input_normalization",
    "tracking_norms",
    "tracks_statistics",
]
