"""Exchange the norms of a network that already exists."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from nnunet_norm.errors import LayerError
from nnunet_norm.layers.batch_renorm import BatchRenorm2d, BatchRenorm3d
from nnunet_norm.layers.frozen_batch_norm import FrozenBatchNorm
from nnunet_norm.layers.ghost_batch_norm import GhostBatchNorm2d, GhostBatchNorm3d
from nnunet_norm.layers.group_norm import GroupNorm
from nnunet_norm.layers.instance_norm import TrackedInstanceNorm2d, TrackedInstanceNorm3d

NormFactory = Callable[..., nn.Module]
"""Called as ``factory(num_features, **kwargs)``."""

NORMS: Mapping[str, Mapping[int, NormFactory]] = MappingProxyType(
    {
        "batch_renorm": {2: BatchRenorm2d, 3: BatchRenorm3d},
        "batch_norm": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
        "frozen_batch_norm": dict.fromkeys((1, 2, 3), FrozenBatchNorm),
        "ghost_batch_norm": {2: GhostBatchNorm2d, 3: GhostBatchNorm3d},
        "group_norm": {1: GroupNorm, 2: GroupNorm, 3: GroupNorm},
        "instance_norm": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
        "instance_norm_tracked": {2: TrackedInstanceNorm2d, 3: TrackedInstanceNorm3d},
        "none": {
            1: lambda *_, **__: nn.Identity(),
            2: lambda *_, **__: nn.Identity(),
            3: lambda *_, **__: nn.Identity(),
        },
    }
)
"""The norms that :func:`convert_norm` knows by name, by number of spatial axes."""

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def find_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Every norm over channels in ``module``, each once, under the first of its names.

    BatchNorm, InstanceNorm, GroupNorm and their relatives, with any number of names (nnU-Net's blocks register a norm twice,
    and its decoder holds the encoder again). LayerNorm is not meant: it belongs to transformer tokens, not to feature maps.
    """
    return {name: m for name, m in module.named_modules() if isinstance(m, (_NormBase, nn.GroupNorm))}


def tracks_statistics(norm: nn.Module) -> bool:
    """Whether a norm has running statistics, with which eval mode normalizes."""
    return isinstance(norm, _NormBase) and norm.running_mean is not None


def tracking_norms(module: nn.Module) -> list[_NormBase]:
    """The norms with running statistics, each once, in an order that conversion to SyncBatchNorm and wrappers keep.

    That conversion makes a module of its own for each name that a norm has; what they share are the tensors.
    """
    once: dict[int, _NormBase] = {}
    for norm in find_norms(module).values():
        if isinstance(norm, _NormBase) and norm.running_mean is not None:
            once.setdefault(id(norm.running_mean), norm)
    return list(once.values())


def convert_norm(
    module: nn.Module,
    norm: str | NormFactory | Mapping[int, NormFactory],
    *,
    only: Callable[[nn.Module], bool] = lambda _: True,
    **kwargs: Any,
) -> nn.Module:
    """Exchange every norm of ``module``, in place.

    Names and aliases stay: a norm that stands in several places is replaced by one norm in all of them. ``weight`` and
    ``bias`` stay the same Parameter objects, and running statistics the same tensors, where both norms have them. ``eps``,
    ``affine``, device, dtype and training flag are taken over; hooks on the old norms are not. Train and eval mode are
    those of the new norm.

    Args:
        module: Any module; a norm itself too.
        norm: A name of :data:`NORMS`, or a callable ``factory(num_features, eps=..., affine=..., **kwargs)``, or such
            callables by number of spatial axes.
        only: Whether a norm is exchanged.
        **kwargs: For the constructor of the new norms (``momentum``, ``r_max``, ``group_size``, ...).

    Returns:
        ``module``, or the new norm if ``module`` was one.

    Raises:
        LayerError: For a name that does not exist, a norm that is not initialized yet, or a number of spatial axes that
            the new norm does not have or that cannot be told.
    """
    if isinstance(norm, str) and norm not in NORMS:
        raise LayerError(f"norm={norm!r}: choose from {', '.join(NORMS)}")
    # All new norms are built before the first one is exchanged: an error leaves the module as it was.
    replaced = {
        old: _successor(old, _factory(norm, name, old, module), kwargs, module)
        for name, old in find_norms(module).items()
        if only(old)
    }
    return replace_modules(module, replaced)


def replace_modules(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in the place of some, in place, under every name that each of them has.

    Returns:
        ``module``, or what takes its place.
    """
    if module in replaced:
        return replaced[module]
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[name] = replaced[child]
    return module


def _factory(
    norm: str | NormFactory | Mapping[int, NormFactory], name: str, old: nn.Module, root: nn.Module
) -> NormFactory:
    if isinstance(old, LazyModuleMixin):
        raise LayerError(f"norm {name!r} is a {type(old).__name__} without a number of channels: run one batch first")
    if not isinstance(norm, str | Mapping):
        return norm
    factories = NORMS[norm] if isinstance(norm, str) else norm
    ndim = _spatial_axes(name, old, root)
    if ndim not in factories:
        what = f"norm={norm!r}" if isinstance(norm, str) else f"the norm that takes the place of {type(old).__name__}"
        raise LayerError(f"{what} exists for {sorted(factories)} spatial axes, and {name!r} has {ndim}")
    return factories[ndim]


def _spatial_axes(name: str, old: nn.Module, root: nn.Module) -> int:
    """From the class (``BatchNorm3d``); for GroupNorm and SyncBatchNorm, which fit all, from the convolutions around it."""
    for ndim in (1, 2, 3):
        if any(base.__name__.endswith(f"{ndim}d") for base in type(old).__mro__):
            return ndim
    around = {len(m.kernel_size) for m in root.modules() if isinstance(m, _ConvNd)}
    if len(around) != 1:
        raise LayerError(f"the number of spatial axes of norm {name!r} ({type(old).__name__}) cannot be told")
    return around.pop()


@dataclass(frozen=True)
class _Features:
    """What a norm says of itself, under one name for all classes."""

    channels: int
    affine: bool

    @classmethod
    def of(cls, norm: nn.Module) -> "_Features":
        channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
        return cls(int(channels), bool(norm.affine))  # type: ignore[arg-type]


def _successor(old: nn.Module, factory: NormFactory, kwargs: Mapping[str, Any], root: nn.Module) -> nn.Module:
    features = _Features.of(old)
    new = factory(features.channels, **{"eps": old.eps, "affine": features.affine, **kwargs})
    tensors = itertools.chain(old.parameters(), old.buffers(), root.parameters(), root.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if like is not None:
        new = new.to(device=like.device, dtype=like.dtype)
    if features.affine and old.bias is None:  # a norm may scale without shifting
        new.register_parameter("bias", None)
    for name in _TENSORS:
        mine, theirs = getattr(new, name, None), getattr(old, name, None)
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
            setattr(new, name, theirs)
    return new.train(old.training)
