"""Batch Renormalization at the price of Batch Normalization."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import synchronized
from nnunet_norm.layers.collecting import SteppingNorm, collect
from nnunet_norm.layers.moments import num_processes
from nnunet_norm.layers.renormalization import (
    SYNC,
    Limits,
    Renormalize,
    Step,
    batch_statistics,
    clip,
    correction_of,
    fold,
    scheduled_limits,
    step,
    update_if_finite,
)
from nnunet_norm.layers.running import RunningNorm


class Correction(NamedTuple):
    """The r and d of one batch before clipping, and which channels the limits clip; each of shape ``(C,)``."""

    r: Tensor
    d: Tensor
    clipped: Tensor


# Opaque to the compiler on purpose. Traced openly, the backward graph may compute r again from buffers that the forward
# graph has already updated, and the gradients are wrong without an error; an opaque op is never computed again.
@torch.library.custom_op(
    "nnunet_norm::batch_renorm_step", mutates_args=("running_mean", "running_var", "num_batches_tracked")
)
def _compiled_step(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    count: int,
    momentum: float | None,
    eps: float,
    r_max: float,
    d_max: float,
    warmup_steps: int,
    ramp_steps: int,
    sync: str,
    taking_in: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    schedule = (r_max, d_max, warmup_steps, ramp_steps, sync, taking_in)
    of = step(mean, var, running_mean, running_var, num_batches_tracked, count, momentum, eps, *schedule)
    # An operator must not return what it was given.
    return of.mean.clone(), of.var.clone(), of.r, of.d, mean.new_zeros(()) if of.number is None else of.number


@_compiled_step.register_fake
def _(mean: Tensor, var: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (torch.empty_like(mean), torch.empty_like(var), torch.empty_like(mean), torch.empty_like(var))
    return (*vectors, mean.new_empty(()))


class BatchStatisticsNorm(RunningNorm, SteppingNorm):
    """What BatchRenorm and BatchNorm have in common: the statistics of the batch, corrected within limits."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int = 5_000,
        ramp_steps: int = 35_000,
        sync: str = "running",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats=True)
        if not r_max >= 1:
            raise LayerError(f"r_max={r_max}: must be at least 1 (1 leaves the scale of the batch as it is)")
        if not d_max >= 0:
            raise LayerError(f"d_max={d_max}: must be at least 0 (0 leaves the mean of the batch as it is)")
        for name, value in (("warmup_steps", warmup_steps), ("ramp_steps", ramp_steps)):
            if value < 0:
                raise LayerError(f"{name}={value}: must be at least 0")
        self.r_max, self.d_max = r_max, d_max
        if sync not in SYNC:
            raise LayerError(f"sync={sync!r}: choose from {', '.join(SYNC)}")
        self.warmup_steps, self.ramp_steps = warmup_steps, ramp_steps
        self.sync = sync

    def extra_repr(self) -> str:
        """What ``repr`` says of the layer."""
        schedule = f"warmup_steps={self.warmup_steps}, ramp_steps={self.ramp_steps}"
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, {schedule}, sync={self.sync!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, *spatial)``."""
        self._check_input_dim(x)
        if not self.training:
            return self._with_running_statistics(x)
        sync = self.sync if num_processes() > 1 else "none"
        if sync == "none" or (sync == "running" and x.numel()):
            self._require_values(x)
        compiling = torch.compiler.is_compiling()
        if not compiling and self._is_batch_norm and sync == "none" and self.collected is None:
            return self._batch_norm(x)
        of = self._of_step(x.detach(), sync)
        if sync == "full":
            scale, shift = fold(self.weight, self.bias, of.r, of.d)
            assert of.number is not None
            return synchronized.normalize(x, scale, shift, of.mean, of.var, of.number, self.eps)
        if not x.numel():
            return self._with_running_statistics(x)  # nothing, but with a gradient of zero for the affine parameters
        if compiling:
            return F.batch_norm(x, None, None, *fold(self.weight, self.bias, of.r, of.d), True, 0.0, self.eps)
        return Renormalize.apply(x, self.weight, self.bias, of, self.eps)

    def _of_step(self, x: Tensor, sync: str) -> Step:
        """What ``x`` is normalized with; it is taken in, or collected if the step has more to come."""
        mean, var = batch_statistics(x)
        count, taking_in = x.numel() // x.size(1), self.collected is None
        if not taking_in:
            collect(self, mean, var, count)
        buffers: tuple[Any, ...] = (self.running_mean, self.running_var, self.num_batches_tracked)
        schedule = (self.eps, self.r_max, self.d_max, self.warmup_steps, self.ramp_steps, sync, taking_in)
        run: Any = _compiled_step if torch.compiler.is_compiling() else step
        return Step(*run(mean, var, *buffers, count, self.momentum, *schedule))

    @property
    def _is_batch_norm(self) -> bool:
        """Closed limits with torch's exponential average."""
        return self.r_max == 1 and self.d_max == 0 and self.momentum is not None

    def newest_weight(self, steps: Tensor) -> Tensor | float:
        """See :class:`SteppingNorm`; ``max(momentum, 1 / t)``, or BatchNorm's own with closed limits."""
        if self._is_batch_norm:
            assert self.momentum is not None
            return self.momentum
        return (1 / (steps + 1)).clamp(min=self.momentum or 0.0)

    def _require_values(self, x: Tensor) -> None:
        if x.numel() <= x.size(1):
            raise LayerError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")

    def _batch_norm(self, x: Tensor) -> Tensor:
        """Closed limits: torch's BatchNorm to the last bit, its exponential average included."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)  # type: ignore[arg-type]
        update_if_finite((self.running_mean, self.running_var), (mean, var), self.num_batches_tracked)
        return y

    def limits(self) -> Limits:
        """The limits of the next training step, from ``num_batches_tracked`` and the schedule."""
        assert self.num_batches_tracked is not None
        return scheduled_limits(
            self.num_batches_tracked.float(), self.warmup_steps, self.ramp_steps, self.r_max, self.d_max
        )

    @torch.no_grad()
    def correction(self, x: Tensor) -> Correction:
        """The r and d of ``x`` before clipping, against the present running statistics; changes nothing."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = batch_statistics(x)
        r, d = correction_of(mean, var, self.running_mean.to(mean.dtype), self.running_var.to(var.dtype), self.eps)
        clipped_r, clipped_d = clip(r, d, self.limits())
        return Correction(r, d, (clipped_r != r) | (clipped_d != d))


