"""Training of networks that are no U-Net of the plans: ``_UNETR`` in a trainer's name."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_norm.architectures import LEARNING_RATE, UNETR, build_unetr, refuse_patch
from nnunet_norm.errors import PlansError
from nnunet_norm.planning.configurations import indivisible
from nnunet_norm.settings import NormSettings, UnetrSettings
from nnunet_norm.training.scaled_trainer import ScaledTrainer

HIGH_LEARNING_RATE = 10 * LEARNING_RATE
"""From here on the plans' learning rate is likely to be one for SGD."""


class ArchitectureTrainer(ScaledTrainer):
    """The scaled trainer with the network that the trainer's name says; without one nothing changes.

    UNETR is trained without deep supervision, which it has no outputs for, and with AdamW at an initial learning rate of
    1e-4, unless the plans name another; nnU-Net's polynomial schedule and weight decay stay. (nnU-Net's own transformers,
    Primus, are trained with AdamW and without deep supervision, too.)

    Raises:
        PlansError: The plans' patch is not made of whole tokens, or is made of them alone and the network is to be the U-Net;
            before anything is written.

    References:
        Hatamizadeh et al. 2022, arXiv:2103.10504, section 4.2.
    """

    architecture: ClassVar[str | None] = None
    """One of :data:`nnunet_norm.architectures.ARCHITECTURES` if the trainer's name says so; None for the plans' own."""

    def set_up(self) -> None:
        """See ``ScaledTrainer``."""
        super().set_up()
        if self.architecture is None:
            return
        self.enable_deep_supervision = False
        if self.settings.initial_lr is None:
            self.initial_lr = LEARNING_RATE

    def refuse(self, plans: dict[str, Any], configuration: dict[str, Any], settings: NormSettings) -> None:
        """See ``ScaledTrainer``: a patch that the network cannot take."""
        super().refuse(plans, configuration, settings)
        name = type(self).__name__
        if self.architecture is not None:
            refuse_patch(configuration["patch_size"], f"-tr {name}")
        elif settings.unetr is not None and (reason := indivisible(configuration, name)) is not None:
            raise PlansError(
                f"-tr {name}: {reason} of the plans' U-Net: put _{UNETR}, which the plans are for, behind the norm of the "
                "trainer's name"
            )

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network that the trainer's name says, or the plans; called in training and in inference.

        Subclasses change what has been built in ``finish_network``.
        """
        if cls.architecture is None:
            network = super().build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
        else:
            network = build_unetr(configuration_manager.configuration, num_input_channels, num_output_channels)
        return cls.finish_network(network, configuration_manager)

    @classmethod
    def finish_network(cls, network: nn.Module, configuration_manager: ConfigurationManager) -> nn.Module:
        """The network as it is trained and predicts, from the one that has just been built; here that itself."""
        return network

    def initialize(self) -> None:
        """Build everything, and say what was built."""
        super().initialize()
        if self.architecture is None:
            if self.settings.unetr is not None:
                self.print_to_log_file(
                    f"WARNING: the plans are for a {UNETR}, and {type(self).__name__} trains their U-Net, with an initial "
                    f"learning rate of {self.initial_lr:g}: put _{UNETR} behind the norm of the trainer's name"
                )
            return
        sizes = dataclasses.asdict(self.settings.unetr or UnetrSettings())
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        tile = "x".join(map(str, self.configuration_manager.patch_size))
        self.print_to_log_file(
            f"{UNETR} for tiles of {tile} alone ({listed}); AdamW with an initial learning rate of {self.initial_lr:g}, no "
            "deep supervision"
        )
        if self.initial_lr >= HIGH_LEARNING_RATE:
            self.print_to_log_file(
                f"WARNING: initial_lr of the plans is {self.initial_lr:g}, as for SGD: {UNETR} is trained with AdamW, for "
                f"which {LEARNING_RATE:g} is usual; leave it out of the plans, or lower it"
            )

    def configure_optimizers(self) -> tuple[Any, Any]:
        """nnU-Net's, or AdamW with nnU-Net's schedule."""
        if self.architecture is None:
            return super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """nnU-Net's switch, which networks without deep supervision have not."""
        if self.architecture is None:
            super().set_deep_supervision_enabled(enabled)
