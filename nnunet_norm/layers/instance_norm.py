"""InstanceNorm that predicts with running statistics."""

from torch import nn


class TrackedInstanceNorm2d(nn.InstanceNorm2d):
    """InstanceNorm whose eval mode uses running statistics: train mode per sample and channel, eval mode per channel.

    ``torch.nn.InstanceNorm2d`` with ``track_running_stats=True``: what a voxel is predicted to be no longer depends on its
    tile, at the price of another function in eval mode than the one that was trained. The running variance is the mean
    of the variances of the samples, as torch keeps it; the variance between their means is not in it. Shape:
    ``(N, C, H, W)`` in and out.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        momentum: Share of the newest batch in the running statistics.
        affine: Whether ``weight`` and ``bias`` are learned, one each per channel.

    References:
        Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, track_running_stats=True)


class TrackedInstanceNorm3d(nn.InstanceNorm3d):
    """:class:`TrackedInstanceNorm2d` for volumes. Shape: ``(N, C, D, H, W)`` in and out."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, track_running_stats=True)
