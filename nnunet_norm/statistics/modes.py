"""Networks in the mode that a measurement needs, and back again under every exit."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_norm.layers import find_norms


@contextmanager
def norms_in_train_mode(network: nn.Module, *, across_processes: bool = True) -> Iterator[None]:
    """Inside, the norms of ``network`` are in train mode and everything else (dropout) stays as it is.

    Afterwards training flags and buffers of the norms are what they were, to the last bit, in the same tensors.

    Args:
        network: The bare network.
        across_processes: Whether norms take statistics of all processes, for which each must run as many batches; if not,
            they act inside as if this process were alone.
    """
    norms = list(find_norms(network).values())
    flags = [norm.training for norm in norms]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for norm in norms:
        norm.train()
    try:
        with nullcontext() if across_processes else _local(norms):
            yield
    finally:
        for norm, flag in zip(norms, flags, strict=True):
            norm.train(flag)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


@contextmanager
def _local(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, no norm waits for another process."""
    with ExitStack() as stack:
        for norm in norms:
            if isinstance(norm, nn.SyncBatchNorm):
                stack.enter_context(patch.object(norm, "forward", MethodType(_BatchNorm.forward, norm)))
            elif hasattr(norm, "sync"):
                stack.enter_context(patch.object(norm, "sync", "none" if isinstance(norm.sync, str) else False))
        yield
