"""InstanceNorm that predicts with running statistics."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_norm.layers.collecting import SteppingNorm, collect
from nnunet_norm.layers.moments import num_processes


# Opaque to the compiler, so that the collective stays one call at one place.
@torch.library.custom_op("nnunet_norm::average_over_samples", mutates_args=("running_mean", "running_var"))
def _average(running_mean: Tensor, running_var: Tensor, samples: int) -> None:
    """The average over the processes, each with the weight of its samples: what one process with all of them would have."""
    own = torch.cat([running_mean, running_var, running_mean.new_ones(1)]).double()
    weighted = own * samples
    dist.all_reduce(weighted)
    mean, var = torch.where(weighted[-1] > 0, weighted / weighted[-1], own)[:-1].chunk(2)
    running_mean.copy_(mean)
    running_var.copy_(var)


class _TrackedInstanceNorm(SteppingNorm):
    sync = True
    _get_no_batch_dim: Callable[[], int]
    averages_samples = True
    counts_steps = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, *spatial)``."""
        if self.training and self.collected is not None:
            return self._collecting(x)
        synchronized = self.training and self.sync and num_processes() > 1
        if synchronized and not x.numel():  # torch's InstanceNorm takes no empty batch in train mode
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        else:
            y = super().forward(x)
        if synchronized:
            # The average is linear in the statistics of the samples, and began with the same values on every process.
            _average(self.running_mean, self.running_var, len(x))
        return y

    def _collecting(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not x.numel():
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        assert self.running_mean is not None
        batched = x if x.dim() > self._get_no_batch_dim() else x[None]
        # With momentum 1 the kernel leaves the means over the samples in what it takes for running statistics.
        mean, var = torch.zeros_like(self.running_mean), torch.ones_like(self.running_mean)
        y = F.instance_norm(batched, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        collect(self, mean, var, len(batched))
        return y.view_as(x)

    def newest_weight(self, steps: Tensor) -> Tensor | float:
        """See :class:`SteppingNorm`; without momentum torch's InstanceNorm takes nothing in."""
        return self.momentum or 0.0


class TrackedInstanceNorm2d(_TrackedInstanceNorm, nn.InstanceNorm2d):
    """InstanceNorm whose eval mode uses running statistics: train mode per sample and channel, eval mode per channel.

    ``torch.nn.InstanceNorm2d`` with ``track_running_stats=True``: what a voxel is predicted to be no longer depends on its
    tile, at the price of another function in eval mode than the one that was trained. The running variance is the mean
    of the variances of the samples, as torch keeps it; the variance between their means is not in it. Under
    ``torch.distributed`` the samples of all processes are taken in, unless ``sync`` is set to False; each forward in train
    mode is then a collective call. Forwards of one optimizer step (micro-batches) count as one batch inside
    :func:`nnunet_norm.layers.one_step`. Shape: ``(N, C, H, W)`` in and out.

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


class TrackedInstanceNorm3d(_TrackedInstanceNorm, nn.InstanceNorm3d):
    """:class:`TrackedInstanceNorm2d` for volumes. Shape: ``(N, C, D, H, W)`` in and out."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, track_running_stats=True)
