"""BatchNorm whose normalization batch is a part of the batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_norm.errors import LayerError
from nnunet_norm.layers.collecting import SteppingNorm, collect
from nnunet_norm.layers.moments import Moments, across_processes, merge, num_processes
from nnunet_norm.layers.renormalization import update_if_finite
from nnunet_norm.layers.running import RunningNorm


def _of_whole_batch(means: Tensor, variances: Tensor, counts: list[int]) -> Moments:
    """Of parts whose ``variances`` are unbiased; of the ``counts`` only the last may differ from the others."""
    precise = torch.float32 if means.device.type == "mps" else torch.float64
    number = means.new_full((len(counts),), counts[0], dtype=precise)
    number[-1:].fill_(counts[-1])  # filled, not copied from a list: nothing waits for the device
    biased = variances.to(precise) * ((number - 1) / number.clamp(min=1))[:, None]
    return merge(number, means.to(precise), biased)


# Opaque to the compiler, so that the collective stays one call at one place.
@torch.library.custom_op(
    "nnunet_norm::take_in_batch", mutates_args=("running_mean", "running_var", "num_batches_tracked")
)
def _take_in(
    means: Tensor,
    variances: Tensor,
    counts: list[int],
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float | None,
    synchronized: bool,
) -> None:
    """One step of torch's average, with the statistics of the whole batch and of all processes."""
    count, mean, var = _of_whole_batch(means, variances, counts)
    precise = mean.dtype
    if synchronized:
        if not sum(counts):  # the moments of nothing are not finite
            mean, var = torch.zeros_like(mean), torch.zeros_like(var)
        count, mean, var = across_processes(mean, var, sum(counts))
    weight: float | Tensor = 1 / (num_batches_tracked.to(precise) + 1) if momentum is None else momentum
    unbiased = var * count / (count - 1)
    updated = (
        torch.lerp(running_mean.to(precise), mean, weight),
        torch.lerp(running_var.to(precise), unbiased, weight),
    )
    update_if_finite((running_mean, running_var), updated, num_batches_tracked)


@_take_in.register_fake
def _(*_: Any) -> None:
    return None


class _GhostBatchNorm(RunningNorm, SteppingNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        normalization_batch_size: int = 1,
        sync: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats=True)
        if normalization_batch_size < 1:
            raise LayerError(f"normalization_batch_size={normalization_batch_size}: must be at least 1")
        self.normalization_batch_size = normalization_batch_size
        self.sync = sync

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization_batch_size={self.normalization_batch_size}, sync={self.sync}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, *spatial)``."""
        self._check_input_dim(x)
        if not self.training:
            return self._with_running_statistics(x)
        parts = x.split(self.normalization_batch_size)
        synchronized = self.sync and num_processes() > 1
        counts = [part.numel() // x.size(1) for part in parts]
        if min(counts) < 2 and not (synchronized and not x.numel()):
            raise LayerError(
                f"Expected more than 1 value per channel when training, got {min(counts)} for {len(parts)} part(s) of input "
                f"size {tuple(x.shape)}"
            )
        # With momentum 1 the kernel leaves the statistics of its batch in what it takes for running ones.
        dtype = torch.promote_types(x.dtype, torch.float32)
        means, variances = (x.new_zeros((len(parts), x.size(1)), dtype=dtype) for _ in range(2))
        # Single precision throughout, also in a network that was cast as a whole.
        weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
        y = [
            F.batch_norm(part, mean, var, weight, bias, part.numel() > 0, 1.0, self.eps)
            for part, mean, var in zip(parts, means, variances, strict=True)
        ]
        if self.collected is None:
            buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
            _take_in(means, variances, counts, *buffers, self.momentum, synchronized)
        elif x.numel() and not self.repeating:
            batch = _of_whole_batch(means, variances, counts)
            collect(self, batch.mean, batch.var, sum(counts))
        return torch.cat(y) if len(y) > 1 else y[0]


class GhostBatchNorm2d(_GhostBatchNorm):
    """BatchNorm of images with a normalization batch size of its own ("ghost batches").

    Train mode: the batch is cut into parts of ``normalization_batch_size`` samples (the last one may be smaller), and each is
    normalized with its own mean and variance. The running statistics take in each batch once, whole: momentum counts once
    per step, and the variance between the parts is part of theirs, and under ``torch.distributed`` the batches of all
    processes. Eval mode is BatchNorm's, and so is the state dict, key for key. Forwards of one optimizer step
    (micro-batches) count as one batch inside :func:`nnunet_norm.layers.one_step`.

    Departures from the paper: there the running statistics are updated once per part, with the statistics of the parts.

    Shape: ``(N, C, H, W)`` in and out.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        momentum: Share of the newest batch in the running statistics; ``None`` for the plain mean of all batches.
        affine: Whether ``weight`` and ``bias`` are learned, one each per channel.
        normalization_batch_size: Samples that are normalized together.
        sync: Whether the running statistics take in the batches of all processes; each forward in train mode is then a
            collective call.

    Raises:
        LayerError: For a size out of range, an input of another rank, or a part with one value per channel in train mode.

    References:
        Hoffer, Hubara and Soudry 2017, arXiv:1705.08741, algorithm 1; Wu and Johnson 2021, arXiv:2105.07576, section 4.1.
    """

    ndim = 2


class GhostBatchNorm3d(_GhostBatchNorm):
    """:class:`GhostBatchNorm2d` for volumes. Shape: ``(N, C, D, H, W)`` in and out."""

    ndim = 3
