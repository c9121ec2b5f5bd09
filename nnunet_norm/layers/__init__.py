"""Normalization layers for channels-first feature maps, one method per file.

Everything here depends on torch alone. The classes take the place of torch's: ``norm_op(num_features, **norm_op_kwargs)``.
"""

from nnunet_norm.layers.batch_renorm import BatchRenorm2d, BatchRenorm3d, plain_batch_statistics
from nnunet_norm.layers.convert import NORMS, convert_norm, find_norms
from nnunet_norm.layers.group_norm import GroupNorm, group_count
from nnunet_norm.layers.instance_norm import TrackedInstanceNorm2d, TrackedInstanceNorm3d

__all__ = [
    "NORMS",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "GroupNorm",
    "TrackedInstanceNorm2d",
    "TrackedInstanceNorm3d",
    "convert_norm",
    "find_norms",
    "group_count",
    "plain_batch_statistics",
]
