"""nnU-Net's trainer for large batches and patches: any device, many processes, micro-batches, losses, safe checkpoints."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import (
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm2d,
    BatchRenorm3d,
    checkpoint_stages,
    fit_for_steps,
    one_step,
)
from nnunet_norm.planning.batches import check_shares, shares
from nnunet_norm.prediction.model_writing import checkpoint_beside
from nnunet_norm.receptive_field.trace import unwrapped
from nnunet_norm.settings import CHECKPOINT_MINUTES, NormSettings
from nnunet_norm.training.distributed import ddp_on_any_device, only_first_process_writes, share_buffers
from nnunet_norm.training.losses import build_loss, refuse_loss
from nnunet_norm.training.micro_batches import MicroBatches

_ACROSS_SAMPLES = (_BatchNorm, BatchNorm2d, BatchNorm3d, BatchRenorm2d, BatchRenorm3d)
"""Norms whose statistics are those of all samples of a forward pass."""


class ScaledTrainer(nnUNetTrainer):
    """nnU-Net's trainer, with what a large batch or patch needs; everything is off unless the plans' block asks for it.

    * One process or several, on CPUs or GPUs, on one node or more (:mod:`nnunet_norm.training.launch`).
    * ``micro_batch_size``: a process's samples go through the network in parts, whose gradients are added up.
    * ``activation_checkpointing``: activations are computed again instead of kept.
    * ``warmup_epochs``: the learning rate rises linearly to nnU-Net's schedule.
    * Running statistics and schedules of norms advance once per optimizer step, however often the network is run for it.
    * Checkpoints are whole or not there, and one to continue from is never older than ``checkpoint_minutes`` and an epoch.

    Raises:
        PlansError: If the plans' block is not valid, or the loss that the trainer's name says does not fit the labels; before
            anything is written.
    """

    loss_name: ClassVar[str | None] = None
    """One of :data:`nnunet_norm.training.losses.LOSSES` if the trainer's name says so; None for nnU-Net's."""

    epochs: ClassVar[int | None] = None
    """Number of epochs if the trainer's name says so."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature, which it reads back
    ) -> None:
        manager = PlansManager(plans)
        resolved = manager.get_configuration(configuration).configuration
        settings = NormSettings.from_configuration(resolved)
        if self.loss_name is not None:
            refuse_loss(self.loss_name, manager.get_label_manager(dataset_json), type(self).__name__)
        self.refuse(plans, resolved, settings)
        with self._any_device(device):
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp and device != torch.device("cuda"):  # as nnU-Net's own launcher leaves it: the rank's GPU
            self.device = device
        self.settings = settings
        if self.epochs is not None:
            self.num_epochs = self.epochs
        for name in ("num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr"):
            if (value := getattr(settings, name)) is not None:
                setattr(self, name, value)
        self._step_of_epoch = 0
        self._time_of_checkpoint = time.monotonic()
        self.set_up()

    def set_up(self) -> None:
        """What a subclass begins with: nnU-Net wants the signature of ``__init__`` in every class that has one."""

    @staticmethod
    def _any_device(device: torch.device) -> AbstractContextManager[Any]:
        """Inside, nnU-Net makes no scaler of gradients for a CPU: with several processes it takes GPUs for granted."""
        if device.type == "cuda":
            return nullcontext()
        return patch.object(import_module(nnUNetTrainer.__module__), "GradScaler", lambda *_: None)

    def refuse(self, plans: dict[str, Any], configuration: dict[str, Any], settings: NormSettings) -> None:
        """Refuse, before anything is written, what the trainer cannot be trained with; here nothing.

        Args:
            plans: As nnU-Net hands them over.
            configuration: The one to train, inheritance resolved.
            settings: Its block ``"nnunet_norm"``.
        """

    @property
    def bare_network(self) -> nn.Module:
        """The network itself, without DDP and torch.compile."""
        return unwrapped(self.network)

    @property
    def num_processes(self) -> int:
        """Processes that train together."""
        return dist.get_world_size() if self.is_ddp else 1

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of nnU-Net's own steps: half on CUDA, single elsewhere."""
        return torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext()

    def initialize(self) -> None:
        """Build everything, then fit the network to how its steps are made."""
        self._seed(0)
        with ddp_on_any_device(self):
            super().initialize()
        if self.settings.activation_checkpointing:
            segments = checkpoint_stages(self.bare_network)
            self.print_to_log_file(f"Activation checkpointing: {segments} segments are computed again for the gradient")
        self.fit_norms()
        self.plan_norms()
        if self.settings.micro_batch_size is not None:
            self._check_micro_batches()
        if (warmup := self.settings.warmup_epochs or 0) >= self.num_epochs:
            self.print_to_log_file(
                f"WARNING: the learning rate rises over {warmup} epochs, and the training has {self.num_epochs}: it never "
                "gets to where it should"
            )

    def fit_norms(self) -> None:
        """Exchange torch's norms where they cannot do what the steps need: run often, or share statistics on a CPU."""
        if self._runs_often or (self.is_ddp and self.device.type != "cuda"):
            fit_for_steps(self.bare_network)

    def plan_norms(self) -> None:
        """Tell the norms what they need to know of the training; here nothing."""

    @property
    def _in_micro_batches(self) -> bool:
        size = self.settings.micro_batch_size
        return size is not None and size < self.batch_size

    @property
    def _runs_often(self) -> bool:
        """Whether the network is run more than once for a step."""
        return self._in_micro_batches or bool(self.settings.activation_checkpointing)

    @property
    def normalization_batch_size(self) -> int:
        """Samples whose statistics normalize one forward pass: of all processes only where norms share them."""
        size = min(self.settings.micro_batch_size or self.batch_size, self.batch_size)
        if not self._norms_wait:
            return size
        return size * self.num_processes if self._in_micro_batches else int(self.configuration_manager.batch_size)

    @property
    def _norms_wait(self) -> bool:
        """Whether norms normalize with the batches of all processes, for which each must run the network as often."""
        return any(
            isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "sync", None) == "full"
            for norm in self.bare_network.modules()
        )

    def in_micro_batches(self, batches: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
        """The data of batches in the parts in which they go through the network."""
        for batch in batches:
            yield from batch["data"].split(self.settings.micro_batch_size or self.batch_size)

    def num_micro_batches(self, samples: int) -> int:
        """Parts in which ``samples`` go through the network."""
        return math.ceil(samples / (self.settings.micro_batch_size or samples))

    def _check_micro_batches(self) -> None:
        size, batch_size = self.settings.micro_batch_size, self.configuration_manager.batch_size
        parts = set(shares(batch_size, self.num_processes))
        if self._norms_wait and len({self.num_micro_batches(part) for part in parts}) > 1:
            raise PlansError(
                f"plans: batch_size {batch_size} gives the {self.num_processes} processes "
                f"{' or '.join(map(str, sorted(parts)))} samples, in unequal numbers of micro-batches of {size}, and norms "
                f"wait for all of them: choose a batch size that {self.num_processes} divides"
            )
        if not self._in_micro_batches:
            return
        text = (
            f"Micro-batches: the {self.batch_size} samples of this process go through the network in "
            f"{self.num_micro_batches(self.batch_size)} parts, and their gradients are added up"
        )
        if any(isinstance(norm, _ACROSS_SAMPLES) for norm in self.bare_network.modules()):
            text += f"; norms over the batch normalize {self.normalization_batch_size} samples at a time"
        self.print_to_log_file(text)

    def _set_batch_size_and_oversample(self) -> None:
        check_shares(self.configuration_manager.configuration, self.num_processes, self.configuration_name)
        super()._set_batch_size_and_oversample()

    def _do_i_compile(self) -> bool:
        # Compiled, which activations are computed again is the compiler's choice, not that of the segments.
        return not self.settings.activation_checkpointing and super()._do_i_compile()

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.loss_name is None:
            return loss
        own: Any = build_loss(
            self.loss_name,
            label_manager=self.label_manager,
            batch_dice=self.configuration_manager.batch_dice,
            is_ddp=self.is_ddp,
        )
        if self._do_i_compile():
            own.dc = torch.compile(own.dc)
        if isinstance(loss, DeepSupervisionWrapper):
            loss.loss = own
            return loss
        return own

    def _seed(self, step: int) -> None:
        """Seed weights and sampling, anew every epoch so that a continued training draws what an uninterrupted one does.

        Workers of the augmentation seed themselves: only without them (``nnUNet_n_proc_DA=0``) sampling and augmentation are
        seeded too, and a run repeats exactly.
        """
        if self.settings.seed is None:
            return
        seed = int(np.random.SeedSequence([self.settings.seed, step, self.local_rank]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - nnU-Net's loaders and transforms draw from the global generators
        torch.manual_seed(seed)

    def on_train_start(self) -> None:
        """Seed; of several processes the first one alone writes."""
        self._seed(self.current_epoch + 1)
        with only_first_process_writes(self):
            super().on_train_start()
        self._time_of_checkpoint = time.monotonic()

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, and say so if the learning rate rises in it."""
        self._seed(self.current_epoch + 1)
        super().on_train_epoch_start()
        self._step_of_epoch = 0
        if self.current_epoch < (self.settings.warmup_epochs or 0):
            self.print_to_log_file(
                f"Warm-up: it rises linearly from 0 over the first {self.settings.warmup_epochs} epochs, to "
                f"{self.learning_rate_factor(self.num_iterations_per_epoch):.4g} of that at the end of this one"
            )

    def learning_rate_factor(self, step: int) -> float:
        """What nnU-Net's learning rate is multiplied with in step 1, 2, ... of the present epoch.

        References:
            Goyal et al. 2017, arXiv:1706.02677, section 2.2 (gradual warm-up).
        """
        warmup = (self.settings.warmup_epochs or 0) * self.num_iterations_per_epoch
        done = self.current_epoch * self.num_iterations_per_epoch + step
        return min(done / warmup, 1.0) if warmup else 1.0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step, in micro-batches if the plans say so; norms take it in once."""
        self._step_of_epoch += 1
        factor = self.learning_rate_factor(self._step_of_epoch)
        for group, scheduled in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = scheduled * factor
        stepping = one_step(self.bare_network) if self._runs_often or self.is_ddp else nullcontext()
        with stepping, self._micro_batches():
            result: dict[str, Any] = super().train_step(batch)
        return result

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step, in parts no larger than those of the training."""
        with self._micro_batches():
            result: dict[str, Any] = super().validation_step(batch)
        return result

    def _micro_batches(self) -> AbstractContextManager[Any]:
        if not self._in_micro_batches:
            return nullcontext()
        assert self.settings.micro_batch_size is not None
        return patch.object(self, "network", MicroBatches(self.network, self.settings.micro_batch_size))

    def on_validation_epoch_start(self) -> None:
        """Validate with the first process's buffers, where norms keep statistics of each process alone."""
        super().on_validation_epoch_start()
        if self.is_ddp:
            share_buffers(self.bare_network)

    def on_epoch_end(self) -> None:
        """nnU-Net's end of an epoch, with a checkpoint if the last one is too old."""
        minutes = self.settings.checkpoint_minutes
        oldest = 60 * (CHECKPOINT_MINUTES if minutes is None else minutes)
        due = time.monotonic() - self._time_of_checkpoint >= oldest
        with patch.object(self, "save_every", 1 if due else self.save_every):
            super().on_epoch_end()

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, whole under its name or not there."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with checkpoint_beside(filename) as beside:
            super().save_checkpoint(str(beside))
        if filename.endswith("checkpoint_latest.pth"):
            self._time_of_checkpoint = time.monotonic()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, with the first process's buffers."""
        if self.is_ddp:
            share_buffers(self.bare_network)
        super().perform_actual_validation(save_probabilities)
