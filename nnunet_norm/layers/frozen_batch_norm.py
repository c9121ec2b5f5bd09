"""BatchNorm whose train mode is its eval mode."""

import torch.nn.functional as F
from torch import Tensor

from nnunet_norm.layers.running import RunningNorm


class FrozenBatchNorm(RunningNorm):
    """Normalization with running statistics that stay as they are, in train mode as in eval mode.

    ``weight`` and ``bias`` go on learning. Parameters, buffers and state dict are BatchNorm's, so that a network may be
    frozen in the middle of a training: ``convert_norm(network, "frozen_batch_norm")`` keeps the very same tensors.

    Shape: ``(N, C, *spatial)`` in and out, with any number of spatial axes.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        affine: Whether ``weight`` and ``bias`` are learned, one each per channel.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, section 4.3.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps, affine=affine, track_running_stats=True)
        self.frozen: bool = True  # but for measurements, see plain_batch_statistics

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, *spatial)``."""
        if not self.frozen and self.training:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return self._with_running_statistics(x)
