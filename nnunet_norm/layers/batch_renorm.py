"""Batch Renormalization at the price of Batch Normalization.

Shape suffixes: every statistic is a vector of length C.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase

from nnunet_norm.errors import LayerError

_HALF = (torch.float16, torch.bfloat16)


class Limits(NamedTuple):
    """How far the correction may go: ``1/r_max <= r <= r_max`` and ``|d| <= d_max``, 0-dim tensors."""

    r_max: Tensor
    d_max: Tensor


class Correction(NamedTuple):
    """The r and d of one batch before clipping, and which channels the limits clip; each of shape ``(C,)``."""

    r: Tensor
    d: Tensor
    clipped: Tensor


def scheduled_limits(steps: Tensor, warmup_steps: int, ramp_steps: int, r_max: float, d_max: float) -> Limits:
    """The limits after ``steps`` finished steps: (1, 0) during the warm-up, then linearly up to ``(r_max, d_max)``.

    The first step after the warm-up already has a ``1 / (ramp_steps + 1)`` share, so ``ramp_steps=0`` is a switch and
    ``warmup_steps=ramp_steps=0`` the full limits from the first step. Tensors throughout: nothing waits for the device.
    """
    progress = ((steps - warmup_steps + 1) / (ramp_steps + 1)).clamp(0, 1)
    return Limits(1 + (r_max - 1) * progress, d_max * progress)


def _correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    running_std = torch.sqrt(running_var + eps)
    return torch.sqrt(var + eps) / running_std, (mean - running_mean) / running_std


def _clip(r: Tensor, d: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    return torch.clamp(r, 1 / limits.r_max, limits.r_max), torch.clamp(d, -limits.d_max, limits.d_max)


def _update_if_finite(buffers: tuple[Tensor, Tensor], updated: tuple[Tensor, Tensor], steps: Tensor) -> None:
    """Write the new running statistics and count the step, or leave everything as it was if a value is not finite."""
    finite = torch.isfinite(updated[0]).all() & torch.isfinite(updated[1]).all()
    for buffer, value in zip(buffers, updated, strict=True):
        buffer.copy_(torch.where(finite, value.to(buffer.dtype), buffer))
    steps.add_(finite)


def _step(
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
) -> tuple[Tensor, Tensor]:
    """The r and d of this batch from the statistics before it; then the running statistics take this batch in.

    The weight of the newest batch is ``max(momentum, 1 / t)`` at step t (torch's cumulative average, then its exponential
    one), so that the zeros and ones which the buffers begin with have no part in them after the first step. With limits
    that never open it is ``momentum``, as in BatchNorm.
    """
    steps = num_batches_tracked.to(mean.dtype)
    limits = scheduled_limits(steps, warmup_steps, ramp_steps, r_max, d_max)
    # The buffers may be half precision in a network that was cast as a whole; their arithmetic never is.
    old_mean, old_var = running_mean.to(mean.dtype), running_var.to(var.dtype)
    r, d = _clip(*_correction(mean, var, old_mean, old_var, eps), limits)
    if momentum is not None and r_max == 1 and d_max == 0:
        weight = torch.full_like(steps, momentum)  # BatchNorm's own average
    else:
        weight = (1 / (steps + 1)).clamp(min=momentum or 0.0)
    unbiased = var * (count / (count - 1))
    updated = torch.lerp(old_mean, mean, weight), torch.lerp(old_var, unbiased, weight)
    _update_if_finite((running_mean, running_var), updated, num_batches_tracked)
    return r, d


# Opaque to the compiler on purpose. Traced openly, the backward graph may compute r again from buffers that the forward
# graph has already updated, and the gradients are wrong without an error; an opaque op is never computed again.
_compiled_step = torch.library.custom_op(
    "nnunet_norm::batch_renorm_step", _step, mutates_args=("running_mean", "running_var", "num_batches_tracked")
)


@_compiled_step.register_fake
def _(mean: Tensor, var: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(var)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over ``(N, *spatial)``, at least in single precision."""
    has_kernel = x.device.type == "cuda" or (x.device.type == "cpu" and x.dtype not in _HALF)
    if torch.compiler.is_compiling() or not has_kernel:
        # Compiled, this is the reduction that batch_norm itself decomposes into, and the two become one. The kernel
        # below returns the statistics of half tensors in half precision on the CPU; on CUDA it does not.
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x.float() if x.dtype in _HALF else x, dims, correction=0)
        return mean, var
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var


