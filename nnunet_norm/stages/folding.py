"""Norms with stored statistics, folded into the convolution before them: in eval mode both together are one convolution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nnunet_norm.layers import replace_modules
from nnunet_norm.receptive_field.trace import unwrapped
from nnunet_norm.stages.graph import Node, read_network
from nnunet_norm.stages.operators import Operator, Pointwise
from nnunet_norm.stages.windows import Convolution, TransposedConvolution


class Pair(NamedTuple):
    """Names, in the network, of a convolution and of the norm that alone takes its output."""

    convolution: str
    norm: str


def find_foldable(network: nn.Module) -> tuple[Pair, ...]:
    """The norms that can be folded into a convolution, with that convolution.

    A norm is one of them if it normalizes with stored statistics in eval mode, if what it takes is the output of a
    convolution (or transposed convolution) that goes nowhere else, and if both are called once. This is read from the
    network's own forward (``read_network``), as far as its (first) output depends on it: other outputs are not looked at.
    Norms after grouped transposed convolutions stay.

    Raises:
        ArchitectureError: see ``read_network``.
    """
    graph = read_network(network)
    calls = Counter(id(module) for node in graph.nodes if (module := _module(node.operator)) is not None)
    found = []
    for number, node in enumerate(graph.nodes):
        norm = _module(node.operator)
        if not isinstance(norm, _NormBase) or not isinstance(node.operator, Pointwise):
            continue  # a Pointwise norm has stored statistics; the others are ImageNorm
        before = graph.nodes[node.inputs[0]]
        convolution = _module(before.operator)
        if not _is_plain_convolution(before) or graph.consumers(node.inputs[0]) != [number]:
            continue
        if calls[id(norm)] == calls[id(convolution)] == 1:
            found.append(Pair(before.name, node.name))
    return tuple(found)


def fold_norms(network: nn.Module, pairs: Sequence[Pair] | None = None) -> tuple[Pair, ...]:
    """Fold norms into the convolutions before them, in place; in eval mode the (first) output is the same, but for rounding.

    With the stored mean m and variance v of a channel, ``weight * (conv(x) - m) / sqrt(v + eps) + bias`` is a convolution
    with other weights and another bias; they are computed in float64. The norm's place is taken by ``nn.Identity``, under
    every name that it has, so the network cannot be trained any more and its state dict has other keys.

    Args:
        network: Any module, with or without wrappers of ``torch.compile`` and DistributedDataParallel.
        pairs: What to fold, found in a network of the same architecture; None: all that can be.

    Returns:
        The pairs that were folded.

    Raises:
        ArchitectureError: see ``read_network``; the network is left as it was.
    """
    network = unwrapped(network)
    pairs = find_foldable(network) if pairs is None else tuple(pairs)
    replaced: dict[nn.Module, nn.Module] = {}
    for pair in pairs:
        norm = network.get_submodule(pair.norm)
        _fold(network.get_submodule(pair.convolution), norm)
        replaced[norm] = nn.Identity().train(norm.training)
    replace_modules(network, replaced)
    return pairs


def _module(operator: Operator | None) -> nn.Module | None:
    """The module that an operator runs, if it is one."""
    module = operator.function if isinstance(operator, Pointwise) else getattr(operator, "module", None)
    return module if isinstance(module, nn.Module) else None


def _is_plain_convolution(node: Node) -> bool:
    """Whether its weight is one parameter of its own (and no reparametrization's), one row per output channel."""
    if not isinstance(node.operator, Convolution | TransposedConvolution):
        return False
    module: Any = node.operator.module
    grouped = isinstance(node.operator, TransposedConvolution) and module.groups > 1
    return "weight" in module._parameters and not grouped


def _fold(convolution: Any, norm: Any) -> None:
    old = convolution.weight
    weight, bias = fuse_conv_bn_weights(
        old.detach().double(),
        _double(convolution.bias),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        _double(norm.weight),
        _double(norm.bias),
        transpose=isinstance(convolution, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d),
    )
    for name, values in (("weight", weight), ("bias", bias)):
        setattr(convolution, name, nn.Parameter(values.detach().to(old.dtype), requires_grad=old.requires_grad))


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()
