"""What a network does with its input before its first layer: normalize tiles by their quantiles, or expect images that are.

``clip((x - q_low) / (q_high - q_low), 0, 1)`` per sample and channel, with the quantiles :data:`QUANTILES`.

References:
    Buglakova et al. 2025, arXiv:2503.19545, section 3.2.1 (the two strategies, and the quantiles).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_norm.errors import InputImageError

QUANTILES = (0.01, 0.98)
"""What becomes 0 and 1 (Buglakova et al. 2025, section 3.2.1)."""

IMAGE, TILE = "image_quantile", "tile_quantile"
INPUT_NORMALIZATIONS = (IMAGE, TILE)
"""Whose quantiles normalize: those of the whole image, or those of every tile by itself."""

ATTRIBUTE = "input_normalization"
"""Of the network, where its :class:`InputNormalization` is found."""


TILE_WARNING = (
    "input_normalization tile_quantile: every tile is normalized by its own quantiles, which differ between neighbours, so "
    "predictions have seams whatever the norm; it is there for comparison, image_quantile has none"
)
"""Said once in training and in prediction."""


@torch.library.custom_op("nnunet_norm::tile_quantiles", mutates_args=())
def tile_quantiles(tiles: Tensor) -> Tensor:
    """The quantiles of every sample and channel of tiles (N, C, *spatial): (2, N, C), in float32 or better.

    Exact, interpolated linearly between neighbours as NumPy does it. One operator for whoever follows or compiles the
    network: sorting has no fixed reach, and ``torch.quantile`` takes 2^24 values at most.
    """
    values = tiles.flatten(2).to(_precise(tiles.dtype)).sort(-1).values
    return torch.stack([_interpolated(values, share) for share in QUANTILES])


@tile_quantiles.register_fake
def _(tiles: Tensor) -> Tensor:
    return tiles.new_empty((len(QUANTILES), *tiles.shape[:2]), dtype=_precise(tiles.dtype))


def _interpolated(ordered: Tensor, share: float) -> Tensor:
    place = share * (ordered.shape[-1] - 1)
    below = math.floor(place)
    lower, upper = (ordered[..., min(rank, ordered.shape[-1] - 1)] for rank in (below, below + 1))
    return lower + (upper - lower) * (place - below)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class InputNormalization(nn.Module):
    """What the network it belongs to does with its input; without parameters and buffers, so weights keep their keys.

    * ``tile_quantile``: every tile is normalized by its own quantiles, in training and in inference. They are taken as
      constants: no gradient flows through them.
    * ``image_quantile``: whoever runs the network has normalized the whole image before. Until that is confirmed
      (``is_normalized``), the network refuses to run, so that nnU-Net's own predictor cannot feed it z-scores.

    Args:
        kind: One of :data:`INPUT_NORMALIZATIONS`.
        channels: Of the image; further ones, a cascade's previous segmentation, are left as they are.

    Attributes:
        is_normalized: Whether what runs the network normalizes whole images.
    """

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        assert kind in INPUT_NORMALIZATIONS, kind
        self.kind, self.channels = kind, channels
        self.is_normalized = False

    def extra_repr(self) -> str:
        """Kind and channels."""
        return f"{self.kind}, channels={self.channels}"

    def forward(self, x: Tensor) -> Tensor:
        """``x``: a network that is a ``Sequential`` runs whatever it contains."""
        return x

    def normalize(self, tiles: Tensor) -> Tensor:
        """The input (N, C, *spatial) as the network's first layer takes it.

        Raises:
            InputImageError: Whole images should have been normalized, and nobody has said that they are.
        """
        if self.kind == IMAGE:
            if not self.is_normalized:
                raise InputImageError(
                    "input_normalization image_quantile: this network was trained on images normalized by their quantiles, "
                    "which nnU-Net's own predictor does not do: predict with nnunet-norm predict"
                )
            return tiles
        images, others = tiles[:, : self.channels], tiles[:, self.channels :]
        low, high = tile_quantiles(images.detach()).reshape((2, *images.shape[:2]) + (1,) * (tiles.ndim - 2)).unbind()
        scale = (high - low).clamp_min(torch.finfo(low.dtype).tiny)
        normalized = ((images - low) / scale).clamp(0, 1).to(tiles.dtype)
        return torch.cat([normalized, others], 1) if others.shape[1] else normalized


def set_input_normalization(network: nn.Module, kind: str, channels: int) -> None:
    """Give a network an input normalization, see :class:`InputNormalization`."""
    setattr(network, ATTRIBUTE, InputNormalization(kind, channels))
    network.register_forward_pre_hook(_normalize_input)


def get_input_normalization(network: nn.Module) -> InputNormalization | None:
    """The input normalization of a network without wrappers; None if it takes its input as it comes."""
    found = getattr(network, ATTRIBUTE, None)
    return found if isinstance(found, InputNormalization) else None


def confirm_normalized_images(network: nn.Module) -> None:
    """Say that whoever runs ``network`` normalizes whole images, if it wants that."""
    found = get_input_normalization(network)
    if found is not None:
        found.is_normalized = True


@contextmanager
def any_input(network: nn.Module) -> Iterator[None]:
    """Inside, ``network`` runs on whatever it is given: for those who look at how it computes, and not at what."""
    found = get_input_normalization(network)
    if found is None:
        yield
        return
    before, found.is_normalized = found.is_normalized, True
    try:
        yield
    finally:
        found.is_normalized = before


def _normalize_input(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    tiles, *rest = inputs
    return (network.input_normalization.normalize(tiles), *rest)  # type: ignore[operator, union-attr]
