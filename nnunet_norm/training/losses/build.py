"""The losses that a trainer's name can say, each with nnU-Net's Dice and nnU-Net's signature.

All are called as ``loss(net_output, target)`` for one resolution of deep supervision, with logits ``(N, C, *spatial)`` and
nnU-Net's target: labels ``(N, 1, *spatial)``, or regions ``(N, C, *spatial)`` and with an ignore label a last channel
that is true where it is. Their Dice is in the attribute ``dc``, which nnU-Net compiles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.training.losses.perimeter import DicePerimeterLoss
from nnunet_norm.training.losses.top_k import TopKOrLargest

SMOOTH = 1e-5
"""Added to numerator and denominator of Dice, as by nnU-Net's own trainer."""


def dice_loss(label_manager: LabelManager, batch_dice: bool, is_ddp: bool) -> MemoryEfficientSoftDiceLoss:
    """The Dice of nnU-Net's own trainer: of the foreground classes, or of all regions."""
    regions = label_manager.has_regions
    return MemoryEfficientSoftDiceLoss(
        apply_nonlin=torch.sigmoid if regions else softmax_helper_dim1,
        **_dice_options(label_manager, batch_dice, is_ddp),
    )


def _dice_options(label_manager: LabelManager, batch_dice: bool, is_ddp: bool) -> dict[str, Any]:
    return {"batch_dice": batch_dice, "do_bg": label_manager.has_regions, "smooth": SMOOTH, "ddp": is_ddp}


def _dice_focal(label_manager: LabelManager, batch_dice: bool, is_ddp: bool) -> nn.Module:
    # MONAI takes seconds to import: only for those who train with it.
    from nnunet_norm.training.losses.focal import RegionFocalLoss, SoftmaxFocalLoss

    dice = _dice_options(label_manager, batch_dice, is_ddp)
    loss: nn.Module
    if label_manager.has_regions:
        ignore = label_manager.has_ignore_label
        loss = DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
        loss.ce = RegionFocalLoss(reduction="none" if ignore else "mean")
    else:
        ignored = label_manager.ignore_label
        loss = DC_and_CE_loss(dice, {}, ignore_label=ignored, dice_class=MemoryEfficientSoftDiceLoss)
        loss.ce = SoftmaxFocalLoss(ignored)
    return loss


def _dice_top_k(label_manager: LabelManager, batch_dice: bool, is_ddp: bool) -> nn.Module:
    ignored = label_manager.ignore_label
    options = {} if ignored is None else {"ignore_index": ignored}
    with warnings.catch_warnings():
        # nnU-Net's TopKLoss asks torch for no reduction in the old way.
        warnings.filterwarnings("ignore", "size_average and reduce args will be deprecated", UserWarning)
        loss: nn.Module = DC_and_topk_loss({}, {}, ignore_label=ignored)
        loss.ce = TopKOrLargest(**options)
    loss.dc = dice_loss(label_manager, batch_dice, is_ddp)
    return loss


def _dice_perimeter(label_manager: LabelManager, batch_dice: bool, is_ddp: bool) -> nn.Module:
    return DicePerimeterLoss(
        dice_loss(label_manager, batch_dice, is_ddp),
        regions=label_manager.has_regions,
        ignore_label=label_manager.ignore_label,
    )


LOSSES: dict[str, Callable[[LabelManager, bool, bool], nn.Module]] = {
    "DiceFocal": _dice_focal,
    "DiceTopK": _dice_top_k,
    "DicePerim": _dice_perimeter,
}
"""What ``_<Loss>`` in a trainer's name can be. The names stand in results folders and checkpoints and never change."""


def refuse_loss(name: str, label_manager: LabelManager, trainer_name: str) -> None:
    """Refuse a loss that is not defined for the labels of the dataset.

    Args:
        name: One of :data:`LOSSES`.
        label_manager: nnU-Net's, of the dataset.
        trainer_name: For the message.

    Raises:
        PlansError: If the dataset has regions and the loss needs labels of which each voxel has one.
    """
    if name == "DiceTopK" and label_manager.has_regions:
        raise PlansError(
            f"-tr {trainer_name}: {name} needs one label per voxel, and the dataset has regions; choose "
            "_DiceFocal, _DicePerim or no loss (nnU-Net's own)"
        )


def build_loss(name: str, *, label_manager: LabelManager, batch_dice: bool, is_ddp: bool) -> nn.Module:
    """A compound loss for one resolution, to stand where nnU-Net's own does.

    ============= ========================================================================================================
    ``DiceFocal`` Dice + focal loss (MONAI's), gamma 2; softmax, or sigmoid with regions. With gamma 0 it is nnU-Net's loss.
    ``DiceTopK``  Dice + cross-entropy of the hardest tenth of the voxels (nnU-Net's).
    ``DicePerim`` Dice + squared difference of perimeters, in 3D of surfaces.
    ============= ========================================================================================================

    Args:
        name: One of :data:`LOSSES`.
        label_manager: nnU-Net's, of the dataset: regions and the ignore label.
        batch_dice: Whether Dice takes the batch, of all processes, as one image.
        is_ddp: Whether several processes train.

    Raises:
        PlansError: See :func:`refuse_loss`.
        KeyError: If there is no such loss; trainers' names are checked where they are resolved.
    """
    refuse_loss(name, label_manager, f"nnUNetTrainer<Norm>_{name}")
    return LOSSES[name](label_manager, batch_dice, is_ddp)
