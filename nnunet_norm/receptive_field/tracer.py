"""Runs a network on tensors without data and follows what every activation depends on."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import lcm
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from nnunet_norm.receptive_field.intervals import Dependence, input_dependence, merged_history, union
from nnunet_norm.receptive_field.operators import CREATE, Call, dependence_of

_BEFORE_ALL = 1 << 40
"""Larger than the number of any operator."""


class Tracer(TorchDispatchMode):
    """Keeps the ``Dependence`` of every living tensor that depends on the network's input.

    Attributes:
        strides: per spatial axis, the least common multiple of the scales that operators have produced so far. Known
            also when the network then fails because its input is not a multiple of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strides: tuple[int, ...] = ()
        self._known = WeakIdKeyDictionary()
        self._views: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self._modules: list[tuple[str, str]] = []
        self._order = 0

    def start(self, image: torch.Tensor) -> None:
        """Declare ``image`` of shape ``(N, C, *spatial)`` to be the network's input."""
        self._known[image] = input_dependence(image.shape[2:])
        self.strides = (1,) * (image.ndim - 2)

    def dependence(self, tensor: torch.Tensor) -> Dependence | None:
        """What the tensor depends on; None if it does not depend on the input."""
        return self._known.get(tensor)

    @contextmanager
    def named_layers(self, network: nn.Module) -> Iterator[None]:
        """Within, operators are attributed to the innermost submodule, by its first qualified name."""
        with ExitStack() as stack:
            for name, module in network.named_modules():
                entry = (name, type(module).__name__)
                before = module.register_forward_pre_hook(lambda *_, entry=entry: self._modules.append(entry))
                stack.callback(before.remove)
                after = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
                stack.callback(after.remove)
            yield

    def _leave(self) -> None:
        self._modules.pop()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note what its results depend on."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for output in outputs:
            self._views.setdefault(output.untyped_storage()._cdata, []).append(weakref.ref(output))
        name = func._schema.name.split("::")[-1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = tuple(self._known[t] for t in tensors if t in self._known)
        if outputs and inputs and name not in CREATE:
            self._note(func, name, _bind(func, args, kwargs), tensors[0], inputs, outputs)
        return result

    def _note(
        self,
        func: OpOverload,
        name: str,
        arguments: dict[str, Any],
        first: torch.Tensor,
        inputs: tuple[Dependence, ...],
        outputs: list[torch.Tensor],
    ) -> None:
        history = merged_history(inputs)
        source = self._known.get(first, history)
        layer, kind = self._modules[-1] if self._modules else ("", "network")
        call = Call(name, arguments, source, inputs, outputs[0], layer, torch.Tag.pointwise in func.tags)
        found = dependence_of(call)
        if found is None:
            self._order += 1
            cause = (self._order, f"{layer or 'network'} ({kind}: {name})")
            if history.unbounded is not None and _is_attention(layer, kind, name):
                cause = _attention_instead(history.unbounded, cause)
            else:
                cause = history.unbounded or cause
            found = replace(history, unbounded=cause)
        elif len(inputs) > 1:
            found = replace(merged_history([found, history]), axes=found.axes)
        self.strides = tuple(lcm(a, b) for a, b in zip(self.strides, _whole_scales(found), strict=True))
        for output in outputs:
            self._known[output] = _restricted(found, output)
        for argument, value in zip(func._schema.arguments, arguments.values(), strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                self._write(value, found, f"{layer or 'network'} ({kind}: {name} into a part of a tensor)")

    def _write(self, target: torch.Tensor, written: Dependence, description: str) -> None:
        """Note an operation in place for the tensor and for all views of the same memory."""
        for reference in self._views.get(target.untyped_storage()._cdata, []):
            view = reference()
            if view is None or view is target:
                continue
            before = self._known.get(view, replace(merged_history([written]), axes={}))
            aligned = all(
                axis.dim >= -view.ndim
                and view.shape[axis.dim] == len(axis.lo)
                and view.stride(axis.dim) == target.stride(axis.dim)
                for axis in written.axes.values()
            )
            both = union([before, written]) if aligned else None
            if both is None:
                self._order += 1
                both = replace(before, axes={}, unbounded=before.unbounded or (self._order, description))
            self._known[view] = both
        self._known[target] = _restricted(written, target)


def run_without_data(
    network: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tracer, Any, RuntimeError | None]:
    """The network's output for an input of the given shape, on tensors without data, and the tracer that watched.

    Parameters, buffers and random state are not touched: torch replaces them by stand-ins without data. Modules must be
    in eval mode already.

    Returns:
        The tracer, the network's output, and instead of an output the error with which the network ended.
    """
    tracer = Tracer()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_silent(logging.getLogger("torch._subclasses.fake_tensor")))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tracer)
        stack.enter_context(tracer.named_layers(network))
        image = torch.empty(tuple(shape), dtype=dtype, device=device)
        tracer.start(image)
        try:
            return tracer, network(image), None
        except RuntimeError as error:  # the caller tells a wrong extent from a network that cannot be traced
            return tracer, None, error


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """No messages: torch logs the traceback of an operator that fails, and the failure is handled here."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_attention(layer: str, kind: str, name: str) -> bool:
    """Whether an operator whose reach is not known is where tokens see each other."""
    return name.startswith("_scaled_dot_product") or (
        name in ("_softmax", "bmm") and any("att" in word.lower() for word in (layer.rpartition(".")[2], kind))
    )


def _attention_instead(cause: tuple[int, str], attention: tuple[int, str]) -> tuple[int, str]:
    """The attention, where all that was wrong before it is that voxels were laid out as tokens; before all else then."""
    order, description = cause
    layout = description.removesuffix(")").rpartition(": ")[2] in ("view", "_unsafe_view", "reshape", "permute", "roll")
    return (order - _BEFORE_ALL, attention[1]) if layout and order > 0 else cause


def _bind(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The operator's arguments by name, in the schema's order, defaults included."""
    bound = {}
    for index, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = args[index] if index < len(args) else kwargs.get(argument.name, default)
    return bound


def _restricted(dependence: Dependence, tensor: torch.Tensor) -> Dependence:
    """Without the axes that the tensor does not have (statistics, for example, beside the normalized activation)."""
    axes = {
        number: axis
        for number, axis in dependence.axes.items()
        if axis.dim >= -tensor.ndim and tensor.shape[axis.dim] == len(axis.lo)
    }
    return dependence if len(axes) == len(dependence.axes) else replace(dependence, axes=axes)


def _whole_scales(dependence: Dependence) -> tuple[int, ...]:
    """Scale per axis where it is a whole number, else 1 (as inside the decoder of an input of unfit extent)."""
    scales = [1] * len(dependence.period)
    for number, axis in dependence.axes.items():
        scales[number] = axis.scale.numerator if axis.scale.denominator == 1 else 1
    return tuple(scales)
