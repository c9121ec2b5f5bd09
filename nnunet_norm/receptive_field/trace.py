"""The theoretical receptive field: intervals propagated through the real module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.conv import _ConvNd

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.layers.input_normalization import ATTRIBUTE, any_input
from nnunet_norm.receptive_field.intervals import BORDER, Axis, Dependence
from nnunet_norm.receptive_field.tracer import run_without_data

_FIRST_LENGTH = 2048  # enough for six stages of a residual encoder, so that one run suffices
_LONGEST = 1 << 16


@dataclass(frozen=True)
class ReceptiveField:
    """What the output of a network depends on. Reaches are in input voxels, as (before, after) per spatial axis.

    Attributes:
        stride: total stride S per axis; the network is translation-equivariant by multiples of it only.
        aligned: reach of output blocks on the grid of S: a core ``[k S, l S)`` needs the input
            ``[k S - before, l S + after)``.
        any_voxel: reach of one output voxel, the maximum over its S phases: output voxel i needs the input voxels
            ``i - before`` to ``i + after``.
        tile_statistics: names of the layers that in eval mode normalize with the tile's own statistics. The reaches are
            those of the convolutions alone. Empty: fixed statistics.
        unbounded: name, class and operator of the first layer with unbounded reach (global pooling, attention, corners
            aligned, or an operator that is not known here), else None. If it is set, the reaches leave that layer out
            (0 where nothing else is known) and no halo is exact.
        only_extent: the one extent that the network takes, as a transformer with a position embedding does; None: any that
            is a multiple of the stride.
    """

    stride: tuple[int, ...]
    aligned: tuple[tuple[int, int], ...]
    any_voxel: tuple[tuple[int, int], ...]
    tile_statistics: tuple[str, ...]
    unbounded: str | None
    only_extent: tuple[int, ...] | None = None

    @property
    def normalizes_tiles(self) -> bool:
        """Whether the network normalizes its input by the quantiles of the tile."""
        return ATTRIBUTE in self.tile_statistics

    @property
    def norms_of_tiles(self) -> tuple[str, ...]:
        """Those of ``tile_statistics`` that are layers."""
        return tuple(name for name in self.tile_statistics if name != ATTRIBUTE)


def trace(
    network: nn.Module,
    input_channels: int | None = None,
    ndim: int | None = None,
    *,
    extent: Sequence[int] | None = None,
) -> ReceptiveField:
    """Total stride and theoretical reach of a network in eval mode.

    The network's own ``forward`` is run on tensors without data; for every activation and axis the tracer keeps the
    interval of input voxels that each position depends on. The axis is as long as it takes for the central positions
    not to notice its ends. Weights are neither copied nor changed, training flags are restored on any exit. Wrappers of
    ``torch.compile`` and DistributedDataParallel are taken off. If several outputs come back (deep supervision), the
    first is meant.

    Args:
        network: any module from ``(N, C, *spatial)`` to ``(N, classes, *spatial)`` of the same extent.
        input_channels: C; None: that of the first convolution.
        ndim: number of spatial axes; None: that of the first convolution.
        extent: of the only input that the network takes, as a transformer with a position embedding does. Its reach must
            be seen within; one that is not bounded is reported as 0 where the ends of an axis hide the rest.

    Raises:
        ArchitectureError: the network cannot be run on an image of any extent, its output does not lie on the input's
            grid or does not depend on the input, or its reach exceeds 65536 voxels or the extent that was given.

    References:
        Majurski and Bajcsy 2021, doi 10.6028/jres.126.009 (receptive field and exact tiling).
    """
    network = unwrapped(network)
    kind = type(network).__name__
    channels, axes = _input_layout(network, input_channels, ndim)
    weight = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    shape = (_FIRST_LENGTH,) * axes if extent is None else tuple(extent)
    with eval_mode(network), any_input(network):
        while extent is not None or max(shape) <= _LONGEST:
            tracer, output, error = run_without_data(network, (1, channels, *shape), weight.dtype, weight.device)
            tensor = first_output(output) if error is None else None
            dependence = tracer.dependence(tensor) if tensor is not None else None
            strides = tracer.strides if dependence is None else dependence.period
            if extent is None and any(n % s for n, s in zip(shape, strides, strict=True)):
                multiples = [lcm(s, _FIRST_LENGTH // 16) for s in strides]
                shape = tuple(-(-n // m) * m for n, m in zip(shape, multiples, strict=True))
                continue
            if tensor is None:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ArchitectureError(
                    f"{kind} cannot be run on an input of {(1, channels, *shape)}: {reason}"
                ) from error
            field = _field(kind, dependence, tuple(tensor.shape[2:]), shape, at_least=extent is not None)
            if field is not None:
                return field if extent is None else replace(field, only_extent=shape)
            if extent is not None:
                raise ArchitectureError(f"the reach of {kind} exceeds half of {shape}, the one extent that it takes")
            shape = tuple(2 * n for n in shape)
    raise ArchitectureError(f"the reach or total stride of {kind} exceeds {_LONGEST} voxels: choose a halo yourself")


def trace_at(network: nn.Module, extent: Sequence[int], input_channels: int | None = None) -> ReceptiveField:
    """``trace``; for a network that takes one extent only, as far as that shows its reach.

    Args:
        network: any module that ``trace`` accepts.
        extent: one that the network can take.
        input_channels: None: those of the first convolution.

    Raises:
        ArchitectureError: see ``trace``.
    """
    try:
        return trace(network, input_channels, len(extent))
    except ArchitectureError as any_extent:
        try:
            return trace(network, input_channels, len(extent), extent=extent)
        except ArchitectureError as this_extent:
            raise this_extent from any_extent


def theoretical(
    network: nn.Module, *, aligned: bool = False, input_channels: int | None = None, ndim: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Theoretical reach (before, after) per spatial axis, in voxels: the exact halo of a network with fixed statistics.

    Args:
        network: see ``trace``.
        aligned: for cores on the grid of the total stride, instead of for any voxel.
        input_channels: see ``trace``.
        ndim: see ``trace``.

    Raises:
        ArchitectureError: as ``trace``, and if the reach is not bounded.
    """
    field = trace(network, input_channels, ndim)
    if field.unbounded is not None:
        raise ArchitectureError(
            f"the reach of {type(unwrapped(network)).__name__} is not bounded, because of {field.unbounded}: "
            "no halo is exact; use the effective receptive field"
        )
    return field.aligned if aligned else field.any_voxel


