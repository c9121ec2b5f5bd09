"""How much memory a tile takes in the network, known before the network has seen any.

The network's own ``forward`` is run on tensors without data. Storages are followed from their making to their end, so that
the peak is that of what really lives at a time, whatever the wiring. A convolution on the CPU works on copies of its input
and output in a layout of its own, which are counted where it runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_norm.living import Living
from nnunet_norm.receptive_field.trace import first_output

CHANNELS_PER_GROUP = 16
"""Channels are rounded up to multiples of this in the layout that convolutions on the CPU work in."""

_CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError)
"""What networks and torch raise about an extent that they cannot take; there is no class for it."""


@dataclass(frozen=True)
class TileMemory:
    """What one forward pass of a tile takes.

    Attributes:
        peak_bytes: of all tensors that live at the same time, with the tile itself and what a convolution needs to work.
        input_bytes: of the tile.
        output_bytes: of the logits.
        largest_numbers: numbers in the largest tensor.
        classes: channels of the output.
    """

    peak_bytes: int
    input_bytes: int
    output_bytes: int
    largest_numbers: int
    classes: int


def tile_memory(network: nn.Module, tile: Sequence[int], channels: int, dtype: torch.dtype) -> TileMemory | str:
    """The memory of a forward pass in inference mode, or why the network cannot take the tile.

    Args:
        network: in eval mode, without wrappers; on any device.
        tile: spatial extents.
        channels: of the image.
        dtype: of the network's weights.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    living = _LivingInPass(on_cpu=device.type == "cpu")
    try:
        twin = _twin(network)
        with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True), living:
            batch = torch.empty((1, channels, *tile), dtype=dtype, device=device)
            output = first_output(twin(batch))
            if tuple(output.shape[2:]) != tuple(tile):
                return f"it turns {tuple(tile)} into {tuple(output.shape[2:])}"
            input_bytes, output_bytes = (tensor.nelement() * tensor.itemsize for tensor in (batch, output))
            return TileMemory(living.peak, input_bytes, output_bytes, living.largest, output.shape[1])
    except REFUSALS as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def _twin(network: nn.Module) -> nn.Module:
    """The network with the same parameters and buffers: what its ``forward`` keeps for later would be without data."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


class _LivingInPass(Living):
    """With what convolutions on a CPU take for their inputs and outputs in groups of channels."""

    def __init__(self, *, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu

    def at_work(self, func: Any, args: tuple[Any, ...], output: Any) -> int:
        """See ``Living``."""
        if self._on_cpu and func.__name__.split(".")[0] in _CONVOLUTIONS:
            return _in_groups(args[0]) + _in_groups(output)
        return 0


def _in_groups(tensor: Tensor) -> int:
    """Bytes of (N, C, *spatial) with as many channels as whole groups have."""
    channels = -(-tensor.shape[1] // CHANNELS_PER_GROUP) * CHANNELS_PER_GROUP
    return int(tensor.shape[0] * channels * math.prod(tensor.shape[2:]) * tensor.itemsize)
