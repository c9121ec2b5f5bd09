"""Logits resampled to the image's spacing box by box, equal to what nnU-Net's export makes of them in one piece.

nnU-Net's ``resample_data_or_seg_to_shape`` resamples K x volume at once. Its linear interpolation reads two voxels per axis,
so a box of the input, with one voxel more after it, has all that the output voxels within it depend on. The arithmetic is
that of ``scipy.ndimage``, to the order of the summation: float64, at output voxel k the coordinate
``(k + 0.5) * n_in / n_out - 0.5``, products and sums with the last axis fastest, and then float32. (On processors whose
compilers fuse multiplication and addition, as on ARM, scipy's own last bit may be another.)

References:
    Isensee et al. 2021, doi 10.1038/s41592-020-01008-z (nnU-Net; its supplement on resampling and anisotropy).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_norm.errors import TilingError
from nnunet_norm.stages.regions import blocks, slices
from nnunet_norm.tiling import Box, relative

SLAB_BYTES = 2**20
"""Output of one channel that a thread works on at a time; its float64 operands take about eight times that."""

CHUNK = 2**16
"""Voxels that are summed up at a time: three arrays of so many float64 lie in a core's cache."""


@dataclass(frozen=True)
class _Axis:
    """Which input voxels the output voxels of one axis read.

    Attributes:
        lower: per output voxel the first input voxel that it reads. Ascending.
        upper: the second; the same array as ``lower`` where only one is read.
        weights: of the two, or None where one is read.
    """

    lower: NDArray[np.intp]
    upper: NDArray[np.intp]
    weights: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @classmethod
    def unchanged(cls, n: int) -> _Axis:
        """Every output voxel is its input voxel."""
        here = np.arange(n)
        return cls(here, here)

    @classmethod
    def nearest(cls, n_in: int, n_out: int) -> _Axis:
        """Order 0: the nearest voxel, halves upwards."""
        here = np.clip(np.floor(_coordinates(n_in, n_out) + 0.5).astype(np.intp), 0, n_in - 1)
        return cls(here, here)

    @classmethod
    def linear(cls, n_in: int, n_out: int) -> _Axis:
        """Order 1. Beyond the ends scipy reads the end voxel twice, with weights that may not add up to 1 in the last bit."""
        at = _coordinates(n_in, n_out)
        floor = np.floor(at)
        first = 1.0 - (at - floor)
        lower = floor.astype(np.intp)
        return cls(np.clip(lower, 0, n_in - 1), np.clip(lower + 1, 0, n_in - 1), (first, 1.0 - first))


