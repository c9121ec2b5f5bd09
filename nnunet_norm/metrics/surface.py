"""Metrics of surfaces: how far two segmentations of one class are apart, in mm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import find_objects
from torch import Tensor

_VOXELS_AT_ONCE = 2**22
"""Voxels whose surface is sought at a time: there are some ten numbers for each of them."""


def normalized_surface_dice(
    a: ArrayLike, b: ArrayLike, spacing: Sequence[float], tolerance: float, ignored: ArrayLike | None = None
) -> float:
    r"""The share of both surfaces that lies within a tolerance of the other one.

    .. math:: NSD = \frac{|S_a \cap B_b^\tau| + |S_b \cap B_a^\tau|}{|S_a| + |S_b|}

    The surface lies between voxels: there is an element of it wherever the 2 x 2 (x 2) neighbours are not all alike, of the
    length or area, in mm or mm2, that marching squares (cubes) give it. Beyond the border of the image there is background,
    so masks that touch it are closed there. Computed by MONAI, in DeepMind's way. Symmetric in ``a`` and ``b``.

    Args:
        a: mask (*spatial) of one class. Axes of extent 1 are left out, down to two: a slice has an outline, and no faces.
        b: mask of the same shape.
        spacing: of the voxels, in mm, per axis.
        tolerance: in mm; a distance equal to it is within.
        ignored: mask (*spatial) of voxels of which nothing is known; what touches one does not count as surface.

    Returns:
        NaN where neither has a surface (nothing to measure), 0 where only one has.

    References:
        Nikolov et al. 2018, arXiv:1809.04430; https://github.com/google-deepmind/surface-distance.
    """
    surfaces = _Surfaces.between_voxels(a, b, spacing, ignored)
    sizes = surfaces.sizes[0].sum(), surfaces.sizes[1].sum()
    if not all(sizes):
        return 0.0 if any(sizes) else float("nan")
    within = sum(
        size[distance <= tolerance].sum() for size, distance in zip(surfaces.sizes, surfaces.distances(), strict=True)
    )
    return float(within / sum(sizes))


def hausdorff_distance_95(
    a: ArrayLike, b: ArrayLike, spacing: Sequence[float], ignored: ArrayLike | None = None
) -> float:
    """The distance within which 95 % of each surface's voxels have one of the other's, in mm.

    The larger of the two percentiles, from ``a`` to ``b`` and from ``b`` to ``a``. A surface's voxels are those of the mask
    with a neighbour, across a face, outside of it, as MONAI has them for its Hausdorff distance.

    Args:
        a: mask (*spatial) of one class, as for :func:`normalized_surface_dice`.
        b: mask of the same shape.
        spacing: of the voxels, in mm, per axis.
        ignored: mask (*spatial) of voxels of which nothing is known; what touches one does not count as surface.

    Returns:
        NaN where one of them or both have no surface: there is no distance to what is not there, and any number would be
        made up. A mean that leaves NaN out is kind to a method that misses a class; count the cases that it misses.
    """
    surfaces = _Surfaces.of_voxels(a, b, spacing, ignored)
    if not all(edges.any() for edges in surfaces.edges):
        return float("nan")
    return max(float(np.quantile(distance, 0.95)) for distance in surfaces.distances())


@dataclass(frozen=True)
class _Surfaces:
    """The elements of two surfaces on one grid: where they are, and their lengths or areas (1 for voxels)."""

    edges: tuple[Tensor, Tensor]
    sizes: tuple[NDArray[np.float64], NDArray[np.float64]]
    spacing: tuple[float, ...]

    @classmethod
    def between_voxels(
        cls, a: ArrayLike, b: ArrayLike, spacing: Sequence[float], ignored: ArrayLike | None
    ) -> _Surfaces:
        """Elements where 2 x 2 (x 2) neighbours differ."""
        (first, second, unknown), spacing = _cropped(a, b, spacing, ignored)
        planes = max(1, _VOXELS_AT_ONCE // first[0].numel())
        edges: tuple[list[Tensor], list[Tensor]] = ([], [])
        sizes: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, len(first) - 1, planes):
            slab = slice(start, start + planes + 1)
            edge_a, edge_b, area_a, area_b = _mask_edges(first[slab], second[slab], spacing)
            known = ~_near(unknown[slab], 2)
            for which, (edge, area) in enumerate(((edge_a & known, area_a), (edge_b & known, area_b))):
                edges[which].append(edge)
                sizes[which].append(area[edge].double())
        edge_a, edge_b = (torch.cat(parts) for parts in edges)
        size_a, size_b = (torch.cat(parts).numpy() for parts in sizes)
        return cls((edge_a, edge_b), (size_a, size_b), spacing)

    @classmethod
    def of_voxels(cls, a: ArrayLike, b: ArrayLike, spacing: Sequence[float], ignored: ArrayLike | None) -> _Surfaces:
        """Voxels of the masks that touch the outside."""
        (first, second, unknown), spacing = _cropped(a, b, spacing, ignored)
        known = ~_near(unknown, 3)
        edge_a, edge_b = (edge & known for edge in _mask_edges(first, second))
        size_a, size_b = (np.ones(int(edge.sum())) for edge in (edge_a, edge_b))
        return cls((edge_a, edge_b), (size_a, size_b), spacing)

    def distances(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of every element of each surface, the distance to the nearest of the other's; neither is empty."""
        from monai.metrics.utils import get_surface_distance  # takes seconds: imported where it is needed

        a, b = self.edges
        to_b, to_a = (np.asarray(get_surface_distance(*two, spacing=self.spacing)) for two in ((a, b), (b, a)))
        return to_b, to_a


