"""A network as a graph of operators, read from the module itself: nothing is assumed about how it is wired.

``torch.fx`` follows the module's own ``forward`` in eval mode. So a U-Net, a residual encoder, or a variant of somebody's
own is known as soon as each of its operators is; weights are not copied, the operators refer to the modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.layers import NORMS
from nnunet_norm.receptive_field.trace import eval_mode, unwrapped
from nnunet_norm.stages.operators import Concatenation, ImageNorm, Operator, Pointwise
from nnunet_norm.stages.windows import Convolution, Pooling, TransposedConvolution, Upsampling

VOXELWISE = tuple(
    getattr(activation, name)
    for name in activation.__all__
    if name not in ("GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax", "RReLU")
)
"""Nonlinearities of torch that act on each voxel by itself in eval mode."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    nn.SyncBatchNorm,
    nn.GroupNorm,
    *(norm for every in NORMS.values() for norm in every.values() if isinstance(norm, type)),
)
_POOLING = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)

_FUNCTIONS: dict[Any, Callable[..., torch.Tensor]] = {
    function: function
    for function in (torch.relu, torch.sigmoid, torch.tanh, functional.relu, functional.leaky_relu, functional.elu)
} | {f: f for f in (functional.gelu, functional.silu, functional.mish, functional.softplus, functional.hardswish)}


@dataclass(frozen=True)
class Node:
    """One map of the network: the operator that makes it, and from what.

    Attributes:
        name: of the module, or of the operation.
        operator: None for the image.
        inputs: numbers of the nodes that it takes.
        channels: of the map.
        stride: image voxels per voxel of the map, per axis.
    """

    name: str
    operator: Operator | None
    inputs: tuple[int, ...]
    channels: int
    stride: tuple[Fraction, ...]


