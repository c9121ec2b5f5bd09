"""Quantile normalization of whole images, per channel: ``clip((x - q_low) / (q_high - q_low), 0, 1)``.

The image is the one that nnU-Net has preprocessed: cropped, resampled and normalized by its own scheme. Quantiles commute
with whatever is increasing and the same for all voxels, so a z-score changes nothing: what comes out is what the quantiles
of the image before it give. Where nnU-Net's scheme is more than that, it comes first: a CT's intensities are clipped as the
plans say, and voxels outside a mask (``use_mask_for_norm``) are 0 before, and counted in the quantiles.

References:
    Buglakova et al. 2025, arXiv:2503.19545, section 3.2.1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_norm.layers.input_normalization import QUANTILES

logger = logging.getLogger(__name__)

Quantiles = tuple[tuple[float, float], ...]
"""Per channel the values that become 0 and 1."""

TINY = np.finfo(np.float32).tiny
"""What is divided by at least: if the quantiles are equal, only 0 (up to them) and 1 (above) are left."""


def quantiles_of(image: NDArray[np.float32]) -> Quantiles:
    """The quantiles of every channel of an image (C, *spatial), a channel at a time.

    Args:
        image: an array, or anything that gives one where it is sliced.
    """
    found = (np.quantile(np.asarray(image[channel]), QUANTILES) for channel in range(image.shape[0]))
    return tuple((float(low), float(high)) for low, high in found)


def ranks_of(count: int) -> list[int]:
    """The ranks, from 0, of the neighbours of both quantiles among ``count`` values: two of the lower, two of the upper."""
    below = [int(share * (count - 1)) for share in QUANTILES]
    return [min(rank, count - 1) for first in below for rank in (first, first + 1)]


def interpolated(neighbours: NDArray[np.float32], count: int) -> tuple[float, float]:
    """Both quantiles from the values of ``ranks_of(count)``, linearly between neighbours, as ``numpy.quantile`` does it."""
    shares = [share * (count - 1) % 1 for share in QUANTILES]
    pairs = neighbours.astype(np.float64).reshape(2, 2)
    low, high = (float(np.interp(share, (0, 1), pair)) for share, pair in zip(shares, pairs, strict=True))
    return low, high


def normalized(values: NDArray[Any], low: NDArray[Any] | np.float32, high: NDArray[Any] | np.float32) -> NDArray[Any]:
    """``clip((values - low) / (high - low), 0, 1)``, in the precision of the values."""
    with np.errstate(over="ignore"):  # above equal quantiles all is 1
        return np.clip((values - low) / np.maximum(high - low, TINY), 0, 1)


def normalize_image(image: NDArray[np.float32]) -> Quantiles:
    """Normalize an image (C, *spatial) by its quantiles, in place; gives them."""
    quantiles = quantiles_of(image)
    for channel, (low, high) in zip(image, quantiles, strict=True):
        channel[...] = normalized(channel, np.float32(low), np.float32(high))
    return quantiles


def warn_of_constant(name: str, quantiles: Sequence[tuple[float, float]]) -> None:
    """Log one line if a channel has nothing between its quantiles."""
    flat = [number for number, (low, high) in enumerate(quantiles) if np.float32(low) == np.float32(high)]
    if flat:
        logger.warning(constant_warning(name, flat))


def constant_warning(name: str, channels: Sequence[int]) -> str:
    """The line about channels whose quantiles are equal."""
    return (
        f"{name}: channel {', '.join(map(str, channels))} has equal quantiles {QUANTILES[0]} and {QUANTILES[1]}, as a "
        "constant image: what is not above them becomes 0 (input_normalization image_quantile)"
    )
