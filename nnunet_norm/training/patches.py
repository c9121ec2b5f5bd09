"""Patches of preprocessed images around what is there to segment, and whole batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def foreground_of(logits: Tensor, *, regions: bool) -> Tensor:
    """Where logits (K, *spatial) predict any class or region: a mask (*spatial)."""
    return (logits > 0 if regions else logits[1:] > logits[:1]).any(0)


def foreground_patches(image: Tensor, foreground: Tensor, count: int, size: Sequence[int]) -> list[Tensor]:
    """Patches of one image, around foreground voxels that are spread over it; around any voxels if there are none.

    Args:
        image: preprocessed, (C, x, y, z).
        foreground: mask (x, y, z).
        count: how many patches.
        size: of a patch; one of two axes is taken from a slice.

    Returns:
        Patches (C, *size) on the CPU, zero where the image is smaller.
    """
    voxels = foreground.flatten().nonzero().flatten()
    places = len(voxels) or foreground.numel()
    chosen = [(2 * k + 1) * places // (2 * count) for k in range(count)]
    flat = voxels[chosen].tolist() if len(voxels) else chosen
    middles = zip(*np.unravel_index(flat, tuple(foreground.shape)), strict=True)
    return [_patch(image, [int(m) for m in middle], size) for middle in middles]


def whole_batches(of_cases: Sequence[Sequence[Tensor]], batch_size: int, at_most: int) -> Iterator[Tensor]:
    """Batches (N, C, *size) of patches of as many cases as there are; a smaller one only if they fill none.

    Args:
        of_cases: per case its patches.
        batch_size: patches in a batch.
        at_most: how many batches.
    """
    rounds = itertools.zip_longest(*of_cases)
    patches = [patch for patch in itertools.chain.from_iterable(rounds) if patch is not None]
    for number in range(min(max(len(patches) // batch_size, 1), at_most)):
        batch = patches[number * batch_size : (number + 1) * batch_size]
        if batch:
            yield torch.stack(batch)


def _patch(image: Tensor, middle: Sequence[int], size: Sequence[int]) -> Tensor:
    """The patch of ``image`` around a voxel, of a slice of it for a 2d patch; zeros where the image is smaller."""
    if len(size) == 2:
        image, middle = image[:, middle[0]], middle[1:]
    starts = [max(min(m - p // 2, n - p), 0) for m, p, n in zip(middle, size, image.shape[1:], strict=True)]
    patch = image[(slice(None), *[slice(s, s + p) for s, p in zip(starts, size, strict=True)])]
    missing = [p - n for p, n in zip(size, patch.shape[1:], strict=True)]
    return torch.nn.functional.pad(patch, [w for m in reversed(missing) for w in (m // 2, m - m // 2)]).cpu()
