"""Count, mean and variance of several sets of values merged into those of their union, here and across processes.

Merging by differences of means does not lose digits where the mean is large against the deviation, as a sum of squares would.

References:
    Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Moments(NamedTuple):
    """Statistics per channel of a set of values.

    Attributes:
        number: Values per channel, 0-dim; 0 for an empty set.
        mean: Of shape ``(C,)``.
        var: Biased variance, of shape ``(C,)``.
    """

    number: Tensor
    mean: Tensor
    var: Tensor


def merge(counts: Tensor, means: Tensor, variances: Tensor) -> Moments:
    """The moments of a union.

    Args:
        counts: Values per channel of each set, ``(R,)``; a set of 0 values counts for nothing, its mean and variance must
            be finite all the same.
        means: Of shape ``(R, C)``.
        variances: Biased, ``(R, C)``.
    """
    total = counts.sum()
    shares = (counts / total)[:, None]
    mean = (shares * means).sum(0)
    return Moments(total, mean, (shares * (variances + (means - mean).square())).sum(0))


def num_processes() -> int:
    """Processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def across_processes(mean: Tensor, var: Tensor, count: int) -> Moments:
    """The moments of the values of all processes: exact, and the same to the last bit on each of them.

    One collective, in which every process must take part, also one that has no values.

    Args:
        mean: This process's mean, ``(C,)``; anything finite where ``count`` is 0.
        var: Its biased variance, ``(C,)``.
        count: Its values per channel.
    """
    # In float64, since float32 counts to 2^24; filled, not copied from a list, so that nothing waits for the device.
    own = torch.cat([mean, var, mean.new_full((1,), count, dtype=torch.float64)])
    every = own.new_empty(num_processes() * len(own))
    dist.all_gather_into_tensor(every, own)
    rows = every.view(-1, len(own))
    merged = merge(rows[:, -1], rows[:, : len(mean)], rows[:, len(mean) : -1])
    return Moments(merged.number, merged.mean.to(mean.dtype), merged.var.to(var.dtype))