@dataclass(frozen=True)
class BoxResampler:
    """Resampling of logits (K, x, y, z) that can be asked for any box of the result.

    All axes are in the order of the plans' ``transpose_forward``, as nnU-Net's logits are.

    Attributes:
        in_shape: spatial shape of the logits, the preprocessed image's.
        out_shape: spatial shape of the result, the cropped image's before it was resampled.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[_Axis, ...]

    @property
    def overlap(self) -> tuple[int, ...]:
        """Per axis the voxels, 0 or 1, that must come with a core box beyond its end; none beyond the image's end."""
        return tuple(int(axis.weights is not None) for axis in self.axes)

    def out_box(self, core: Box) -> Box:
        """The output voxels that belong to a box of the input: the first voxel that they read lies in it.

        The output boxes of any boxes that divide the input divide the output. Some may be empty.

        Args:
            core: a box of the input.
        """
        edges = (np.searchsorted(a.lower, (s.start, s.stop)) for a, s in zip(self.axes, core, strict=True))
        return tuple(slice(int(start), int(stop)) for start, stop in edges)

    def in_box(self, out: Box) -> Box:
        """The input voxels that a box of the output, which is not empty, depends on."""
        return tuple(
            slice(int(a.lower[s.start]), int(a.upper[s.stop - 1]) + 1) for a, s in zip(self.axes, out, strict=True)
        )

    def __call__(self, logits: torch.Tensor | NDArray[Any], region: Box, out: Box) -> NDArray[np.float32]:
        """The result in one box.

        Uses ``torch.get_num_threads()`` threads. What it needs beside the result is about 10 MB for each.

        Args:
            logits: (K, *region), finite; taken as float32, whatever they are.
            region: the box of the input that ``logits`` cover; at least ``in_box(out)``.
            out: the box of the output that is wanted.

        Returns:
            (K, *out), contiguous: what nnU-Net's function gives there for the whole float32 logits.

        Raises:
            TilingError: ``logits`` have not the shape of ``region``, or do not reach as far as ``out`` needs.
        """
        values = as_array(logits)
        extent = tuple(s.stop - s.start for s in region)
        if values.shape[1:] != extent:
            raise TilingError(
                f"logits of shape {values.shape} do not cover a region of {extent}: give (channels, *region)"
            )
        result = np.empty((len(values), *(s.stop - s.start for s in out)), dtype=np.float32)
        if not result.size:
            return result
        needed = self.in_box(out)
        if any(n.start < r.start or n.stop > r.stop for n, r in zip(needed, region, strict=True)):
            raise TilingError(
                f"output {_text(out)} depends on logits of {_text(needed)}, but those of {_text(region)} were given: "
                f"give the core box with an overlap of {self.overlap}"
            )
        tasks = list(itertools.product(range(len(values)), sub_boxes(out, 1, SLAB_BYTES)))

        def work(task: tuple[int, Box]) -> None:
            channel, part = task
            self._channel(values[channel], region, part, result[channel][relative(part, out)])

        threads = min(torch.get_num_threads(), len(tasks))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, tasks))
        else:
            for task in tasks:
                work(task)
        return result

    def _channel(self, values: NDArray[Any], region: Box, out: Box, result: NDArray[np.float32]) -> None:
        """Write one channel's box of the output into ``result``.

        Where one voxel is read (order 0), every distinct one is computed once and then repeated.
        """
        needed = self.in_box(out)
        block = values[relative(needed, region)].astype(np.float32, copy=False)
        linear: dict[int, list[tuple[NDArray[np.intp], NDArray[np.float64]]]] = {}
        repeated: dict[int, NDArray[np.intp]] = {}
        for number, (axis, there, here) in enumerate(zip(self.axes, out, needed, strict=True)):
            if axis.weights is not None:
                read = (axis.lower[there] - here.start, axis.upper[there] - here.start)
                linear[number] = [(i, w[there]) for i, w in zip(read, axis.weights, strict=True)]
            elif self.in_shape[number] != self.out_shape[number]:
                distinct, repeated[number] = np.unique(axis.lower[there] - here.start, return_inverse=True)
                block = np.take(block, distinct, axis=number)
        if linear:
            shape = [len(linear[n][0][0]) if n in linear else block.shape[n] for n in range(block.ndim)]
            computed = np.empty(shape, dtype=np.float32) if repeated else result
            _interpolate(block, linear, computed)
            block = computed
        for number, inverse in repeated.items():
            block = np.take(block, inverse, axis=number)
        if block is not result:
            result[...] = block


def box_resampler(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    properties: Mapping[str, Any],
    logits_shape: Sequence[int],
) -> BoxResampler | None:
    """How the export of one case resamples, if that can be done box by box.

    It can for ``resample_data_or_seg_to_shape`` (nnU-Net's default) with order 0 or 1 and, where an axis is resampled
    separately, ``order_z`` 0; and for each of nnU-Net's functions where the shape stays.

    Args:
        plans_manager: the model's plans.
        configuration_manager: the model's configuration.
        properties: what preprocessing told about the image.
        logits_shape: (K, x, y, z).

    Returns:
        None where nnU-Net's own function has to see all logits at once.
    """
    in_shape = tuple(int(n) for n in logits_shape[-3:])
    out_shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    resampling = configuration_manager.resampling_fn_probabilities
    function, options = getattr(resampling, "func", resampling), getattr(resampling, "keywords", {})
    if in_shape == out_shape:
        if function in (resample_data_or_seg_to_shape, resample_torch_fornnunet, no_resampling_hack):
            return BoxResampler(in_shape, out_shape, tuple(_Axis.unchanged(n) for n in in_shape))
        return None
    if function is not resample_data_or_seg_to_shape:
        return None
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    options = {**defaults, **options}
    if options["is_seg"] or options["order"] not in (0, 1):
        return None
    target = [properties["spacing"][i] for i in plans_manager.transpose_forward]
    current = configuration_manager.spacing
    if len(current) != len(out_shape):  # a 2d configuration leaves the first axis of an image as it is
        current = [target[0], *current]
    separately, lowres = determine_do_sep_z_and_axis(
        options["force_separate_z"], current, target, options["separate_z_anisotropy_threshold"]
    )
    if separately and in_shape[lowres] != out_shape[lowres] and options["order_z"] != 0:
        return None
    linear = {axis for axis in range(len(in_shape)) if options["order"] == 1 and not (separately and axis == lowres)}
    return BoxResampler(
        in_shape,
        out_shape,
        tuple(_axis(n, m, linear=a in linear) for a, (n, m) in enumerate(zip(in_shape, out_shape, strict=True))),
    )


