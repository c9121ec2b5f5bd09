"""How much a training computes, counted on the network without data."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunet_norm.planning.batches import shares
from nnunet_norm.planning.memory import Network, running_without_data
from nnunet_norm.planning.schedule import Schedule
from nnunet_norm.settings import NormSettings

BACKWARD = 2
"""A backward pass takes twice the operations of a forward: gradients of the weights, and of the input."""


def forward_flops(network: Network) -> int:
    """Floating-point operations of one sample's forward pass, those of convolutions and matrix products, by torch's counter.

    Raises:
        PlansError: the network cannot be run without data.
    """
    module = network.build(torch.device("meta"), deep_supervision=True).eval()
    counter = FlopCounterMode(display=False)
    with running_without_data(network), torch.no_grad(), counter:
        module(torch.empty((1, network.channels, *network.patch), device="meta"))
    return int(counter.get_total_flops())


def epoch_flops(network: Network, processes: int = 1) -> int:
    """Of an epoch with its validation batches, over all processes.

    Micro-batches and activation checkpointing run every forward pass of a training step once more, each.

    Raises:
        PlansError: the network cannot be run without data.
    """
    schedule = Schedule.of(network.resolved)
    settings = NormSettings.from_configuration(network.resolved)
    share = shares(schedule.batch_size, processes)[0]
    again = bool(settings.activation_checkpointing) + ((settings.micro_batch_size or share) < share)
    passes = schedule.samples_per_epoch * (1 + BACKWARD + again)
    passes += schedule.batch_size * schedule.val_iterations_per_epoch
    return passes * forward_flops(network)
