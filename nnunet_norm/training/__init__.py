"""Training with another norm: the base trainer and its hooks. Trainers that nnU-Net finds by name are in ``trainers/``."""

from nnunet_norm.training.naming import resolve_trainer, trainer_names
from nnunet_norm.training.trainer import NormTrainer

__all__ = ["NormTrainer", "resolve_trainer", "trainer_names"]
