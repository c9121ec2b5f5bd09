"""Mean and variance per channel, gathered block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_norm.layers.batch_renorm import batch_statistics

IN_SINGLE_PRECISION = 256
"""Numbers that a CPU adds up in single precision at most; its kernel does so one after another, channels being last."""


class ChannelMoments:
    """Count, mean and sum of squared deviations per channel, merged in float64.

    Merging by differences of means (Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115) does not lose digits
    where the mean is large against the deviation, as a sum of squares would.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take in values (N, C, *spatial)."""
        channels = values.shape[1]
        parts = _in_groups(values) if values.device.type == "cpu" else [values]
        counts, means, variances = [], [], []
        for part in parts:
            exact_on = "cpu" if part.device.type == "mps" else part.device  # MPS has no float64
            mean, var = (t.to(exact_on).double().view(-1, channels) for t in batch_statistics(part))
            counts.append(
                torch.full((len(mean), 1), part.numel() / mean.numel(), dtype=torch.float64, device=mean.device)
            )
            means.append(mean)
            variances.append(var)
        weights, each = torch.cat(counts), torch.cat(means)
        count = values.numel() // channels
        mean = (weights * each).sum(0) / count
        self._merge(count, mean, (weights * (torch.cat(variances) + (each - mean).square())).sum(0))

    def mean_and_var(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel, float64."""
        assert self._mean is not None
        assert self._squares is not None
        return self._mean, self._squares / self.count

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total = self.count + count
        difference = mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._squares = self._squares + squares + difference.square() * (self.count * count / total)
        self.count = total


def _in_groups(values: Tensor) -> list[Tensor]:
    """Values (N, C, *spatial) as (rows, groups * C) and a rest (rows, C), of few rows each."""
    rows = values.movedim(1, -1).reshape(-1, values.shape[1])
    groups = len(rows) // IN_SINGLE_PRECISION
    whole = rows[: groups * IN_SINGLE_PRECISION].reshape(IN_SINGLE_PRECISION, -1)
    return [part for part in (whole, rows[groups * IN_SINGLE_PRECISION :]) if part.numel()]
