"""How each ATen operator changes what its result depends on.

A rule takes a ``Call`` and returns the ``Dependence`` of the result, or None where it does not know one: the caller
then treats the operator as reading everything. Operators tagged as pointwise by torch need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from nnunet_norm.layers.input_normalization import ATTRIBUTE
from nnunet_norm.receptive_field.intervals import (
    Axis,
    Dependence,
    gather,
    resampled,
    transposed_window,
    union,
    window,
    with_axes,
)


@dataclass(frozen=True)
class Call:
    """One executed operator.

    Attributes:
        name: without namespace and overload, for example ``convolution``.
        arguments: the values by the schema's names, defaults included.
        source: what the operator's first tensor depends on.
        inputs: the same for all tensors among its arguments that depend on the network's input.
        result: the first tensor that came out.
        layer: qualified name of the innermost module that was running.
        is_pointwise: torch says that result position i reads position i alone.
    """

    name: str
    arguments: dict[str, Any]
    source: Dependence
    inputs: tuple[Dependence, ...]
    result: torch.Tensor
    layer: str
    is_pointwise: bool

    @property
    def input_shape(self) -> torch.Size:
        """Shape of the first tensor."""
        first = next(v for v in self.arguments.values() if isinstance(v, torch.Tensor))
        return first.shape


Rule = Callable[[Call], Dependence | None]


def dependence_of(call: Call) -> Dependence | None:
    """The rule for the call, applied; None where the operator's reach is not known to be bounded."""
    rule = RULES.get(call.name, _pointwise if call.is_pointwise else None)
    if rule is None:
        return None
    if rule not in (_pointwise, _cat) and sum(bool(d.axes) for d in call.inputs if d is not call.source):
        return None  # for example a convolution whose weights depend on the image
    return rule(call)


def _pointwise(call: Call) -> Dependence | None:
    return union(call.inputs)


def _per_axis(values: int | Sequence[int], axis: Axis) -> int:
    """The entry of an operator's per-axis argument; one entry stands for all axes."""
    if isinstance(values, int):
        return values
    return values[0] if len(values) == 1 else values[axis.dim]


def _each_axis(call: Call, rank: int, step: Callable[[Axis, int], Axis]) -> Dependence | None:
    """Apply a window to all axes; ``rank`` is the operator's number of spatial dimensions."""
    if any(axis.dim < -rank for axis in call.source.axes.values()):
        return None  # an axis of the image plays the part of channels
    axes = {number: step(axis, call.result.shape[axis.dim]) for number, axis in call.source.axes.items()}
    return with_axes(call.source, axes)


def _convolution(call: Call) -> Dependence | None:
    given = call.arguments
    kernel = given["weight"].shape[2:]
    apply = transposed_window if given["transposed"] else window

    def step(axis: Axis, length: int) -> Axis:
        stride, padding, dilation = (_per_axis(given[key], axis) for key in ("stride", "padding", "dilation"))
        return apply(axis, length, kernel=kernel[axis.dim], stride=stride, padding=padding, dilation=dilation)

    return _each_axis(call, len(kernel), step)


def _pool(call: Call) -> Dependence | None:
    given = call.arguments

    def step(axis: Axis, length: int) -> Axis:
        return window(
            axis,
            length,
            kernel=_per_axis(given["kernel_size"], axis),
            stride=_per_axis(given["stride"] or given["kernel_size"], axis),
            padding=_per_axis(given["padding"], axis),
            dilation=_per_axis(given.get("dilation", 1), axis),
        )

    return _each_axis(call, 3 if "3d" in call.name else 2, step)


def _upsample(call: Call) -> Dependence | None:
    if call.arguments.get("align_corners"):
        return None  # what a voxel reads depends on the extent of the whole tile
    linear = "linear" in call.name
    return _each_axis(
        call, 3, lambda axis, length: resampled(axis, length, linear=linear, centred="exact" in call.name)
    )


def _pad(call: Call) -> Dependence | None:
    """Padding of any kind: what it puts beyond the ends counts as beyond the ends."""
    amounts = call.arguments["pad" if call.name == "constant_pad_nd" else "padding"]

    def step(axis: Axis, length: int) -> Axis:
        index = 2 * (-axis.dim - 1)
        before = amounts[index] if index < len(amounts) else 0
        return gather(axis, [np.arange(-before, length - before)], axis.scale)

    return _each_axis(call, 3, step)


def _same_coordinates(call: Call) -> Dependence | None:
    """Views: a dimension keeps its meaning if its size and the number of elements behind it stay the same."""
    old, new = call.input_shape, call.result.shape
    axes = {}
    for number, axis in call.source.axes.items():
        behind = prod(old[len(old) + axis.dim + 1 :])
        dims = [d for d in range(-len(new), 0) if new[d] == len(axis.lo) and prod(new[len(new) + d + 1 :]) == behind]
        if not dims:
            return None
        axes[number] = replace(axis, dim=dims[0])
    return replace(call.source, axes=axes)


def _same_sizes(call: Call) -> Dependence | None:
    """Expansions and repetitions of other dimensions."""
    keeps = all(call.result.shape[axis.dim] == len(axis.lo) for axis in call.source.axes.values())
    return call.source if keeps else None


