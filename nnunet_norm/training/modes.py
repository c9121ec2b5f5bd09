"""Networks in the mode that a measurement needs, and back again under every exit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nnunet_norm.layers import find_norms


@contextmanager
def norms_in_train_mode(network: nn.Module) -> Iterator[None]:
    """Inside, the norms of ``network`` are in train mode and everything else (dropout) stays as it is.

    Afterwards training flags and buffers of the norms are what they were, to the last bit, in the same tensors.
    """
    norms = list(find_norms(network).values())
    flags = [norm.training for norm in norms]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm, flag in zip(norms, flags, strict=True):
            norm.train(flag)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
