"""The operations of a training, against a count of its convolutions one by one."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nnunet_norm.planning import derive_plans
from nnunet_norm.planning.memory import Network
from nnunet_norm.planning.work import epoch_flops, forward_flops

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}


def network_with(**options):
    plans = json.loads((STOCK / "nnUNetPlans.json").read_text())
    derived = derive_plans(plans, "2d", patch_size=[128, 128], base_features=4, num_stages=5, **options)
    return Network.of(derived, "2d", DATASET)


def by_hand(network):
    """Two operations for each product of a convolution; that of a transposed one belongs to a voxel of its input."""
    counts = []

    def count(module, inputs, output):
        of_a_voxel = 2 * module.weight.numel()
        voxels = (inputs[0] if isinstance(module, nn.ConvTranspose2d) else output)[0, 0].numel()
        counts.append(of_a_voxel * voxels)

    module = network.build(torch.device("cpu"), deep_supervision=True)
    for part in {id(part): part for part in module.modules()}.values():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            part.register_forward_hook(count)
    module(torch.zeros(1, network.channels, *network.patch))
    return sum(counts)


@pytest.mark.parametrize(
    ("options", "processes", "passes"),
    [
        ({}, 1, 3),
        ({"micro_batch_size": 2}, 1, 4),
        ({"micro_batch_size": 2}, 4, 3),
        ({"activation_checkpointing": True}, 1, 4),
        ({"activation_checkpointing": True, "micro_batch_size": 2}, 1, 5),
    ],
)
def test_an_epoch_is_its_passes(options, processes, passes):
    """Enforces three passes a step, one more for each way in which activations are computed again, and one in validation."""
    network = network_with(batch_size=8, iterations_per_epoch=5, val_iterations_per_epoch=3, **options)
    one = forward_flops(network)
    assert math.isclose(one, by_hand(network), rel_tol=1e-12)
    assert epoch_flops(network, processes) == one * 8 * (5 * passes + 3)
