"""GroupNorm with a group size instead of a number of groups."""

from torch import nn

from nnunet_norm.errors import LayerError


def group_count(num_channels: int, group_size: int = 16) -> int:
    """Number of groups for ``num_channels``, none smaller than ``group_size`` unless the layer itself is.

    A layer with fewer channels than ``group_size`` has one group. Otherwise a group has ``group_size`` channels, or, where
    that does not divide ``num_channels``, the smallest divisor above it: 128 channels and 16 give 8 groups, 40 give 2.

    Args:
        num_channels: Channels of the layer.
        group_size: Channels that a group has at least.

    Raises:
        LayerError: If one of them is below 1.
    """
    for name, value in (("num_channels", num_channels), ("group_size", group_size)):
        if value < 1:
            raise LayerError(f"{name}={value}: must be at least 1")
    size = min(group_size, num_channels)
    while num_channels % size:
        size += 1
    return num_channels // size


class GroupNorm(nn.GroupNorm):
    """Group Normalization (Wu and He 2018) by group size: the rule "half or 16" at ``group_size=16``.

    For each sample and group, over the group's channels and all voxels:
    ``y = (x - mean) / sqrt(var + eps) * weight + bias``. Train and eval mode are the same. The first argument is the number
    of channels, as for every other norm (``torch.nn.GroupNorm`` wants the number of groups there), so that it can stand as
    ``norm_op`` in nnU-Net's plans. Shape: ``(N, C, *spatial)`` in and out.

    Args:
        num_channels: Channels of the input.
        group_size: Channels per group; see :func:`group_count` for what happens where it does not divide.
        eps: Added to the variance.
        affine: Whether ``weight`` and ``bias`` are learned, one each per channel.

    Raises:
        LayerError: If ``num_channels`` or ``group_size`` is below 1.

    References:
        Wu and He 2018, arXiv:1803.08494, section 3.
    """

    def __init__(self, num_channels: int, group_size: int = 16, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(group_count(num_channels, group_size), num_channels, eps, affine)
