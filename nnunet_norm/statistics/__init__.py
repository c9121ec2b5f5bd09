"""Running statistics re-estimated from data: of training sets, new domains, experimental batches, single images."""

from nnunet_norm.statistics.estimate import estimate_population_statistics
from nnunet_norm.statistics.images import StagedEstimator, blocks_of
from nnunet_norm.statistics.modes import norms_in_train_mode

__all__ = [
    "StagedEstimator",
    "blocks_of",
    "estimate_population_statistics",
    "norms_in_train_mode",
]
