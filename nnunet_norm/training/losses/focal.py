"""The focal loss in the place of nnU-Net's cross-entropy."""

import torch
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GAMMA = 2.0
"""Exponent with which voxels that are predicted well count less; what Lin et al. found best (section 5.1)."""


class SoftmaxFocalLoss(nn.Module):
    """Mean over voxels of ``-(1 - p)^gamma log p``, where ``p`` is the softmax probability of the voxel's label.

    MONAI's loss before reduction, summed over classes (all but the label's are zero) and averaged as nnU-Net averages its
    cross-entropy, which it is for gamma 0: MONAI's own mean would be smaller by the number of classes. Voxels of the ignore
    label do not count; 0 if there are no others. Computed in float32, sample by sample, and again for the gradient: MONAI
    keeps five times the logits, which for the logits of many micro-batches would be more than the network takes.

    Args:
        ignore_label: nnU-Net's, or None.
        gamma: Exponent.

    References:
        Lin et al. 2017, arXiv:1708.02002, equation 4.
    """

    def __init__(self, ignore_label: int | None = None, gamma: float = GAMMA) -> None:
        super().__init__()
        self.ignore_label = ignore_label
        self.focal = FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True, reduction="none")

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The loss, 0-dim.

        Args:
            net_output: Logits, ``(N, C, *spatial)``.
            target: Labels, ``(N, *spatial)``, of any type.
        """
        parts = [
            checkpoint(self._sum, logits, labels, use_reentrant=False, preserve_rng_state=False)
            for logits, labels in zip(net_output.split(1), target.split(1), strict=True)
        ]
        known = target.numel() if self.ignore_label is None else (target != self.ignore_label).sum().clamp(min=1)
        return torch.stack(parts).sum() / known

    def _sum(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.ignore_label is None:
            return self.focal(logits, target[:, None]).sum()
        known = (target != self.ignore_label)[:, None]
        return (self.focal(logits, torch.where(known, target[:, None], 0)) * known).sum()


class RegionFocalLoss(FocalLoss):
    """The same for regions, of which a voxel can be in several: ``p`` is the sigmoid's, of each region by itself.

    It takes the arguments and has the reduction of ``nn.BCEWithLogitsLoss``, which it is for gamma 0.

    Args:
        reduction: ``"mean"`` over voxels and regions, or ``"none"``, where nnU-Net averages over the voxels that are not
            ignored (and then sums over regions).
        gamma: Exponent.
    """

    def __init__(self, reduction: str, gamma: float = GAMMA) -> None:
        super().__init__(gamma=gamma, reduction=reduction)