def unwrapped(network: nn.Module) -> nn.Module:
    """The module inside wrappers of ``torch.compile``, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel):
            network = network.module
        elif isinstance(network, OptimizedModule):
            network = network._orig_mod
        else:
            return network


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode; on any exit each has its own training flag back.

    The flags are set directly: a ``train`` method that does more than that is not called.
    """
    flags = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def first_output(output: Any) -> torch.Tensor:
    """The network's output, or the first (highest resolution) of several.

    Raises:
        ArchitectureError: neither a tensor nor a list or tuple that begins with one.
    """
    first = output[0] if isinstance(output, list | tuple) and output else output
    if not isinstance(first, torch.Tensor):
        raise ArchitectureError(f"the network returns {type(first).__name__}: a tensor or a list of tensors is needed")
    return first


def _input_layout(network: nn.Module, input_channels: int | None, ndim: int | None) -> tuple[int, int]:
    """Input channels and number of spatial axes, from the first convolution where not given."""
    if input_channels is None or ndim is None:
        first = next((m for m in network.modules() if isinstance(m, _ConvNd)), None)
        if first is None:
            raise ArchitectureError(
                f"{type(network).__name__} has no convolution to tell its input by: give input_channels and ndim"
            )
        input_channels = first.in_channels if input_channels is None else input_channels
        ndim = len(first.kernel_size) if ndim is None else ndim
    return input_channels, ndim


def _field(
    kind: str, dependence: Dependence | None, extent: tuple[int, ...], shape: tuple[int, ...], *, at_least: bool
) -> ReceptiveField | None:
    """The result for a network of class ``kind``, or None if the ends of an axis were noticed in its middle.

    With ``at_least``, a reach that is not bounded anyway is 0 where the ends were noticed.
    """
    if dependence is None:
        raise ArchitectureError(f"the output of {kind} does not depend on its input")
    if extent != shape:
        raise ArchitectureError(f"{kind} turns an extent of {shape} into {extent}: output and input must share a grid")
    aligned, any_voxel = [], []
    for number, stride in enumerate(dependence.period):
        axis = dependence.axes.get(number)
        if axis is None and dependence.unbounded is None:
            raise ArchitectureError(f"the output of {kind} does not vary along axis {number}")
        reach = _reach(axis, stride) if axis is not None else ((0, 0), (0, 0))
        if reach is None and at_least and dependence.unbounded is not None:
            reach = (0, 0), (0, 0)
        if reach is None:
            return None
        aligned.append(reach[0])
        any_voxel.append(reach[1])
    unbounded = dependence.unbounded[1] if dependence.unbounded is not None else None
    return ReceptiveField(dependence.period, tuple(aligned), tuple(any_voxel), dependence.tile_statistics, unbounded)


def _reach(axis: Axis, stride: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(aligned, any voxel), each (before, after), at the central block of the axis; None if it notices the ends."""
    start = len(axis.lo) // 2 // stride * stride
    block = slice(start, start + stride)
    if axis.lo[block].min() <= -BORDER or axis.hi[block].max() >= BORDER:
        return None
    place = np.arange(start, start + stride)
    before, after = start - int(axis.lo[block].min()), int(axis.hi[block].max()) - (start + stride - 1)
    single = int((place - axis.lo[block]).max()), int((axis.hi[block] - place).max())
    return (max(before, 0), max(after, 0)), (max(single[0], 0), max(single[1], 0))
