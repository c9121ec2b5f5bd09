"""Dice per class, from masks or from network outputs."""

from typing import Any

import torch
from torch import Tensor


def class_masks(logits: Any, *, regions: bool = False) -> Tensor:
    """What a network output says, as one boolean mask per foreground class or region.

    Args:
        logits: ``(N, C, *spatial)``. With labels, class 0 is background; the classes exclude each other (argmax). With
            regions every channel is one (sigmoid above 0.5, that is logit above 0).
        regions: Whether the channels are regions.

    Returns:
        ``(N, C - 1, *spatial)`` for labels, ``(N, C, *spatial)`` for regions.
    """
    logits = torch.as_tensor(logits)
    if regions:
        return logits > 0
    labels = logits.argmax(1, keepdim=True)
    classes = torch.arange(1, logits.size(1), device=logits.device).view(1, -1, *[1] * (logits.dim() - 2))
    return labels == classes


def dice_counts(a: Any, b: Any) -> Tensor:
    """Numerator and denominator of Dice per class, ``(2, K)`` in float64 on the CPU: counts of batches can be added.

    Args:
        a: Masks ``(N, K, *spatial)``.
        b: Masks of the same shape.
    """
    a, b = torch.as_tensor(a, dtype=torch.bool), torch.as_tensor(b, dtype=torch.bool)
    axes = [axis for axis in range(a.dim()) if axis != 1]
    return torch.stack([2 * (a & b).sum(axes), a.sum(axes) + b.sum(axes)]).cpu().double()  # some devices lack float64


def dice(a: Any, b: Any) -> Tensor:
    """``2 |a and b| / (|a| + |b|)`` per class, over all samples together; NaN for a class that is in neither.

    Args:
        a: Masks ``(N, K, *spatial)``.
        b: Masks of the same shape.

    Returns:
        ``(K,)`` in float64.
    """
    twice_intersection, total = dice_counts(a, b)
    return twice_intersection / total