def _mask_edges(a: Tensor, b: Tensor, spacing: tuple[float, ...] | None = None) -> tuple[Tensor, ...]:
    """MONAI's edges of both masks: with a spacing those between voxels, and their areas; without, voxels."""
    from monai.metrics.utils import get_mask_edges

    return tuple(get_mask_edges(a, b, crop=False, spacing=spacing))


def _cropped(
    a: ArrayLike, b: ArrayLike, spacing: Sequence[float], ignored: ArrayLike | None
) -> tuple[list[Tensor], tuple[float, ...]]:
    """Both masks and the ignored voxels around what is in either mask, in background; the spacing of the axes left."""
    masks = [np.asarray(mask, dtype=bool) for mask in (a, b)]
    shape = masks[0].shape
    masks.append(np.zeros(shape, dtype=bool) if ignored is None else np.asarray(ignored, dtype=bool))
    if any(mask.shape != shape for mask in masks) or len(spacing) != len(shape) or len(shape) not in (2, 3):
        shapes = ", ".join(str(mask.shape) for mask in masks)
        raise ValueError(
            f"masks of shapes {shapes}, spacing of {len(spacing)} axes: all must have the same 2 or 3 axes"
        )
    flat = tuple([axis for axis, extent in enumerate(shape) if extent == 1][: len(shape) - 2])
    kept = tuple(float(step) for axis, step in enumerate(spacing) if axis not in flat)
    masks = [mask.squeeze(flat) for mask in masks]
    found = find_objects((masks[0] | masks[1]).view(np.uint8))
    inside = found[0] if found else (slice(0, 1),) * len(kept)
    box = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in inside)
    return [torch.from_numpy(np.pad(mask[box], 1)) for mask in masks], kept


def _near(unknown: Tensor, window: int) -> Tensor:
    """Where a window has an unknown voxel: of 2, around the corners between voxels; of 3, around the voxels."""
    if not unknown.any():  # nearly always; the maps below take memory
        return torch.zeros([extent - (3 - window) for extent in unknown.shape], dtype=torch.bool)
    pool = torch.nn.functional.max_pool3d if unknown.dim() == 3 else torch.nn.functional.max_pool2d
    return pool(unknown[None, None].float(), window, stride=1, padding=(window - 1) // 2)[0, 0] > 0
