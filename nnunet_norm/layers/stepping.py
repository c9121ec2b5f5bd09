"""Optimizer steps that run a network more than once: its running statistics advance once, with the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers.batch_norm import BatchNorm2d, BatchNorm3d
from nnunet_norm.layers.collecting import SteppingNorm, merge_rows
from nnunet_norm.layers.convert import convert_norm, find_norms, tracking_norms, tracks_statistics
from nnunet_norm.layers.frozen_batch_norm import FrozenBatchNorm
from nnunet_norm.layers.moments import num_processes

_BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d)


@contextmanager
def one_step(network: nn.Module) -> Iterator[None]:
    """Inside, all forwards of ``network`` in train mode count as one batch.

    Meanwhile running statistics, and what depends on them (BatchRenorm's r and d) or on the number of steps (its limits),
    stay as they were. On a regular exit every norm takes in what its forwards saw, once: count, mean and sum of squared
    deviations of all of them are merged exactly, so that the running statistics are those of one forward with all these
    inputs, and the number of steps grows by one. Under ``torch.distributed`` that is one collective call for the whole
    network: every process must leave the step regularly, but may have run any number of forwards. Norms that do not
    synchronize take in what this process saw. A norm that saw nothing is left alone. After an exception nothing is taken in.

    Norms of torch do not take part: they take in every forward by itself (see :func:`fit_for_steps`).

    Args:
        network: Any module; each tensor of running statistics counts once, whatever the number of norms that share it.

    References:
        Chan, Golub and LeVeque 1983, doi 10.1080/00031305.1983.10483115 (merging of moments).

    Example:
        >>> norm = BatchNorm2d(1, momentum=1.0)
        >>> with one_step(norm):
        ...     _ = norm(torch.full((1, 1, 2, 2), 1.0)), norm(torch.full((3, 1, 2, 2), 5.0))
        >>> norm.running_mean.item(), norm.running_var.item(), norm.num_batches_tracked.item()
        (4.0, 3.200000047683716, 1)
    """
    norms = _stepping_norms(network)
    assert all(norm.collected is None for norm in norms), "a step inside a step"
    once = {id(norm.running_mean): norm for norm in reversed(norms)}
    for norm in once.values():
        norm.collected = norm.new_collection()
    for norm in norms:
        norm.collected = once[id(norm.running_mean)].collected
    try:
        yield
        _take_in([norm for norm in norms if once[id(norm.running_mean)] is norm])
    finally:
        for norm in norms:
            norm.collected = None


@contextmanager
def repeated(network: nn.Module) -> Iterator[None]:
    """Inside, forwards of ``network`` are repetitions of earlier ones of the same step, and count for nothing.

    Raises:
        LayerError: A norm in train mode cannot tell a repetition: it is one of torch's, or there is no step.
    """
    require_steps(network)
    norms = _stepping_norms(network)
    flags = [norm.repeating for norm in norms]
    for norm in norms:
        norm.repeating = True
    try:
        yield
    finally:
        for norm, flag in zip(norms, flags, strict=True):
            norm.repeating = flag


def require_steps(network: nn.Module) -> None:
    """Refuse a network whose forwards cannot be run more than once for a step.

    Raises:
        LayerError: A norm in train mode updates its running statistics in every forward.
    """
    for name, norm in find_norms(network).items():
        if not norm.training or not tracks_statistics(norm) or isinstance(norm, FrozenBatchNorm):
            continue
        if not isinstance(norm, SteppingNorm):
            raise LayerError(
                f"norm {name!r} ({type(norm).__module__.partition('.')[0]}'s {type(norm).__name__}) updates its running "
                "statistics in every forward, also in one that is run again: call fit_for_steps(network) first"
            )
        if norm.collected is None:
            raise LayerError(
                f"norm {name!r} ({type(norm).__name__}) is run again for the same step: run the step inside "
                "one_step(network)"
            )


def fit_for_steps(network: nn.Module) -> nn.Module:
    """Exchange torch's norms with running statistics, in place, for those of this package that can take part in steps.

    BatchNorm and SyncBatchNorm become :class:`nnunet_norm.layers.BatchNorm3d`, which synchronizes as SyncBatchNorm does
    wherever there are several processes; InstanceNorm with running statistics becomes a tracked one. Parameters, buffers,
    momentum and the keys of the state dict stay; see :func:`convert_norm`.

    Returns:
        ``network``, or the new norm if it was one.

    Raises:
        LayerError: The number of spatial axes of a norm is neither 2 nor 3, or cannot be told.
    """
    momenta = {id(norm.running_mean): norm.momentum for norm in tracking_norms(network)}
    network = convert_norm(network, {2: BatchNorm2d, 3: BatchNorm3d}, only=lambda norm: _is_one_of(norm, _BATCH_NORMS))
    network = convert_norm(network, "instance_norm_tracked", only=lambda norm: _is_one_of(norm, _INSTANCE_NORMS))
    for norm in _stepping_norms(network):
        norm.momentum = momenta[id(norm.running_mean)]
    return network


def _is_one_of(norm: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    return type(norm) in kinds and tracks_statistics(norm) and getattr(norm, "process_group", None) is None


def _stepping_norms(network: nn.Module) -> list[SteppingNorm]:
    return [norm for norm in network.modules() if isinstance(norm, SteppingNorm) and tracks_statistics(norm)]


@torch.no_grad()
def _take_in(norms: Sequence[SteppingNorm]) -> None:
    """End the step of norms that share no tensor."""
    collected = [norm.collected for norm in norms]
    assert all(own is not None for own in collected)
    rows: list[Tensor] = [own[None] for own in collected if own is not None]
    together = [i for i, norm in enumerate(norms) if norm.synchronizes] if num_processes() > 1 else []
    if together:
        own = torch.cat([rows[i][0] for i in together])
        every = own.new_empty(num_processes() * len(own))
        dist.all_gather_into_tensor(every, own)
        parts = every.view(-1, len(own)).split([rows[i].size(1) for i in together], dim=1)
        for i, part in zip(together, parts, strict=True):
            rows[i] = part
    for norm, of_all in zip(norms, rows, strict=True):
        norm.take_in(merge_rows(of_all, averages_samples=norm.averages_samples))
