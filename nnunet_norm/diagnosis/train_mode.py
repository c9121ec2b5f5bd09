"""The network as a training leaves it: what only trainers set, and neither plans nor weights bring back."""

from __future__ import annotations

import copy
from contextlib import redirect_stdout
from io import StringIO

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from nnunet_norm.layers import (
    BatchRenorm2d,
    BatchRenorm3d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    convert_norm,
    tracks_statistics,
)
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.model_folder import trainers_on_search_path
from nnunet_norm.settings import NormSettings
from nnunet_norm.training import NormTrainer
from nnunet_norm.training.reestimating import FrozenBatchNormTrainer


def as_at_the_end_of_training(network: nn.Module, predictor: CasePredictor) -> nn.Module:
    """A copy of a loaded network whose train mode is that of the last epochs of its training; a stock one is the same.

    BatchRenorm's limits are open, GhostBN has its number of samples, and FrozenBN's norms are frozen.

    Args:
        network: loaded, without wrappers.
        predictor: has the plans and the trainer's name.
    """
    network = copy.deepcopy(network)
    with trainers_on_search_path(), redirect_stdout(StringIO()):
        trainer = recursive_find_trainer_class_by_name(predictor.trainer_name)
    if not issubclass(trainer, NormTrainer):
        return network
    settings = NormSettings.from_configuration(predictor.configuration_manager.configuration)
    for layer in network.modules():
        if isinstance(layer, BatchRenorm2d | BatchRenorm3d):
            layer.warmup_steps = layer.ramp_steps = 0
            if trainer.norm is not None:  # else the plans gave the norm its limits themselves
                layer.r_max, layer.d_max = settings.batch_renorm.r_max, settings.batch_renorm.d_max
        elif isinstance(layer, GhostBatchNorm2d | GhostBatchNorm3d):
            assert settings.normalization_batch_size is not None  # its trainer refuses plans without
            layer.normalization_batch_size = settings.normalization_batch_size
    if issubclass(trainer, FrozenBatchNormTrainer):
        network = convert_norm(network, "frozen_batch_norm", only=tracks_statistics)
    return network
