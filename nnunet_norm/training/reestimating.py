"""Trainers whose running statistics are re-estimated from training patches: PreciseBN and FrozenBN."""

from __future__ import annotations

import math
from typing import Any

import torch

from nnunet_norm.errors import StatisticsError
from nnunet_norm.layers import FrozenBatchNorm, convert_norm, tracks_statistics
from nnunet_norm.statistics import estimate_population_statistics
from nnunet_norm.training.trainer import NormTrainer

POPULATION_SAMPLES = 1000
"""Training patches of an estimate where the plans have no number: 10^3 to 10^4 suffice (Wu and Johnson 2021, section 3.2)."""

FROZEN_SHARE = 0.2
"""Share of the epochs that FrozenBN trains with frozen statistics (Wu and Johnson 2021, section 4.3)."""


class ReestimatingTrainer(NormTrainer):
    """BatchNorm whose running statistics are those of a population of training patches, not an average over past weights."""

    norm = "batch_norm"

    def reestimate(self) -> None:
        """Estimate the statistics for the present weights from training patches, augmented as in training.

        The patches come in batches of the training's size, all processes together, and each process draws its share; they go
        through the network as in training.
        """
        samples = self.settings.population_samples or POPULATION_SAMPLES
        batch_size = self.configuration_manager.batch_size  # of all processes
        batches = math.ceil(samples / batch_size)
        try:
            with self.autocast():
                estimate_population_statistics(
                    self.network,
                    self.in_micro_batches(self.dataloader_train),
                    num_iters=batches * self.num_micro_batches(self.batch_size),
                    synchronized=self.is_ddp,
                    progress=False,
                )
        except StatisticsError as error:  # a patch that overflows must not take the training with it
            self.print_to_log_file(f"WARNING: running statistics stay as they are, not re-estimated: {error}")
            return
        self.print_to_log_file(
            f"Running statistics re-estimated from {batches * batch_size} training patches (batches of {batch_size})"
        )

    def seed_estimate(self) -> None:
        """Seed the patches of the estimate that every training has, whether or not it was continued."""
        self._seed(self.num_epochs + 1)


class PreciseBatchNormTrainer(ReestimatingTrainer):
    """BatchNorm with population statistics for inference (PreciseBN).

    Before the final checkpoint the statistics are re-estimated from ``population_samples`` training patches, and with
    ``reestimate_every`` also after every so many epochs, before the validation of that epoch; both stand in the block
    ``"nnunet_norm"`` of the configuration. Training itself is that of BatchNorm. ``checkpoint_best.pth`` has the statistics
    of its epoch: re-estimated ones only if that epoch re-estimated them.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, section 3.2.
    """

    _estimated_in: int | None = None

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Re-estimate after every so many epochs."""
        super().on_train_epoch_end(train_outputs)
        every = self.settings.reestimate_every
        if every is not None and (self.current_epoch + 1) % every == 0:
            if self.current_epoch == self.num_epochs - 1:
                self.seed_estimate()  # as on_train_end would, which may be all that a continued training does
            self.reestimate()
            self._estimated_in = self.current_epoch

    def load_checkpoint(self, checkpoint: dict[str, Any] | str) -> None:
        """Continue; the statistics of a final checkpoint are final."""
        super().load_checkpoint(checkpoint)
        if isinstance(checkpoint, str) and checkpoint.endswith("checkpoint_final.pth"):
            self._estimated_in = self.current_epoch - 1

    def on_train_end(self) -> None:
        """Re-estimate before the final checkpoint, which nnU-Net writes here, while there are data to draw."""
        if self._estimated_in != self.num_epochs - 1:
            self.seed_estimate()
            self.reestimate()
        super().on_train_end()


class FrozenBatchNormTrainer(ReestimatingTrainer):
    """BatchNorm that ends its training with frozen population statistics (FrozenBN).

    When the share ``frozen_share`` of the epochs is left, the statistics are re-estimated from ``population_samples``
    training patches and stay so: train mode is then eval mode, and the affine parameters go on learning. In the first of
    these epochs the learning rate rises linearly to what it would be. A continued training is frozen from the same epoch on.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, section 4.3.
    """

    @property
    def freeze_epoch(self) -> int:
        """The first epoch with frozen statistics; the first epoch of all never is."""
        share = self.settings.frozen_share or FROZEN_SHARE
        return max(self.num_epochs - max(round(share * self.num_epochs), 1), 1)

    def load_checkpoint(self, checkpoint: dict[str, Any] | str) -> None:
        """Continue; statistics are frozen if they were when the checkpoint was saved, and only then."""
        super().load_checkpoint(checkpoint)
        if self.current_epoch > self.freeze_epoch:
            self._freeze()
        else:  # --val_best after a training
            convert_norm(self.bare_network, "batch_norm", only=lambda norm: isinstance(norm, FrozenBatchNorm))
            self.fit_norms()

    def on_train_epoch_start(self) -> None:
        """Re-estimate and freeze when it is time."""
        if self.current_epoch == self.freeze_epoch:
            self.seed_estimate()
            self.reestimate()
            self._freeze()
            self.print_to_log_file(
                f"Running statistics are frozen from epoch {self.current_epoch} on; the learning rate rises linearly over "
                "this epoch"
            )
        super().on_train_epoch_start()

    def learning_rate_factor(self, step: int) -> float:
        """See ``ScaledTrainer``; it rises in the first frozen epoch."""
        rising = step / self.num_iterations_per_epoch if self.current_epoch == self.freeze_epoch else 1.0
        return super().learning_rate_factor(step) * rising

    def _freeze(self) -> None:
        """Exchange the norms under DDP, torch.compile and optimizer, which keep the very same parameters and buffers."""
        if not any(isinstance(module, FrozenBatchNorm) for module in self.bare_network.modules()):
            convert_norm(self.bare_network, "frozen_batch_norm", only=tracks_statistics)
            torch.compiler.reset()