def _permute(call: Call) -> Dependence | None:
    rank = len(call.input_shape)
    if call.name == "permute":
        order = [d % rank for d in call.arguments["dims"]]
    else:
        order = list(range(rank))
        a, b = (call.arguments.get(key, default) for key, default in (("dim0", 0), ("dim1", 1)))
        order[a], order[b] = order[b], order[a]
    axes = {number: replace(axis, dim=order.index(axis.dim % rank) - rank) for number, axis in call.source.axes.items()}
    return replace(call.source, axes=axes)


def _cat(call: Call) -> Dependence | None:
    joined = call.arguments["dim"]
    rank = len(call.result.shape)
    both = union(call.inputs)
    if both is None or any(axis.dim % rank == joined % rank for axis in both.axes.values()):
        return None
    return both


def _slice(call: Call) -> Dependence | None:
    given = call.arguments
    dim = given["dim"] % len(call.input_shape) - len(call.input_shape)
    axes = dict(call.source.axes)
    for number, axis in axes.items():
        if axis.dim == dim:
            kept = range(len(axis.lo))[slice(given["start"], given["end"], given["step"])]
            positions = np.arange(kept.start, kept.stop, kept.step)
            axes[number] = gather(axis, [positions], axis.scale * kept.step)
    return with_axes(call.source, axes)


def _without_dims(call: Call, dims: Sequence[int], *, keepdim: bool) -> Dependence:
    """The dependence after dimensions other than the image's axes are gone."""
    rank = len(call.input_shape)
    gone = [] if keepdim else [d % rank - rank for d in dims]
    axes = {
        number: replace(axis, dim=axis.dim + sum(d > axis.dim for d in gone))
        for number, axis in call.source.axes.items()
    }
    return replace(call.source, axes=axes)


def _touches_space(call: Call, dims: Sequence[int]) -> bool:
    rank = len(call.input_shape)
    return any(axis.dim % rank in {d % rank for d in dims} for axis in call.source.axes.values())


def _along_dim(call: Call) -> Dependence | None:
    """Softmax, cumulative sums, splitting and indexing along a dimension that is not an axis of the image."""
    dim = call.arguments.get("dim", 0)
    if not isinstance(dim, int) or _touches_space(call, [dim]):
        return None
    return _without_dims(call, [dim], keepdim=call.name not in {"select", "unbind"})


def _reduction(call: Call) -> Dependence | None:
    dims = call.arguments.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(len(call.input_shape))
    if _touches_space(call, dims):
        return None
    return _without_dims(call, dims, keepdim=call.arguments.get("keepdim", False))


def _tile_statistics(call: Call) -> Dependence:
    names = dict.fromkeys((*call.source.tile_statistics, call.layer))
    return replace(call.source, tile_statistics=tuple(names))


def _input_quantiles(call: Call) -> Dependence:
    """Statistics of the whole tile, taken by the network itself, before any layer."""
    return replace(call.source, tile_statistics=(*call.source.tile_statistics, ATTRIBUTE))


def _batch_norm(call: Call) -> Dependence:
    return _tile_statistics(call) if call.arguments.get("training", True) else call.source


def _layer_norm(call: Call) -> Dependence:
    normalized = range(-len(call.arguments["normalized_shape"]), 0)
    return _tile_statistics(call) if _touches_space(call, normalized) else call.source


def _source(call: Call) -> Dependence:
    return call.source


RULES: dict[str, Rule] = {
    "convolution": _convolution,
    "cat": _cat,
    "slice": _slice,
    "t": _permute,
    "permute": _permute,
    "transpose": _permute,
    "constant_pad_nd": _pad,
    "native_group_norm": _tile_statistics,
    "native_layer_norm": _layer_norm,
    "tile_quantiles": _input_quantiles,
    "_batch_norm_with_update": _tile_statistics,
    "batch_norm_no_update": _source,
    "_native_batch_norm_legit_no_training": _source,
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"), _pool),
    **{f"{kind}_pad{n}d": _pad for kind in ("reflection", "replication") for n in (1, 2, 3)},
    **{f"upsample_{mode}": _upsample for mode in ("nearest1d", "nearest2d", "nearest3d")},
    **{f"_upsample_nearest_exact{n}d": _upsample for n in (1, 2, 3)},
    **{f"upsample_{mode}": _upsample for mode in ("linear1d", "bilinear2d", "trilinear3d")},
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _batch_norm),
    **dict.fromkeys(("miopen_batch_norm", "batch_norm"), _batch_norm),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"), _same_coordinates),
    **dict.fromkeys(("expand", "repeat"), _same_sizes),
    **dict.fromkeys(("_to_copy", "copy_", "detach", "alias", "lift_fresh", "contiguous"), _pointwise),
    **dict.fromkeys(("native_dropout", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_"), _pointwise),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "glu"), _along_dim),
    **dict.fromkeys(("split", "split_with_sizes", "select", "unbind", "index_select"), _along_dim),
    **dict.fromkeys(("mean", "sum", "prod", "amax", "amin", "argmax", "argmin", "max", "min"), _reduction),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean", "logsumexp", "linalg_vector_norm"), _reduction),
}
"""Rules by operator name (without namespace and overload)."""

CREATE = frozenset(
    {f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn")}
    | {f"new_{kind}" for kind in ("empty", "empty_strided", "zeros", "ones", "full")}
    | {"bernoulli_", "fill_", "zero_"}
)
"""Operators that take a tensor for its shape alone, or overwrite it with what depends on nothing."""
