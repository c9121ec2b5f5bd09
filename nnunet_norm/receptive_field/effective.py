"""The effective receptive field: how far the gradient of real outputs really extends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import curve_fit
from torch import nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.receptive_field.trace import eval_mode, first_output, trace_at, unwrapped

_PHASES = 4  # output voxels per input, spread over one total stride
_SIGMAS = 3.0  # Buglakova et al. 2025: the halo is three standard deviations of the fitted Gaussian

Profile = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Offsets from the output voxel and the mean absolute gradient there."""


@dataclass(frozen=True)
class EffectiveField:
    """How far the gradient of real outputs extends.

    Attributes:
        halo: (before, after) per spatial axis, in voxels; see ``effective``.
        gradient: mean absolute gradient of an output voxel with respect to the input, over the offset from the output
            voxel: ``(*spatial)``, summed over channels, averaged over tiles and phases. Only offsets that every output voxel
            could see.
        origin: index of offset 0 in ``gradient``.
        num_gradients: how many gradients were averaged.
    """

    halo: tuple[tuple[int, int], ...]
    gradient: NDArray[np.float64]
    origin: tuple[int, ...]
    num_gradients: int


def effective(network: nn.Module, inputs: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Halo (before, after) per spatial axis, in voxels, from the effective receptive field of a trained network.

    The gradient of output voxels in the middle of every tile with respect to the tile is taken in eval mode; its
    absolute value, summed over channels and the other axes and averaged over the tiles and over voxels of different
    phase within one total stride, is a profile per axis. A Gaussian ``a exp(-(x - m)^2 / 2 sigma^2)`` is fitted to it by
    least squares. Its 3-sigma interval, seen from the output voxel, reaches ``ceil(3 sigma - m)`` before and
    ``ceil(3 sigma + m)`` after it. The centre m is 0 for symmetric networks; strided convolutions move it.

    The output channels are combined with random weights drawn once (normal, fixed seed): summed with equal weights they
    would cancel, because a softmax does not see what all logits have in common.

    Parameters, their gradients and flags, buffers and training flags are left as they were.

    Args:
        network: any module that ``trace`` accepts.
        inputs: real tiles, preprocessed as for prediction, shape ``(N, C, *spatial)``; moved to the network's device
            and precision one by one. They should be larger than the field that is measured: what lies outside is not
            seen.

    Raises:
        ArchitectureError: the gradient vanishes or is not finite, or no Gaussian can be fitted to it.

    References:
        Buglakova et al. 2025, section 3.1; Luo et al. 2016, arXiv:1701.04128 (effective receptive field).
    """
    return measure_effective(network, inputs).halo


def measure_effective(
    network: nn.Module, inputs: torch.Tensor, *, stride: Sequence[int] | None = None
) -> EffectiveField:
    """The effective receptive field, with the map of the mean absolute gradient that it is fitted to.

    Args:
        network: see ``effective``.
        inputs: see ``effective``.
        stride: total stride per axis; None: traced. For a network that cannot be traced at any extent.

    Raises:
        ArchitectureError: see ``effective``.

    References:
        Buglakova et al. 2025, figure 4 (the map).
    """
    network = unwrapped(network)
    kind = type(network).__name__
    if inputs.ndim < 3 or inputs.shape[0] == 0:
        raise ArchitectureError(
            f"inputs of shape {tuple(inputs.shape)} are no tiles: give (N, C, *spatial) with N >= 1"
        )
    stride = trace_at(network, inputs.shape[2:], inputs.shape[1]).stride if stride is None else stride
    voxels = _central_voxels(inputs.shape[2:], stride)
    profiles, total = _profiles(network, kind, inputs, voxels)
    return EffectiveField(
        halo=tuple(_halo(kind, axis, profile) for axis, profile in enumerate(profiles)),
        gradient=total / (len(inputs) * len(voxels)),
        origin=tuple(-int(offsets[0]) for offsets, _ in profiles),
        num_gradients=len(inputs) * len(voxels),
    )


def _profiles(
    network: nn.Module, kind: str, inputs: torch.Tensor, voxels: Sequence[tuple[int, ...]]
) -> tuple[list[Profile], NDArray[np.float64]]:
    """Absolute gradients over the offset from the output voxel: a profile per axis, and the map, summed over all."""
    extent = inputs.shape[2:]
    sums = [np.zeros(2 * n + 1) for n in extent]  # index n is offset 0
    firsts, lasts = zip(
        *(
            (max(-p for p in at), min(n - 1 - p for p in at))
            for at, n in zip(zip(*voxels, strict=True), extent, strict=True)
        ),
        strict=True,
    )
    total = np.zeros([last - first + 1 for first, last in zip(firsts, lasts, strict=True)])
    with eval_mode(network), torch.inference_mode(False), torch.enable_grad():
        for tile in inputs:
            for voxel, gradient in zip(voxels, _gradients(network, tile[None], voxels), strict=True):
                if not torch.isfinite(gradient).all():
                    raise ArchitectureError(f"the gradient of {kind} is not finite for an input of {tuple(extent)}")
                shared = [slice(p + a, p + b + 1) for p, a, b in zip(voxel, firsts, lasts, strict=True)]
                total += gradient[tuple(shared)].numpy()
                for axis, n in enumerate(extent):
                    others = [d for d in range(gradient.ndim) if d != axis]
                    marginal = gradient.sum(others) if others else gradient
                    sums[axis][n - voxel[axis] : 2 * n - voxel[axis]] += marginal.numpy()
    if not sums[0].any():
        raise ArchitectureError(
            f"the gradient of {kind} vanishes in the middle of all {len(inputs)} inputs of {tuple(extent)}: "
            "give real tiles and a trained network"
        )
    profiles = [  # only offsets that every voxel could see
        (np.arange(first, last + 1), values[n + first : n + last + 1])
        for n, first, last, values in zip(extent, firsts, lasts, sums, strict=True)
    ]
    return profiles, total


def _central_voxels(extent: Sequence[int], stride: Sequence[int]) -> list[tuple[int, ...]]:
    """Voxels of the block of one total stride in the middle, of evenly spread phases."""
    count = min(_PHASES, max(stride))
    starts = [max(0, (n - s) // 2) // s * s for n, s in zip(extent, stride, strict=True)]
    return [
        tuple(min(a + (2 * k + 1) * s // (2 * count), n - 1) for a, s, n in zip(starts, stride, extent, strict=True))
        for k in range(count)
    ]


def _gradients(network: nn.Module, tile: torch.Tensor, voxels: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Absolute gradient of each output voxel with respect to the tile, summed over input channels, in float64."""
    weight = next((p for p in network.parameters() if p.is_floating_point()), tile)
    tile = tile.detach().to(weight.device, weight.dtype, copy=True).requires_grad_()
    output = first_output(network(tile))
    if not output.requires_grad:
        raise ArchitectureError(f"the output of {type(network).__name__} has no gradient with respect to its input")
    mix = torch.randn(output.shape[1], generator=torch.Generator().manual_seed(0)).to(output)
    gradients = []
    for number, voxel in enumerate(voxels):
        index: tuple[int | slice, ...] = (0, slice(None), *voxel)
        value = (output[index] * mix).sum()
        (gradient,) = torch.autograd.grad(value, tile, retain_graph=number + 1 < len(voxels))
        gradients.append(gradient[0].abs().cpu().double().sum(0))
    return gradients


def _halo(kind: str, axis: int, profile: Profile) -> tuple[int, int]:
    """(before, after) from the Gaussian fitted to one axis's profile."""
    offsets, values = profile
    support = offsets[values > 0]
    if len(support) <= 1:  # nothing to fit: a network of 1-wide kernels on this axis
        place = int(support[0]) if len(support) else 0
        return max(0, -place), max(0, place)
    values = values / values.max()
    centre = float((offsets * values).sum() / values.sum())
    spread = math.sqrt(float(((offsets - centre) ** 2 * values).sum() / values.sum()))
    try:
        (_, centre, sigma), _ = curve_fit(
            _gaussian,
            offsets,
            values,
            p0=(1.0, centre, spread),
            bounds=([0, offsets[0], 1e-3], [np.inf, offsets[-1], np.inf]),
        )
    except RuntimeError as error:  # the only one that curve_fit raises: it did not converge
        message = (
            f"no Gaussian can be fitted to the gradient of {kind} along axis {axis} (standard deviation {spread:.1f})"
        )
        raise ArchitectureError(message) from error
    return _voxels(_SIGMAS * sigma - centre), _voxels(_SIGMAS * sigma + centre)


def _gaussian(x: NDArray[np.float64], height: float, centre: float, sigma: float) -> NDArray[np.float64]:
    return height * np.exp(-((x - centre) ** 2) / (2 * sigma**2))


def _voxels(length: float) -> int:
    """The length rounded up to whole voxels, rounding errors apart; never negative."""
    return max(0, math.ceil(length - 1e-6))
