"""Every trainer of this package: one class per norm, each with ``_<N>epochs`` behind its name or without.

``export nnUNet_extTrainer="$(nnunet-norm trainers-dir)"`` lets nnU-Net find them. It imports every module of this folder at
each lookup: nothing but leaf classes belongs here. The names stand in results folders and checkpoints and never change.
"""

from nnunet_norm.training import NormTrainer, resolve_trainer
from nnunet_norm.training.experimental_batch_trainer import ExperimentalBatchTrainer
from nnunet_norm.training.ghost_batch_norm_trainer import GhostBatchNormTrainer
from nnunet_norm.training.reestimating import FrozenBatchNormTrainer, PreciseBatchNormTrainer


class nnUNetTrainerBRN(NormTrainer):
    """BatchRenorm: predicts the same in every tile, and in eval mode what it was trained to predict."""

    norm = "batch_renorm"


class nnUNetTrainerGN(NormTrainer):
    """GroupNorm with 16 channels a group: no running statistics; those of the image, or of the tile."""

    norm = "group_norm"


class nnUNetTrainerInstanceNorm(NormTrainer):
    """InstanceNorm, nnU-Net's own norm, with this package's measurements and predictor: the baseline."""

    norm = "instance_norm"


class nnUNetTrainerINTracked(NormTrainer):
    """InstanceNorm that predicts with running statistics: the same in every tile, at the price of disparity."""

    norm = "instance_norm_tracked"


class nnUNetTrainerBatchNorm(NormTrainer):
    """BatchNorm: the same in every tile; with small batches it predicts otherwise than it was trained to."""

    norm = "batch_norm"


class nnUNetTrainerPreciseBN(PreciseBatchNormTrainer):
    """BatchNorm with running statistics re-estimated from training patches, before the final checkpoint."""


class nnUNetTrainerFrozenBN(FrozenBatchNormTrainer):
    """BatchNorm that trains its last epochs with frozen, re-estimated statistics: no disparity."""


class nnUNetTrainerGhostBN(GhostBatchNormTrainer):
    """BatchNorm over parts of the batch, of a size that stands in the plans."""


class nnUNetTrainerBEN(ExperimentalBatchTrainer):
    """BatchNorm with mini-batches of one experimental batch each: takes out what its images have in common."""


class nnUNetTrainerNoNorm(NormTrainer):
    """No norm at all."""

    norm = "none"


class nnUNetTrainerNorm(NormTrainer):
    """Whatever norm the plans name, with this package's measurements and predictor."""

    norm = None


def __getattr__(name: str) -> type[NormTrainer]:
    return resolve_trainer(name, globals())
