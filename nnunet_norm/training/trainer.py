"""The base of all trainers of this package."""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import BatchRenorm2d, BatchRenorm3d, convert_norm, find_norms
from nnunet_norm.settings import NormSettings
from nnunet_norm.training import progress
from nnunet_norm.training.contradictions import named_norm, refuse_contradiction
from nnunet_norm.training.disparity import (
    Disparity,
    DisparityCounts,
    default_disparity_batches,
    measure_disparity,
)
from nnunet_norm.training.distributed import gathered
from nnunet_norm.training.initial_statistics import InitialStatistics
from nnunet_norm.training.input_trainer import InputTrainer
from nnunet_norm.training.validation import ValidationPredictor, halo_validation

LARGE_DISPARITY = 0.1
"""Mean train/eval disparity from which on the log warns: the modes disagree on more than a tenth of what they predict."""

_REMEDIES = {
    "batch_norm": "train with a larger batch, or with nnUNetTrainerBRN",
    "instance_norm_tracked": "train with nnUNetTrainerBRN, whose train mode comes to agree with its eval mode",
    "batch_renorm": "give the training more iterations, or the ramp a larger share of them (nnunet_norm.batch_renorm)",
}


class NormTrainer(InputTrainer):
    """nnU-Net's trainer with another norm, and with measurements of what the norm does.

    Subclasses name the norm; nothing else. The network is built as the plans say and then has its norms exchanged, so any
    architecture works, weights are initialized as ever, and the plans saved with the model stay as they were. What stock
    plans cannot hold is read from the configuration's ``"nnunet_norm"`` block (:mod:`nnunet_norm.settings`).

    * Every validation epoch measures train/eval disparity on some batches and logs it.
    * Running statistics do not remember their initial values, however short the training is.
    * BatchRenorm's limits open by shares of the planned iterations.
    * The final validation predicts with the halo predictor and writes ``validation/norm_report.json``.

    Raises:
        PlansError: If the plans contradict the trainer's name, or their block is not valid; before anything is written.
    """

    norm: ClassVar[str | None] = None
    """A name of :data:`nnunet_norm.layers.NORMS`; None for the norm that the plans name."""

    validation_predictor: ClassVar[type[ValidationPredictor]] = ValidationPredictor
    """What the final validation predicts and measures with."""

    def set_up(self) -> None:
        """See ``ScaledTrainer``."""
        super().set_up()
        self.disparity_batches = self.settings.disparity_batches or default_disparity_batches(
            self.num_iterations_per_epoch, self.num_val_iterations_per_epoch
        )
        self.logger.local_logger = progress.NormLogger()
        self._initial_statistics: InitialStatistics | None = None
        self._disparity_counts = DisparityCounts()
        self._was_large = False

    def refuse(self, plans: dict[str, Any], configuration: dict[str, Any], settings: NormSettings) -> None:
        """See ``ScaledTrainer``: plans that name another norm than the trainer does."""
        super().refuse(plans, configuration, settings)
        refuse_contradiction(configuration, self.norm, type(self).__name__)

    @classmethod
    def finish_network(cls, network: nn.Module, configuration_manager: ConfigurationManager) -> nn.Module:
        """The network with the norm that the trainer names.

        Raises:
            PlansError: If the trainer names a norm and the network has none to exchange.
        """
        network = super().finish_network(network, configuration_manager)
        architecture = configuration_manager.network_arch_init_kwargs
        if cls.norm is None or ("norm_op" in architecture and named_norm(architecture) == cls.norm):
            return network
        if not find_norms(network):
            name = configuration_manager.network_arch_class_name
            raise PlansError(f"plans: {name} as configured has no norms that {cls.__name__} could exchange")
        return convert_norm(network, cls.norm)

    @property
    def renorms(self) -> list[BatchRenorm2d | BatchRenorm3d]:
        """The network's BatchRenorm layers, each once."""
        return [layer for layer in self.bare_network.modules() if isinstance(layer, (BatchRenorm2d, BatchRenorm3d))]

    def initialize(self) -> None:
        """Build everything, and make the keys of what is measured known."""
        super().initialize()
        self._register_keys()

    def _register_keys(self) -> None:
        keys = progress.EVERY_NORM + (progress.BATCH_RENORM if self.renorms else ())
        self.logger.local_logger.register(keys, self.current_epoch)

    def plan_norms(self) -> None:
        """Tell BatchRenorm how many steps are planned, and what processes share."""
        if not self.renorms:
            return
        planned = self.num_epochs * self.num_iterations_per_epoch
        settings = self.settings.batch_renorm
        values = {
            "momentum": round(settings.momentum_over(planned), 4),
            "r_max": settings.r_max,
            "d_max": settings.d_max,
            "warmup_steps": round(settings.warmup * planned),
            "ramp_steps": round(settings.ramp * planned),
            "sync": settings.sync,
        }
        # With nnUNetTrainerNorm, what the plans give the norm itself has its home there and holds.
        architecture = self.configuration_manager.network_arch_init_kwargs
        in_plans = (architecture.get("norm_op_kwargs") or {}) if self.norm is None else {}
        for layer in self.renorms:
            for name, value in values.items():
                setattr(layer, name, in_plans.get(name, value))
        first = self.renorms[0]
        self.print_to_log_file(
            f"BatchRenorm: BatchNorm for {first.warmup_steps} of {planned} iterations, then limits that open over "
            f"{first.ramp_steps} to r_max={first.r_max}, d_max={first.d_max}; momentum {first.momentum}"
        )

    def load_checkpoint(self, checkpoint: dict[str, Any] | str) -> None:
        """Continue, also from a checkpoint in which this package's keys are missing."""
        super().load_checkpoint(checkpoint)
        self._register_keys()

    def on_train_start(self) -> None:
        """Begin the schedule and the running statistics afresh, unless a training is continued."""
        super().on_train_start()
        if self.current_epoch == 0:
            for layer in self.renorms:
                assert layer.num_batches_tracked is not None
                layer.num_batches_tracked.zero_()  # pretrained weights bring the count of another training
            self._initial_statistics = InitialStatistics.of(self.bare_network)

    def on_train_epoch_start(self) -> None:
        """Log how far BatchRenorm's limits are open."""
        super().on_train_epoch_start()
        if self.renorms:
            r_max, d_max = (limit.item() for limit in self.renorms[0].limits())
            self.print_to_log_file(f"BatchRenorm limits: r_max {r_max:.3f}, d_max {d_max:.3f}")

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Take the initial values out of the running statistics after the first epoch."""
        super().on_train_epoch_end(train_outputs)
        if self._initial_statistics is not None:
            self._initial_statistics.forget(self.num_iterations_per_epoch)
            self._initial_statistics = None

    def on_validation_epoch_start(self) -> None:
        """Begin a new measurement of disparity."""
        super().on_validation_epoch_start()
        self._disparity_counts = DisparityCounts()

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step, and on the first batches the same data with the norms in train mode."""
        result = super().validation_step(batch)
        if self._disparity_counts.num_batches < self.disparity_batches:
            self._disparity_counts += measure_disparity(
                self.bare_network,
                next(self.in_micro_batches([batch])).to(self.device, non_blocking=True),
                regions=self.label_manager.has_regions,
                autocast=self.autocast(),
            )
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the disparity of all processes together."""
        super().on_validation_epoch_end(val_outputs)
        disparity = Disparity.of(sum(gathered(self._disparity_counts), DisparityCounts()))
        self.log_disparity(disparity)

    def log_disparity(self, disparity: Disparity) -> None:
        """Hand the values to nnU-Net's logger, print them, and warn when they are large."""
        values = {progress.DISPARITY_PER_CLASS: disparity.per_class, progress.DISPARITY: disparity.mean}
        self.print_to_log_file("Train/eval disparity", [round(value, 4) for value in disparity.per_class])
        if self.renorms:
            values[progress.BATCH_STATISTICS] = disparity.batch_statistics_mean
            values[progress.CLIPPED] = disparity.clipped
            values[progress.ABS_LOG_R] = disparity.abs_log_r
            values[progress.ABS_D] = disparity.abs_d
            self.print_to_log_file(
                f"BatchRenorm: disparity against plain batch statistics {disparity.batch_statistics_mean:.4f}, "
                f"clipped channels {disparity.clipped:.1%}, mean |log r| {disparity.abs_log_r:.3f}, "
                f"mean |d| {disparity.abs_d:.3f}"
            )
        elif disparity.batch_statistics:
            self.print_to_log_file(
                f"Frozen statistics: disparity against plain batch statistics {disparity.batch_statistics_mean:.4f}"
            )
        for key, value in values.items():
            self.logger.log(key, value, self.current_epoch)
        self._warn_when_large(disparity)

    def _warn_when_large(self, disparity: Disparity) -> None:
        large = disparity.mean > LARGE_DISPARITY
        if large and not self._was_large:
            warming_up = bool(self.renorms) and self.renorms[0].limits().d_max.item() < self.renorms[0].d_max
            remedy = (
                "it should fall as BatchRenorm's limits open; judge it after the ramp" if warming_up else self.remedy
            )
            self.print_to_log_file(
                f"WARNING: train/eval disparity is {disparity.mean:.3f}: the network predicts otherwise with its running "
                f"statistics than it was trained to; {remedy}."
            )
        self._was_large = large

    @property
    def remedy(self) -> str:
        """What to do about a large disparity."""
        return _REMEDIES.get(self._norm_of_network() or "", "train with nnUNetTrainerBRN or nnUNetTrainerGN")

    def _norm_of_network(self) -> str | None:
        """The trainer's norm, or what the plans name if it leaves that to them."""
        architecture = self.configuration_manager.network_arch_init_kwargs
        return self.norm or (named_norm(architecture) if "norm_op" in architecture else None)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation with the halo predictor; its report stands beside ``summary.json``."""
        with halo_validation(self):
            super().perform_actual_validation(save_probabilities)
