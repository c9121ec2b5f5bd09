"""What BatchRenorm computes in one training step: limits, correction, running statistics, and the kernels around them.

Shape suffixes: every statistic is a vector of length C.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunet_norm.layers.moments import across_processes

_HALF = (torch.float16, torch.bfloat16)

SYNC = ("running", "full", "none")
"""What processes of one training share: running statistics, also the statistics that normalize, or nothing."""


class Limits(NamedTuple):
    """How far the correction may go: ``1/r_max <= r <= r_max`` and ``|d| <= d_max``, 0-dim tensors."""

    r_max: Tensor
    d_max: Tensor


class Step(NamedTuple):
    """What a training step normalizes with, all of shape ``(C,)`` but ``number``.

    Attributes:
        mean: Of the batch; of all processes' batches with ``sync="full"``.
        var: Biased variance of the same.
        r: Clipped.
        d: Clipped.
        number: Values per channel behind mean and variance, 0-dim; only with ``sync="full"``.
    """

    mean: Tensor
    var: Tensor
    r: Tensor
    d: Tensor
    number: Tensor | None


def scheduled_limits(steps: Tensor, warmup_steps: int, ramp_steps: int, r_max: float, d_max: float) -> Limits:
    """The limits after ``steps`` finished steps: (1, 0) during the warm-up, then linearly up to ``(r_max, d_max)``.

    The first step after the warm-up already has a ``1 / (ramp_steps + 1)`` share, so ``ramp_steps=0`` is a switch and
    ``warmup_steps=ramp_steps=0`` the full limits from the first step. Tensors throughout: nothing waits for the device.
    """
    progress = ((steps - warmup_steps + 1) / (ramp_steps + 1)).clamp(0, 1)
    return Limits(1 + (r_max - 1) * progress, d_max * progress)


def correction_of(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """R and d before clipping."""
    running_std = torch.sqrt(running_var + eps)
    return torch.sqrt(var + eps) / running_std, (mean - running_mean) / running_std


def clip(r: Tensor, d: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """R and d within the limits."""
    return torch.clamp(r, 1 / limits.r_max, limits.r_max), torch.clamp(d, -limits.d_max, limits.d_max)


def update_if_finite(buffers: tuple[Tensor, Tensor], updated: tuple[Tensor, Tensor], steps: Tensor) -> None:
    """Write the new running statistics and count the step, or leave everything as it was if a value is not finite."""
    finite = torch.isfinite(updated[0]).all() & torch.isfinite(updated[1]).all()
    for buffer, value in zip(buffers, updated, strict=True):
        buffer.copy_(torch.where(finite, value.to(buffer.dtype), buffer))
    steps.add_(finite)


def step(
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
) -> Step:
    """What this batch is normalized with, by the statistics before it; then the running statistics take the batch in.

    The weight of the newest batch is ``max(momentum, 1 / t)`` at step t (torch's cumulative average, then its exponential
    one), so that the zeros and ones which the buffers begin with have no part in them after the first step. With limits
    that never open it is ``momentum``, as in BatchNorm. ``mean``, ``var`` and ``count`` are those of this process's batch;
    the running statistics take in the batches of all processes, unless ``sync`` is "none". Without ``taking_in`` this is one
    of several batches of a step: nothing is taken in yet.
    """
    steps = num_batches_tracked.to(mean.dtype)
    limits = scheduled_limits(steps, warmup_steps, ramp_steps, r_max, d_max)
    # The buffers may be half precision in a network that was cast as a whole; their arithmetic never is.
    old_mean, old_var = running_mean.to(mean.dtype), running_var.to(var.dtype)
    taken_mean, taken_var, total = mean, var, None
    bessel: float | Tensor = count / max(count - 1, 1)
    if sync == "full" or (sync == "running" and taking_in):
        total, taken_mean, taken_var = across_processes(mean, var, count)
        bessel = (total / (total - 1)).to(var.dtype)
    if sync == "full":
        mean, var = taken_mean, taken_var
    r, d = clip(*correction_of(mean, var, old_mean, old_var, eps), limits)
    if taking_in:
        if momentum is not None and r_max == 1 and d_max == 0:
            weight = torch.full_like(steps, momentum)  # BatchNorm's own average
        else:
            weight = (1 / (steps + 1)).clamp(min=momentum or 0.0)
        updated = torch.lerp(old_mean, taken_mean, weight), torch.lerp(old_var, taken_var * bessel, weight)
        update_if_finite((running_mean, running_var), updated, num_batches_tracked)
    return Step(mean, var, r, d, total.to(mean.dtype) if sync == "full" and total is not None else None)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over ``(N, *spatial)``, at least in single precision; zeros for no values."""
    if not x.numel():
        return tuple(x.new_zeros((2, x.size(1)), dtype=torch.promote_types(x.dtype, torch.float32)))
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        # Compiled, this is the reduction that batch_norm itself decomposes into, and the two become one.
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x.float() if x.dtype in _HALF else x, dims, correction=0)
        return mean, var
    # Of half tensors the kernel of the CPU returns statistics in single precision only if the running ones are so; with
    # momentum 0 they stay as they are. That of CUDA always does.
    running: list[Tensor | None] = [None, None]
    if x.dtype in _HALF and x.device.type == "cpu":
        running = [x.new_zeros(x.size(1), dtype=torch.float32) for _ in range(2)]
    mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
    return mean, var


class Renormalize(torch.autograd.Function):
    """``((x - mean) / sqrt(var + eps)) * (weight * r) + (bias + weight * d)`` with the gradient of BatchNorm's train mode.

    The kernels are torch's own: the eval-mode one with the batch's statistics forward, the train-mode one backward. Saved
    for the backward pass: the input and vectors, as BatchNorm does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, of: Step, eps: float) -> Tensor:
        """See the class; the running statistics are not touched."""
        scale, shift = fold(weight, bias, of.r, of.d)
        ctx.eps = eps
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        ctx.save_for_backward(x, scale, of.mean, torch.rsqrt(of.var + eps), of.r, of.d)
        return torch.native_batch_norm(x, scale, shift, of.mean, of.var, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, weight and bias; none flows through r and d."""
        x, scale, mean, invstd, r, d = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # grad_weight = grad_scale * r + grad_shift * d: both are needed for it.
        mask = [needs_x, needs_weight, needs_weight or needs_bias]
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, invstd, True, ctx.eps, mask
        )
        grad_weight = (grad_scale * r + grad_shift * d).to(ctx.dtypes[0]) if needs_weight else None
        grad_bias = grad_shift.to(ctx.dtypes[1]) if needs_bias else None
        return grad_x if needs_x else None, grad_weight, grad_bias, None, None


def fold(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Affine parameters that apply r and d too: ``(weight * r, bias + weight * d)``."""
    if weight is None:
        return r, d
    return weight * r, weight * d if bias is None else bias + weight * d
