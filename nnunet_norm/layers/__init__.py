"""Normalization layers for channels-first feature maps, one method per file.

Everything here depends on torch alone. The classes take the place of torch's: ``norm_op(num_features, **norm_op_kwargs)``.
"""

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
from nnunet_norm.layers.instance_norm import TrackedInstanceNorm2d, TrackedInstanceNorm3d
from nnunet_norm.layers.plain import differs_from_batch_norm, plain_batch_statistics
from nnunet_norm.layers.renormalization import SYNC

__all__ = [
    "NORMS",
    "SYNC",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "FrozenBatchNorm",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "TrackedInstanceNorm2d",
    "TrackedInstanceNorm3d",
    "convert_norm",
    "differs_from_batch_norm",
    "find_norms",
    "group_count",
    "plain_batch_statistics",
    "replace_modules",
    "tracking_norms",
    "tracks_statistics",
]
