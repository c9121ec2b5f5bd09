"""Activations that are computed again for the gradient instead of kept, stage by stage of a U-Net or UNETR."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.layers.input_normalization import ATTRIBUTE
from nnunet_norm.layers.stepping import repeated


def checkpoint_stages(network: nn.Module) -> int:
    """Have the stages of a U-Net, or the blocks of MONAI's UNETR, recompute their activations in the backward pass, in place.

    Outputs, loss and gradients stay the same, for another forward pass per step; dropout draws the same again. Segments are
    the stem and each stage of the encoder, and each block of a stage of the decoder; of UNETR each block of the transformer,
    and each convolutional one. Kept are their inputs; while the
    gradient of a segment is computed, the maps inside it are there, too. In the backward pass the decoder comes first, when
    all of the network is still kept, so its segments are smaller.

    Only a forward in train mode with gradients is different, and not under ``torch.compile``, whose partitioner decides by
    itself what is computed again. Names, state dict and modules stay. Norms with running statistics must be run inside
    :func:`nnunet_norm.layers.one_step`, or the backward pass refuses.

    Args:
        network: With ``encoder.stages`` and ``decoder.stages``, as nnU-Net's networks have, or with a transformer
            ``vit.blocks`` beside its other blocks; without wrappers.

    Returns:
        The number of segments; calling it again changes nothing.

    Raises:
        ArchitectureError: The network has no such stages.

    References:
        Chen et al. 2016, arXiv:1604.06174.
    """
    segments = _segments(network)
    for segment in segments:
        segment.forward = MethodType(_forward, segment)  # a bound method: a deep copy runs the copy
    return len(segments)


def _segments(network: nn.Module) -> list[nn.Module]:
    transformer = getattr(getattr(network, "vit", None), "blocks", None)
    if isinstance(transformer, nn.ModuleList):
        return [
            *transformer,
            *(block for name, block in network.named_children() if name not in ("vit", "out", ATTRIBUTE)),
        ]
    encoder, decoder = (getattr(network, name, None) for name in ("encoder", "decoder"))
    stages = [getattr(part, "stages", None) for part in (encoder, decoder)]
    if not all(isinstance(part, nn.Sequential | nn.ModuleList) for part in stages):
        raise ArchitectureError(
            f"activation checkpointing needs the stages of a U-Net, encoder.stages and decoder.stages, which "
            f"{type(network).__name__} does not have: leave it out, or take micro-batches"
        )
    stem = getattr(encoder, "stem", None)
    segments = [stem] if isinstance(stem, nn.Module) else []
    segments += [*stages[0]]  # type: ignore[misc]
    for stage in stages[1]:  # type: ignore[union-attr]
        segments += _blocks(stage)
    return segments


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks that a stage runs one after another; the stage itself if it is not made of such."""
    for name in ("convs", "blocks"):
        blocks = getattr(stage, name, None)
        if isinstance(blocks, nn.Sequential):
            return [*blocks]
    return [stage]


def _forward(segment: nn.Module, *inputs: Any) -> Any:
    """Takes the place of the segment's own forward."""
    plain = MethodType(type(segment).forward, segment)
    if not segment.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return plain(*inputs)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Repetition(segment)

    return checkpoint(plain, *inputs, use_reentrant=False, context_fn=contexts)


class _Repetition:
    """``repeated(segment)``, which can be entered again: a graph that is retained is computed again for each use."""

    def __init__(self, segment: nn.Module) -> None:
        self.segment = segment

    def __enter__(self) -> None:
        self.inside = repeated(self.segment)
        self.inside.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self.inside.__exit__(kind, error, traceback)
