"""Training with a normalization batch size of its own."""

from __future__ import annotations

from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import GhostBatchNorm2d, GhostBatchNorm3d
from nnunet_norm.settings import NormSettings
from nnunet_norm.training.trainer import NormTrainer


class GhostBatchNormTrainer(NormTrainer):
    """BatchNorm over parts of the batch: ``normalization_batch_size`` samples, from the configuration's block.

    The running statistics take in each batch once, whole. Under DDP each process normalizes parts of its own share.

    Raises:
        PlansError: If the block has no ``normalization_batch_size``, or one that does not divide the batch.

    References:
        Hoffer, Hubara and Soudry 2017, arXiv:1705.08741.
    """

    norm = "ghost_batch_norm"

    def refuse(self, plans: dict[str, Any], configuration: dict[str, Any], settings: NormSettings) -> None:
        """See ``NormTrainer``."""
        super().refuse(plans, configuration, settings)
        size = settings.normalization_batch_size
        if size is None:
            raise PlansError(
                f"plans: nnunet_norm.normalization_batch_size is missing, which -tr {type(self).__name__} needs: derive "
                "plans with nnunet-norm plan --normalization-batch-size N"
            )
        for samples, what in ((configuration["batch_size"], "the batch"), (settings.micro_batch_size, "a micro-batch")):
            if samples is not None:
                _require_divisor(size, samples, what)

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        assert self.settings.normalization_batch_size is not None
        _require_divisor(self.settings.normalization_batch_size, self.batch_size, "this process's share of the batch")

    def initialize(self) -> None:
        """Build everything, then tell the norms how many samples they normalize together."""
        super().initialize()
        size = self.settings.normalization_batch_size
        assert size is not None
        for layer in self.bare_network.modules():
            if isinstance(layer, GhostBatchNorm2d | GhostBatchNorm3d):
                layer.normalization_batch_size = size
        self.print_to_log_file(f"GhostBatchNorm: {size} of {self.batch_size} samples are normalized together")


def _require_divisor(size: int, batch_size: int, what: str) -> None:
    if batch_size % size:
        raise PlansError(
            f"plans: nnunet_norm.normalization_batch_size is {size}, and {what} has {batch_size} samples: choose a divisor"
        )
