"""Normalization with the statistics of all processes' batches, and the gradient of one process that has them all."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Operators that the compiler does not look into: the collective of the backward pass stays one call, at one place.


@torch.library.custom_op("nnunet_norm::normalize_synchronized", mutates_args=())
def normalize(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * scale + shift``, where ``mean`` and ``var`` are those of all processes' batches.

    The gradient flows through ``mean`` and ``var`` to the inputs of all processes, which takes one collective in the backward
    pass; those of ``scale`` and ``shift`` are this process's part, to be added up as DistributedDataParallel does.

    Args:
        x: This process's part of the batch, ``(N, C, *spatial)``; may be empty.
        scale: Per channel.
        shift: Per channel.
        mean: Per channel, over all processes.
        var: Biased variance, the same.
        count: Values per channel over all processes, 0-dim.
        eps: Added to the variance.
    """
    del count
    if not x.numel():
        return torch.empty_like(x)
    return _laid_out_as(x, torch.native_batch_norm(x, scale, shift, mean, var, False, 0.0, eps)[0])


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with the strides of ``x``, which is what the compiler was told."""
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


@normalize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("nnunet_norm::normalize_synchronized_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    invstd = torch.rsqrt(var + eps)
    if x.numel():
        # Eval mode: the statistics are constants. What they contribute follows below.
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_batch_norm_backward(
            _laid_out_as(x, grad), x, scale, mean, var, None, None, False, eps, [True, True, True]
        )
    else:
        grad_x, grad_scale, grad_shift = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
    sums = torch.stack([grad_shift, grad_scale])
    dist.all_reduce(sums)
    of_shift, of_scale = scale * invstd * sums / count
    shape = (1, -1, *[1] * (x.dim() - 2))
    slope = of_scale * invstd
    through_statistics = x * slope.view(shape)
    through_statistics += (of_shift - slope * mean).view(shape)
    return _laid_out_as(x, grad_x.sub_(through_statistics)), grad_scale, grad_shift


@_gradients.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, scale, _, mean, var, count, ctx.eps = inputs
    ctx.save_for_backward(x, scale, mean, var, count)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None)


normalize.register_autograd(_backward, setup_context=_setup)
