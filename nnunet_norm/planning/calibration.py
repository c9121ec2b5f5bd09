"""The memory of a training step, measured where a GPU is: see :func:`measured_memory`."""

import dataclasses
import logging

import torch

from nnunet_norm.layers import one_step
from nnunet_norm.planning.memory import CONTEXT, GIGABYTE, Network, StepMemory, as_outputs, default_loss

LOGGER = logging.getLogger(__name__)

MEASURED_SAMPLES = (1, 2)
"""Samples of the two steps that are measured; their difference is what each further sample takes."""


def measured_memory(
    network: Network, estimate: StepMemory, device: torch.device, *, checkpointed: bool = False
) -> StepMemory:
    """The estimate with its share of the network measured on a GPU, by real steps of this network on noise.

    Forward in half precision, nnU-Net's default loss, backward, and an optimizer step, with one sample and
    with two. Where too little of the GPU is free for that, the estimate stays as it is, and a line says so: whoever else
    uses the GPU is to keep what they have.

    Args:
        network: see :meth:`Network.of`.
        estimate: of the same network and checkpointing; what waits in micro-batches is kept from it.
        device: a GPU.
        checkpointed: whether activations are computed again instead of kept.
    """
    free, _ = torch.cuda.mem_get_info(device)
    try:
        if estimate.gigabytes(MEASURED_SAMPLES[-1], MEASURED_SAMPLES[-1]) * GIGABYTE > free:
            raise torch.cuda.OutOfMemoryError
        few, many = (_peak_of_a_step(network, samples, device, checkpointed) for samples in MEASURED_SAMPLES)
    except torch.cuda.OutOfMemoryError:
        LOGGER.warning(
            "%s: memory is not measured: %s has too little free for steps of %d samples; the estimate stays",
            network.name,
            torch.cuda.get_device_name(device),
            MEASURED_SAMPLES[-1],
        )
        return estimate
    finally:
        torch.cuda.empty_cache()
    sample = (many - few) / (MEASURED_SAMPLES[1] - MEASURED_SAMPLES[0]) / GIGABYTE
    # What torch allocates is all but CUDA's context.
    fixed = max(0.0, few / GIGABYTE - sample * MEASURED_SAMPLES[0]) + CONTEXT
    source = f"measured on {torch.cuda.get_device_name(device)}"
    return dataclasses.replace(estimate, fixed=fixed, sample=sample, source=source, planned=0.0)


def _peak_of_a_step(network: Network, samples: int, device: torch.device, checkpointed: bool) -> int:
    """Most bytes that torch had allocated at a time in a second step, when the optimizer has its momentum."""
    module = network.build(device, deep_supervision=True, checkpointed=checkpointed)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(module.parameters(), lr=1e-6)
        if network.unetr
        else torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.99, nesterov=True)
    )
    image = torch.randn((samples, network.channels, *network.patch), device=device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        optimizer.zero_grad(set_to_none=True)
        with one_step(module):
            with torch.autocast(device.type, enabled=device.type == "cuda"):
                outputs = as_outputs(module(image))
                loss = default_loss(outputs, network.regions)
            loss.backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated(device)