def sub_boxes(out: Box, channels: int, at_most_bytes: float) -> Iterator[Box]:
    """Boxes that divide a box, the first axes cut first, so that each keeps below a size in float32.

    Args:
        out: the box; nothing comes of an empty one.
        channels: number of channels that are held for every voxel.
        at_most_bytes: a box has one voxel at least, even if that is larger.
    """
    extents = [s.stop - s.start for s in out]
    if 0 in extents:
        return
    voxels = max(int(at_most_bytes // (4 * channels)), 1)
    shape = []
    for axis, n in enumerate(extents):
        shape.append(min(n, max(voxels // math.prod(extents[axis + 1 :]), 1)))
        voxels = max(voxels // shape[-1], 1)
    origin = [-s.start for s in out]
    for region in blocks(extents, shape):
        yield slices(region, origin)


def _axis(n_in: int, n_out: int, *, linear: bool) -> _Axis:
    if n_in == n_out:
        return _Axis.unchanged(n_in)
    return _Axis.linear(n_in, n_out) if linear else _Axis.nearest(n_in, n_out)


def _coordinates(n_in: int, n_out: int) -> NDArray[np.float64]:
    """Where the output voxels' centres lie, in input voxels, rounded as scipy rounds."""
    return (np.arange(n_out, dtype=np.float64) + 0.5) * (n_in / n_out) - 0.5


def _interpolate(
    block: NDArray[np.float32],
    linear: Mapping[int, Sequence[tuple[NDArray[np.intp], NDArray[np.float64]]]],
    result: NDArray[np.float32],
) -> None:
    """Sum up the products of voxels and weights into ``result``, as scipy does.

    A product is ((voxel * first axis' weight) * second's) * third's; they are added with the last axis' two fastest. The
    products without the last axis are few, so they are made first. The last interpolated axis lies outermost in memory:
    there whole planes are read, not voxels.

    Args:
        block: the voxels that are read.
        linear: per axis that is interpolated, ascending, the indices and weights of the first voxel and of the second.
        result: as ``block``, with the output's extents along those axes.
    """
    *others, last = linear
    order = [last, *(number for number in range(block.ndim) if number != last)]
    terms = [np.ascontiguousarray(block.transpose(order), dtype=np.float64)]
    for number in others:
        axis = order.index(number)
        terms = [_weighted(term, read, weights, axis) for term in terms for read, weights in linear[number]]
    planes = result.transpose(order)
    step = max(CHUNK // math.prod(planes.shape[1:]), 1)
    for start in range(0, len(planes), step):
        here = slice(start, start + step)
        products = (_weighted(term, read[here], w[here], 0) for term in terms for read, w in linear[last])
        planes[here] = functools.reduce(lambda total, product: np.add(total, product, out=total), products)


def _weighted(
    values: NDArray[np.float64], read: NDArray[np.intp], weights: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    """The voxels that are read along an axis, times their weights."""
    product = np.take(values, read, axis=axis)
    product *= weights.reshape([-1 if number == axis else 1 for number in range(values.ndim)])
    return product


def as_array(logits: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """Logits in main memory as an array, without a copy where that is possible."""
    if isinstance(logits, torch.Tensor):
        logits = logits.detach().cpu()
        return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()
    return logits


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{s.start}:{s.stop}" for s in box) + "]"
