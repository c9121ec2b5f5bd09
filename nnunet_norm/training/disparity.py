"""Train/eval disparity of a network on batches, with what says whether BatchRenorm's running statistics are any good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_norm.layers import BatchRenorm2d, BatchRenorm3d, differs_from_batch_norm, plain_batch_statistics
from nnunet_norm.metrics import class_masks, dice_counts
from nnunet_norm.receptive_field.trace import first_output
from nnunet_norm.statistics.modes import norms_in_train_mode

SHARE_OF_EPOCH = 0.05
"""What the measurement may cost by default, as a share of an epoch's time."""

_FORWARDS_PER_TRAINING_STEP = 3
_FORWARDS_PER_MEASUREMENT = 4
_MOST_BATCHES = 5


def default_disparity_batches(num_iterations: int, num_val_iterations: int) -> int:
    """How many validation batches keep the measurement within :data:`SHARE_OF_EPOCH`; at least 1, at most 5.

    A training step costs about three forward passes, a measurement three and the statistics of BatchRenorm's inputs. Epochs
    of fewer than about 30 steps pay more than that share for their one batch.
    """
    forwards = _FORWARDS_PER_TRAINING_STEP * num_iterations + num_val_iterations
    return min(max(int(SHARE_OF_EPOCH * forwards / _FORWARDS_PER_MEASUREMENT), 1), _MOST_BATCHES)


@dataclass
class DisparityCounts:
    """Sums over batches, ready to be added up over batches and processes.

    Attributes:
        train: Dice counts ``(2, K)`` of train against eval mode.
        batch: The same for plain batch statistics (BatchNorm's train mode) against eval mode; only with BatchRenorm and
            frozen BatchNorm.
        renorm: Sums over BatchRenorm's channels of: clipped, ``|log r|``, ``|d|``, 1; only with BatchRenorm.
        num_batches: Batches measured.
        num_samples: Samples in them.
    """

    train: Tensor | None = None
    batch: Tensor | None = None
    renorm: Tensor | None = None
    num_batches: int = 0
    num_samples: int = 0

    def __add__(self, other: DisparityCounts) -> DisparityCounts:
        return DisparityCounts(
            _sum(self.train, other.train),
            _sum(self.batch, other.batch),
            _sum(self.renorm, other.renorm),
            self.num_batches + other.num_batches,
            self.num_samples + other.num_samples,
        )


@dataclass(frozen=True)
class Disparity:
    """What was measured, per foreground class or region; NaN for a class that neither mode predicts.

    Attributes:
        per_class: ``1 - Dice`` of train against eval mode.
        batch_statistics: The same for plain batch statistics against eval mode; only with BatchRenorm and frozen BatchNorm.
        clipped: Share of BatchRenorm's channels whose r or d is clipped; NaN without BatchRenorm.
        abs_log_r: Mean of ``|log r|`` before clipping; NaN without BatchRenorm.
        abs_d: Mean of ``|d|`` before clipping; NaN without BatchRenorm.
        num_batches: Batches measured.
        num_samples: Samples in them.
    """

    per_class: list[float]
    batch_statistics: list[float] = field(default_factory=list)
    clipped: float = float("nan")
    abs_log_r: float = float("nan")
    abs_d: float = float("nan")
    num_batches: int = 0
    num_samples: int = 0

    @classmethod
    def of(cls, counts: DisparityCounts) -> Disparity:
        """Turn sums into shares and means."""
        per_class, batch_statistics = _one_minus_dice(counts.train), _one_minus_dice(counts.batch)
        measured = {"num_batches": counts.num_batches, "num_samples": counts.num_samples}
        if counts.renorm is None:
            return cls(per_class, batch_statistics, **measured)
        clipped, abs_log_r, abs_d = (counts.renorm[:3] / counts.renorm[3]).tolist()
        return cls(per_class, batch_statistics, clipped, abs_log_r, abs_d, **measured)

    @property
    def mean(self) -> float:
        """Mean over the classes that are there."""
        return nanmean(self.per_class)

    @property
    def batch_statistics_mean(self) -> float:
        """Mean over the classes that are there, for plain batch statistics."""
        return nanmean(self.batch_statistics)


def nanmean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    return torch.tensor(values, dtype=torch.double).nanmean().item()


def measure_disparity(
    network: nn.Module,
    data: Tensor,
    *,
    regions: bool,
    autocast: AbstractContextManager[Any] | None = None,
    across_processes: bool = True,
) -> DisparityCounts:
    """Run one batch through ``network`` with its norms in eval and in train mode.

    The network is expected in eval mode and left as it was: running statistics to the last bit, dropout never switched on.

    Args:
        network: The bare network, neither compiled nor wrapped for DDP.
        data: ``(N, C, *spatial)`` on the network's device.
        regions: Whether the channels are regions instead of labels.
        autocast: Context for the forward passes, entered once.
        across_processes: See :func:`norms_in_train_mode`.
    """
    renorms = [layer for layer in network.modules() if isinstance(layer, (BatchRenorm2d, BatchRenorm3d))]
    with torch.no_grad(), autocast or nullcontext():
        evaluated = class_masks(first_output(network(data)), regions=regions)
        with norms_in_train_mode(network, across_processes=across_processes), _observed(renorms) as sums:
            train = dice_counts(class_masks(first_output(network(data)), regions=regions), evaluated).cpu()
        batch = None
        if differs_from_batch_norm(network):
            with norms_in_train_mode(network, across_processes=across_processes), plain_batch_statistics(network):
                batch = dice_counts(class_masks(first_output(network(data)), regions=regions), evaluated).cpu()
    return DisparityCounts(train, batch, torch.stack(sums).sum(0).cpu() if renorms else None, 1, len(data))


@contextmanager
def _observed(renorms: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects, from every BatchRenorm that runs inside, the sums described in :class:`DisparityCounts`."""
    sums: list[Tensor] = []

    def observe(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        r, d, clipped = layer.correction(inputs[0])
        sums.append(torch.stack([clipped.sum(), r.log().abs().sum(), d.abs().sum(), clipped.new_ones(()) * r.numel()]))

    with ExitStack() as stack:
        for layer in renorms:
            stack.callback(layer.register_forward_pre_hook(observe).remove)
        yield sums


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _one_minus_dice(counts: Tensor | None) -> list[float]:
    return [] if counts is None else (1 - counts[0] / counts[1]).tolist()
