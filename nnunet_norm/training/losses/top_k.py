"""nnU-Net's cross-entropy of the hardest voxels, for maps of any size."""

from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss, TopKLoss
from torch import Tensor


class TopKOrLargest(TopKLoss):
    """Mean cross-entropy of the ``k`` percent of voxels where it is largest, of one voxel at least.

    nnU-Net's loss takes ``int(voxels * k / 100)`` voxels. On the lowest resolutions of deep supervision that is none, and the
    mean of none is NaN. Everything else is nnU-Net's: the share is one of all voxels of the batch, ignored ones (of loss 0)
    included, and of each process by itself.

    References:
        Wu, Shen and van den Hengel 2016, arXiv:1605.06885 (online bootstrapping).
    """

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The loss, 0-dim.

        Args:
            net_output: Logits, ``(N, C, *spatial)``.
            target: Labels, ``(N, 1, *spatial)``, of any type.
        """
        voxels = net_output.numel() // net_output.shape[1]
        if int(voxels * self.k / 100):
            return super().forward(net_output, target)
        return RobustCrossEntropyLoss.forward(self, net_output, target).max()
