"""Losses beside nnU-Net's Dice and cross-entropy, built as the trainer's name says."""

from nnunet_norm.training.losses.build import LOSSES, build_loss, refuse_loss
from nnunet_norm.training.losses.perimeter import DicePerimeterLoss, PerimeterLoss
from nnunet_norm.training.losses.top_k import TopKOrLargest

__all__ = ["LOSSES", "DicePerimeterLoss", "PerimeterLoss", "TopKOrLargest", "build_loss", "refuse_loss"]
