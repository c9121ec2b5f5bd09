"""What norms of this package with running statistics have in common."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from nnunet_norm.errors import LayerError


class RunningNorm(_NormBase):
    """A norm per channel whose eval mode is BatchNorm's, and whose state dict is, too, key for key.

    Not a subclass of torch's ``_BatchNorm``: under DDP nnU-Net turns every one of those into a SyncBatchNorm.
    """

    ndim: int

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's own name
        if input.dim() != self.ndim + 2:
            raise LayerError(f"expected {self.ndim + 2}D input (N, C, *spatial), got {input.dim()}D input")

    def _with_running_statistics(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
