"""Mean and variance per channel, gathered block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_norm.layers.moments import Moments, merge
from nnunet_norm.layers.renormalization import batch_statistics

IN_SINGLE_PRECISION = 256
"""Numbers that a CPU adds up in single precision at most; its kernel does so one after another, channels being last."""


class ChannelMoments:
    """Count, mean and biased variance per channel of everything that was added, merged in float64."""

    def __init__(self) -> None:
        self.moments: Moments | None = None

    def add(self, values: Tensor) -> None:
        """Take in values (N, C, *spatial)."""
        channels = values.shape[1]
        parts = _in_groups(values) if values.device.type == "cpu" else [values]
        counts, means, variances = [], [], []
        for part in parts:
            exact_on = "cpu" if part.device.type == "mps" else part.device  # MPS has no float64
            mean, var = (t.to(exact_on).double().view(-1, channels) for t in batch_statistics(part))
            counts.append(mean.new_full((len(mean),), part.numel() / mean.numel()))
            means.append(mean)
            variances.append(var)
        new = merge(torch.cat(counts), torch.cat(means), torch.cat(variances))
        # Those that another process noted lie on the CPU.
        both = [new] if self.moments is None else [Moments(*(t.to(new.mean.device) for t in self.moments)), new]
        self.moments = merge(*(torch.stack(field) for field in zip(*both, strict=True)))

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel, float64."""
        assert self.moments is not None
        return self.moments.mean, self.moments.var


def _in_groups(values: Tensor) -> list[Tensor]:
    """Values (N, C, *spatial) as (rows, groups * C) and a rest (rows, C), of few rows each."""
    rows = values.movedim(1, -1).reshape(-1, values.shape[1])
    groups = len(rows) // IN_SINGLE_PRECISION
    whole = rows[: groups * IN_SINGLE_PRECISION].reshape(IN_SINGLE_PRECISION, -1)
    return [part for part in (whole, rows[groups * IN_SINGLE_PRECISION :]) if part.numel()]
