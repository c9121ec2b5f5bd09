"""Networks whose norms take the statistics of the batch alone, for measurements."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from nnunet_norm.layers.batch_renorm import BatchRenorm2d, BatchRenorm3d
from nnunet_norm.layers.frozen_batch_norm import FrozenBatchNorm


def differs_from_batch_norm(network: nn.Module) -> bool:
    """Whether train mode normalizes with more than the statistics of the batch: BatchRenorm and frozen BatchNorm."""
    return any(isinstance(m, (BatchRenorm2d, BatchRenorm3d, FrozenBatchNorm)) for m in network.modules())


@contextmanager
def plain_batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, BatchRenorm and frozen BatchNorm normalize as BatchNorm in train mode: by the statistics of the batch alone."""
    renorms = [layer for layer in network.modules() if isinstance(layer, (BatchRenorm2d, BatchRenorm3d))]
    frozen = [layer for layer in network.modules() if isinstance(layer, FrozenBatchNorm)]
    limits = [(layer.r_max, layer.d_max) for layer in renorms]
    for layer in renorms:
        layer.r_max, layer.d_max = 1.0, 0.0
    for norm in frozen:
        norm.frozen = False
    try:
        yield
    finally:
        for layer, (r_max, d_max) in zip(renorms, limits, strict=True):
            layer.r_max, layer.d_max = r_max, d_max
        for norm in frozen:
            norm.frozen = True