class _Renormalize(torch.autograd.Function):
    """``((x - mean) / sqrt(var + eps)) * (weight * r) + (bias + weight * d)`` with the gradient of BatchNorm's train mode.

    The kernels are torch's own: the eval-mode one with the batch's statistics forward, the train-mode one backward. Saved
    for the backward pass: the input and vectors, as BatchNorm does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor, Tensor],
        correction: tuple[Tensor, Tensor],
        eps: float,
    ) -> Tensor:
        (mean, var), (r, d) = statistics, correction
        scale, shift = _fold(weight, bias, r, d)
        ctx.eps = eps
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        ctx.save_for_backward(x, scale, mean, torch.rsqrt(var + eps), r, d)
        return torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, invstd, r, d = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # grad_weight = grad_scale * r + grad_shift * d: both are needed for it.
        mask = [needs_x, needs_weight, needs_weight or needs_bias]
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, invstd, True, ctx.eps, mask
        )
        grad_weight = (grad_scale * r + grad_shift * d).to(ctx.dtypes[0]) if needs_weight else None
        grad_bias = grad_shift.to(ctx.dtypes[1]) if needs_bias else None
        return grad_x if needs_x else None, grad_weight, grad_bias, None, None, None


def _fold(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Affine parameters that apply r and d too: ``(weight * r, bias + weight * d)``."""
    if weight is None:
        return r, d
    return weight * r, weight * d if bias is None else bias + weight * d


class _BatchRenorm(_NormBase):
    # Not a subclass of torch's _BatchNorm: under DDP nnU-Net turns every one of those into a SyncBatchNorm.
    ndim: int

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
        self.warmup_steps, self.ramp_steps = warmup_steps, ramp_steps

    def extra_repr(self) -> str:
        schedule = f"warmup_steps={self.warmup_steps}, ramp_steps={self.ramp_steps}"
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, {schedule}"

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's own name
        if input.dim() != self.ndim + 2:
            raise LayerError(f"expected {self.ndim + 2}D input (N, C, *spatial), got {input.dim()}D input")

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, *spatial)``."""
        self._check_input_dim(x)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if x.numel() <= x.size(1):
            raise LayerError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        if torch.compiler.is_compiling():
            mean, var = batch_statistics(x.detach())
            scale, shift = _fold(self.weight, self.bias, *_compiled_step(mean, var, *self._step_arguments(x)))
            return F.batch_norm(x, None, None, scale, shift, True, 0.0, self.eps)
        if self.r_max == 1 and self.d_max == 0 and self.momentum is not None:
            return self._batch_norm(x)
        with torch.no_grad():
            statistics = batch_statistics(x)
            correction = _step(*statistics, *self._step_arguments(x))
        return _Renormalize.apply(x, self.weight, self.bias, statistics, correction, self.eps)

    def _step_arguments(self, x: Tensor) -> tuple[Any, ...]:
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        schedule = (self.r_max, self.d_max, self.warmup_steps, self.ramp_steps)
        return (*buffers, x.numel() // x.size(1), self.momentum, self.eps, *schedule)

    def _batch_norm(self, x: Tensor) -> Tensor:
        """Closed limits: torch's BatchNorm to the last bit, its exponential average included."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)  # type: ignore[arg-type]
        _update_if_finite((self.running_mean, self.running_var), (mean, var), self.num_batches_tracked)
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
        r, d = _correction(mean, var, self.running_mean.to(mean.dtype), self.running_var.to(var.dtype), self.eps)
        clipped_r, clipped_d = _clip(r, d, self.limits())
        return Correction(r, d, (clipped_r != r) | (clipped_d != d))


class BatchRenorm2d(_BatchRenorm):
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
    forward in train mode, counted in ``num_batches_tracked``, so a schedule continues where a checkpoint left it.

    Departures from the paper: both limits grow over the same steps; the running variance is unbiased, as in torch; the
    newest batch has the weight ``max(momentum, 1 / t)`` at step t, so that the running statistics do not remember their
    initial values. With ``r_max=1`` and ``d_max=0`` the layer is torch's BatchNorm and keeps torch's exponential average:
    outputs, gradients and buffers agree with it, in eager mode to the last bit. A batch that makes a running statistic
    non-finite is not taken in, and not counted.

    A forward in train mode that is run again for the same step (``torch.utils.checkpoint``) counts again and sees the
    statistics of the first run: do not put the layer into checkpointed segments. Gradients of gradients are refused.

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


class BatchRenorm3d(_BatchRenorm):
    """:class:`BatchRenorm2d` for volumes. Shape: ``(N, C, D, H, W)`` in and out."""

    ndim = 3


@contextmanager
def plain_batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, every BatchRenorm of ``network`` normalizes with the statistics of the batch alone: BatchNorm's train mode."""
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchRenorm)]
    limits = [(layer.r_max, layer.d_max) for layer in layers]
    for layer in layers:
        layer.r_max, layer.d_max = 1.0, 0.0
    try:
        yield
    finally:
        for layer, (r_max, d_max) in zip(layers, limits, strict=True):
            layer.r_max, layer.d_max = r_max, d_max