@dataclass(frozen=True)
class Graph:
    """Operators in the order of computation; node 0 is the image, the last one the network's (first) output."""

    nodes: tuple[Node, ...]

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.nodes[0].stride)

    @property
    def stride(self) -> tuple[int, ...]:
        """Total stride per axis."""
        return tuple(lcm(*(node.stride[axis].numerator for node in self.nodes)) for axis in range(self.ndim))

    @property
    def norms(self) -> dict[int, ImageNorm]:
        """The norms that use the statistics of the whole image, by their node."""
        return {i: node.operator for i, node in enumerate(self.nodes) if isinstance(node.operator, ImageNorm)}

    def consumers(self, number: int) -> list[int]:
        """The nodes that take a node as input."""
        return [i for i, node in enumerate(self.nodes) if number in node.inputs]

    def extents(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Extents of every map, for an image of a shape that the total stride divides.

        Raises:
            ArchitectureError: maps that are added or joined differ in extents, or the output is no image of that shape.
        """
        found: list[tuple[int, ...]] = []
        for node in self.nodes:
            if node.operator is None:
                found.append(tuple(shape))
                continue
            options = {
                tuple(node.operator.length(axis, n) for axis, n in enumerate(found[source])) for source in node.inputs
            }
            if len(options) != 1 or min(min(options)) < 1:
                raise ArchitectureError(f"{node.name} cannot take an image of {'x'.join(map(str, shape))} voxels")
            found.append(options.pop())
        if found[-1] != tuple(shape):
            raise ArchitectureError(f"the output has extents {found[-1]} for an image of {tuple(shape)}")
        return found


def read_network(network: nn.Module) -> Graph:
    """The graph of a network from (1, C, *spatial) to (1, K, *spatial), in eval mode.

    Raises:
        ArchitectureError: the forward cannot be followed (it depends on the data), or has an operator that cannot be run
            block by block, which the message names.
    """
    network = unwrapped(network)
    with eval_mode(network):
        try:
            traced = _Tracer().trace(network)
        except Exception as error:
            # Whatever following a stranger's forward raises, it says that the module is not known, which is an answer.
            raise ArchitectureError(
                f"its forward cannot be followed ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
            ) from error
        return _Reader(network, traced).graph()


class _Proxy(fx.Proxy):
    """Records additions in place as such."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Follows everything but the modules that are known as one operator."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See ``torch.fx.Tracer``."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See ``torch.fx.Tracer``."""
        if type(m) in (nn.Sequential, nn.ModuleList):
            return False
        return _is_known(m) or super().is_leaf_module(m, module_qualified_name)


def _is_known(m: nn.Module) -> bool:
    return isinstance(m, (*_CONVOLUTIONS, *_TRANSPOSED, *_POOLING, *VOXELWISE, _NormBase, nn.GroupNorm))


class _Reader:
    """Turns the nodes of ``torch.fx`` into ours."""

    def __init__(self, network: nn.Module, traced: fx.Graph) -> None:
        first = next((m for m in network.modules() if isinstance(m, _CONVOLUTIONS)), None)
        if first is None:
            raise ArchitectureError("it has no convolution")
        self.network, self.axes = network, len(first.kernel_size)
        self.everything = traced
        self.traced, self.channels = self._needed(traced), first.in_channels
        self._check_memory()

    def graph(self) -> Graph:
        """See ``read_network``."""
        nodes: list[Node] = []
        numbers: dict[fx.Node, int] = {}
        for item in self.traced:
            numbers[item] = len(nodes)
            if item.op == "placeholder":
                nodes.append(Node("the image", None, (), self.channels, (Fraction(1),) * self.axes))
                continue
            name = str(item.target) if item.op == "call_module" else item.name
            try:
                made, sources = self._operator(item)
            except ArchitectureError as error:
                raise ArchitectureError(f"{name} has no rule for blocks: {error}") from error
            inputs = tuple(numbers[source] for source in sources)
            nodes.append(self._node(name, made, inputs, nodes))
        return Graph(tuple(nodes))

    def _node(self, name: str, made: Operator, inputs: tuple[int, ...], nodes: list[Node]) -> Node:
        strides = {tuple(nodes[i].stride[axis] * made.ratio(axis) for axis in range(self.axes)) for i in inputs}
        if len(strides) != 1 or any(s.denominator != 1 for s in min(strides)):
            raise ArchitectureError(f"{name} joins maps of different resolution, or is finer than the image")
        try:
            channels = made.channels([nodes[i].channels for i in inputs])
        except ArchitectureError as error:
            raise ArchitectureError(f"its forward cannot be followed ({name}: {error})") from error
        return Node(name, made, inputs, channels, strides.pop())

    def _needed(self, traced: fx.Graph) -> list[fx.Node]:
        """The nodes that the first output depends on."""
        output = next(node for node in reversed(traced.nodes) if node.op == "output").args[0]
        while isinstance(output, list | tuple) and output:
            output = output[0]
        if not isinstance(output, fx.Node):
            raise ArchitectureError(f"its output is {output!r}")
        wanted, stack = set(), [output]
        while stack:
            node = stack.pop()
            if node not in wanted:
                wanted.add(node)
                stack += node.all_input_nodes
        images = [node for node in traced.nodes if node.op == "placeholder" and node in wanted]
        if len(images) != 1:
            raise ArchitectureError(f"its output depends on {len(images)} inputs")
        return [node for node in traced.nodes if node in wanted]

    def _operator(self, item: fx.Node) -> tuple[Operator, list[fx.Node]]:
        """The operator, and what it takes."""
        if item.op == "call_module":
            module = self.network.get_submodule(str(item.target))
            if module._forward_hooks or module._forward_pre_hooks:
                raise ArchitectureError("a hook, which blocks would not call")
            return operator_of(module, self.axes), item.all_input_nodes
        if item.op == "call_function":
            return self._function(item)
        raise ArchitectureError(f"{item.op} {item.target}")

    def _function(self, item: fx.Node) -> tuple[Operator, list[fx.Node]]:
        target, args, kwargs = item.target, item.args, dict(item.kwargs)
        tensors = item.all_input_nodes
        if target in (operator.add, operator.iadd, torch.add) and len(args) == 2 and not kwargs:
            if not all(isinstance(arg, fx.Node) for arg in args):
                raise ArchitectureError("addition of a constant")
            return Pointwise(target), [args[0], args[1]]  # type: ignore[list-item]
        if target in (torch.cat, torch.concat):
            maps = args[0] if args else kwargs.get("tensors")
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim not in (1, -1 - self.axes) or not isinstance(maps, list | tuple):
                raise ArchitectureError(f"concatenation along axis {dim}")
            return Concatenation(), list(maps)
        if target is functional.interpolate:
            bound = dict(zip(("input", "size", "scale_factor", "mode", "align_corners"), args, strict=False)) | kwargs
            made = Upsampling.of(
                bound.get("scale_factor"),
                str(bound.get("mode", "nearest")),
                self.axes,
                size=bound.get("size"),
                align_corners=bound.get("align_corners"),
            )
            return made, tensors
        if target in _FUNCTIONS and len(tensors) == 1 and isinstance(args[0] if args else None, fx.Node):
            rest, function = args[1:], _FUNCTIONS[target]
            return Pointwise(lambda x: function(x, *rest, **kwargs)), tensors
        raise ArchitectureError(f"the function {getattr(target, '__name__', target)}")

    def _check_memory(self) -> None:
        """Refuse a change in place of a map that is used again afterwards: whoever uses it sees the changed one."""
        order = {node: i for i, node in enumerate(self.everything.nodes)}
        needed = {*self.traced, next(node for node in reversed(self.everything.nodes) if node.op == "output")}
        for item in order:
            if not self._works_in_place(item):
                continue
            shared = {item.all_input_nodes[0]}
            while (source := self._same_memory(min(shared, key=order.__getitem__))) is not None:
                shared.add(source)
            for node in order:
                if node is not item and self._same_memory(node) in shared:
                    shared.add(node)
            later = {user for node in shared for user in node.users if user in needed and order[user] > order[item]}
            if later:
                user = min(later, key=order.__getitem__)
                name = getattr(item.target, "__name__", item.target)
                raise ArchitectureError(f"{name} changes in place what {user.name} uses afterwards")

    def _works_in_place(self, item: fx.Node) -> bool:
        module = self.network.get_submodule(str(item.target)) if item.op == "call_module" else None
        name = item.target if isinstance(item.target, str) else getattr(item.target, "__name__", "")
        called_so = item.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")
        marked = item.kwargs.get("inplace") or getattr(module, "inplace", False)
        return bool(item.target is operator.iadd or called_so or marked)

    def _same_memory(self, item: fx.Node) -> fx.Node | None:
        """The input whose memory the output is."""
        module = self.network.get_submodule(str(item.target)) if item.op == "call_module" else None
        hands_on = isinstance(module, nn.Identity | _DropoutNd) or self._works_in_place(item)
        return item.all_input_nodes[0] if hands_on else None


def operator_of(module: nn.Module, axes: int) -> Operator:
    """The operator of a module in eval mode.

    Raises:
        ArchitectureError: a module that cannot be run block by block; the message says what it is.
    """
    if isinstance(module, _CONVOLUTIONS) and _keeps_forward(module, _CONVOLUTIONS):
        return Convolution(module)
    if isinstance(module, _TRANSPOSED) and _keeps_forward(module, _TRANSPOSED):
        return TransposedConvolution(module)
    if isinstance(module, _POOLING) and _keeps_forward(module, _POOLING):
        return Pooling(module)
    if isinstance(module, _NormBase | nn.GroupNorm):
        return _norm(module)
    if isinstance(module, nn.Upsample):
        return Upsampling.of(
            module.scale_factor, module.mode, axes, size=module.size, align_corners=module.align_corners
        )
    if isinstance(module, nn.Identity | _DropoutNd):
        return Pointwise(lambda x: x)
    if isinstance(module, VOXELWISE) and _keeps_forward(module, VOXELWISE):
        return Pointwise(module)
    raise ArchitectureError(f"a module of class {type(module).__name__}")


def _norm(module: nn.Module) -> Operator:
    """A norm with running statistics acts on each voxel; one without takes those of the map."""
    if not _keeps_forward(module, _NORMS):
        raise ArchitectureError(f"a norm of class {type(module).__name__}")
    if getattr(module, "running_mean", None) is not None and getattr(module, "track_running_stats", True):
        return Pointwise(module)
    return ImageNorm(module)


def _keeps_forward(module: nn.Module, classes: Sequence[type[nn.Module]]) -> bool:
    """Whether the class keeps the forward that is known."""
    return any(type(module).forward is known.forward for known in classes)