class BatchRenorm2d(BatchStatisticsNorm):
    """Batch Renormalization of images (Ioffe 2017).

    Train mode, for a channel with mean m and biased variance v over ``(N, *spatial)`` and running statistics m_r and v_r as
    they were before this batch::

        r = clip(sqrt(v + eps) / sqrt(v_r + eps), 1 / r_max, r_max)
        d = clip((m - m_r) / sqrt(v_r + eps), -d_max, d_max)
        y = ((x - m) / sqrt(v + eps) * r + d) * weight + bias

    No gradient flows through r and d; it does through m and v. With open limits this is, up to clipping, what eval mode
    computes: normalization with the running statistics. Eval mode is BatchNorm's. The state dict is BatchNorm's, key for
    key, and loads strictly both ways. Statistics are computed in single precision at least, under autocast too.

    The limits are closed (BatchNorm) for ``warmup_steps`` steps and open linearly over the next ``ramp_steps``; a step is one
    forward in train mode (but see below), counted in ``num_batches_tracked``, so a schedule continues where a checkpoint left
    it.

    Departures from the paper: both limits grow over the same steps; the running variance is unbiased, as in torch; the
    newest batch has the weight ``max(momentum, 1 / t)`` at step t, so that the running statistics do not remember their
    initial values. With ``r_max=1`` and ``d_max=0`` the layer is torch's BatchNorm and keeps torch's exponential average:
    outputs, gradients and buffers agree with it, in eager mode to the last bit. A batch that makes a running statistic
    non-finite is not taken in, and not counted.

    Under ``torch.distributed`` the running statistics take in the batches of all processes (count, mean and sum of squared
    deviations merged exactly, unequal and empty batches included), so that they are the same on all of them after every
    step; r and d refer to them. What normalizes is each process's own batch, or with ``sync="full"`` that of all, with the
    gradients of one process that sees the whole batch. Each forward in train mode is then a collective call, and each
    backward with ``sync="full"``: all processes must make equally many, and a refusal on one leaves the others waiting
    until their time runs out. One value per channel over all processes is not noticed with ``sync="full"``.

    Forwards of one optimizer step (micro-batches) count as one inside :func:`nnunet_norm.layers.one_step`: r, d and the
    limits refer to the statistics and the number of steps as they were when it began. There, and only there, a forward may
    be run again (activation checkpointing), inside :func:`nnunet_norm.layers.repeated`. Gradients of gradients are refused.

    Shape: ``(N, C, H, W)`` in and out.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance; neither r nor the running variance contains it.
        momentum: Least share of the newest batch in the running statistics; ``None`` for the plain mean of all batches.
        affine: Whether ``weight`` and ``bias`` are learned, one each per channel.
        r_max: Largest factor by which the scale is corrected, at least 1.
        d_max: Largest shift, in running standard deviations, at least 0.
        warmup_steps: Training steps as plain BatchNorm.
        ramp_steps: Steps after these until the limits are fully open.
        sync: What processes share: "running" statistics, "full" for those that normalize, too, or "none".

    Raises:
        LayerError: For a limit or a number of steps out of range, an input of another rank, or, in train mode, an input
            with one value per channel.

    References:
        Ioffe 2017, arXiv:1702.03275, section 3 and algorithm 1; the end points 3 and 5 from section 4.2.

    Example:
        >>> norm = BatchRenorm2d(8, warmup_steps=0, ramp_steps=0)
        >>> norm(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    ndim = 2


class BatchRenorm3d(BatchStatisticsNorm):
    """:class:`BatchRenorm2d` for volumes. Shape: ``(N, C, D, H, W)`` in and out."""

    ndim = 3
