"""Norms that can hold back what they saw until a training step is over."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from nnunet_norm.layers.moments import Moments, merge
from nnunet_norm.layers.renormalization import update_if_finite


class SteppingNorm(_NormBase):
    """A norm with running statistics whose forwards of one optimizer step can count as one batch.

    Outside :func:`nnunet_norm.layers.stepping.one_step` every forward in train mode is a step of its own, and takes its batch
    in. Inside, forwards leave the running statistics as they are and only collect moments, which are taken in at its end;
    forwards inside :func:`nnunet_norm.layers.stepping.repeated` do not even that.

    Attributes:
        collected: What the forwards of the present step saw, ``(2 C + 1,)``: means, variances, count. No buffer: a step is
            over before anything is saved. None outside of steps.
        repeating: Whether the forward is a repetition of one that has collected.
    """

    collected: Tensor | None
    repeating: bool

    averages_samples: ClassVar[bool] = False
    """Whether the variance is the mean of the samples' (unbiased) ones, without the variance between their means."""

    counts_steps: ClassVar[bool] = True
    """Whether ``num_batches_tracked`` counts, as in BatchNorm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In the module's own dictionary from the beginning: the compiler notices what appears there later.
        self.collected = None
        self.repeating = False

    @property
    def synchronizes(self) -> bool:
        """Whether the running statistics take in the batches of all processes."""
        return getattr(self, "sync", "none") not in ("none", False)

    def newest_weight(self, steps: Tensor) -> Tensor | float:
        """Share of the batch of the next step in the running statistics, after so many finished ones (0-dim)."""
        return 1 / (steps + 1) if self.momentum is None else self.momentum

    def new_collection(self) -> Tensor:
        """Room for what a step collects, with nothing in it."""
        assert self.running_mean is not None
        # MPS has no float64; elsewhere counts beyond 2^24 and large means need it.
        dtype = torch.float32 if self.running_mean.device.type == "mps" else torch.float64
        return self.running_mean.new_zeros(2 * self.num_features + 1, dtype=dtype)

    @torch.no_grad()
    def take_in(self, batch: Moments) -> None:
        """End a step: one batch with these moments, of all processes if they share them.

        Nothing happens if it is empty, or if it makes a running statistic non-finite.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        var = batch.var if self.averages_samples else batch.var * (batch.number / (batch.number - 1))
        weight = self.newest_weight(self.num_batches_tracked.to(var.dtype))
        updated = (
            torch.lerp(self.running_mean.to(var.dtype), batch.mean, weight),
            torch.lerp(self.running_var.to(var.dtype), var, weight),
        )
        steps = self.num_batches_tracked if self.counts_steps else self.num_batches_tracked.clone()
        update_if_finite((self.running_mean, self.running_var), updated, steps)


def merge_rows(rows: Tensor, *, averages_samples: bool) -> Moments:
    """The moments of a union; not finite if all sets are empty.

    Args:
        rows: One set each, ``(R, 2 C + 1)``: means, variances, count, as :attr:`SteppingNorm.collected` has them.
        averages_samples: See :class:`SteppingNorm`.
    """
    means, variances, counts = rows[:, : rows.size(1) // 2], rows[:, rows.size(1) // 2 : -1], rows[:, -1]
    if not averages_samples:
        return merge(counts, means, variances)
    shares = (counts / counts.sum())[:, None]
    return Moments(counts.sum(), (shares * means).sum(0), (shares * variances).sum(0))


def collect(norm: SteppingNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Add one more set of values to what a norm has collected in the present step, unless it is a repetition.

    Args:
        norm: In a step.
        mean: Of the set, ``(C,)``, without gradient.
        var: Its biased variance, or where the norm averages samples the mean of their unbiased ones, ``(C,)``.
        count: Values per channel, or samples; 0 changes nothing.
    """
    if norm.repeating:
        return
    assert norm.collected is not None
    add = _compiled_add if torch.compiler.is_compiling() else _add
    add(norm.collected, mean, var, count, norm.averages_samples)


def _add(collected: Tensor, mean: Tensor, var: Tensor, count: int, averages_samples: bool) -> None:
    if not count:
        return
    own = torch.cat([mean, var, mean.new_full((1,), count, dtype=collected.dtype)])
    merged = merge_rows(torch.stack([collected, own]), averages_samples=averages_samples)
    collected.copy_(torch.cat([merged.mean, merged.var, merged.number[None]]))


# Opaque to the compiler, so that it is run where it stands, once.
@torch.library.custom_op("nnunet_norm::collect", mutates_args=("collected",))
def _compiled_add(collected: Tensor, mean: Tensor, var: Tensor, count: int, averages_samples: bool) -> None:
    _add(collected, mean, var, count, averages_samples)


@_compiled_add.register_fake
def _(collected: Tensor, mean: Tensor, var: Tensor, count: int, averages_samples: bool) -> None:
    return None
