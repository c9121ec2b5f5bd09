"""Plans and a trainer's name that say different things are refused before anything is written."""

from collections.abc import Mapping
from pydoc import ErrorDuringImport, locate
from typing import Any

from torch import nn

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import NORMS

_STOCK = (nn.InstanceNorm2d, nn.InstanceNorm3d)
_SCHEDULE = ("momentum", "r_max", "d_max", "warmup_steps", "ramp_steps", "sync")


def named_norm(architecture: Mapping[str, Any]) -> str | None:
    """Which of :data:`nnunet_norm.layers.NORMS` the plans name as ``norm_op``; None for one that is not among them.

    Args:
        architecture: ``arch_kwargs`` of a configuration.

    Raises:
        PlansError: If the path leads nowhere (nnU-Net would build a network without norms).
    """
    path = architecture["norm_op"]
    if path is None:
        return "none"
    try:
        norm_op: Any = locate(path)
    except ErrorDuringImport as error:
        raise PlansError(f"plans: norm_op is {path!r}, which cannot be imported: {error.value}") from error
    if norm_op is None:
        raise PlansError(f"plans: norm_op is {path!r}, which cannot be imported; nnU-Net would train without norms")
    if norm_op in _STOCK:
        kwargs = architecture.get("norm_op_kwargs") or {}
        return "instance_norm_tracked" if kwargs.get("track_running_stats") else "instance_norm"
    return next((name for name, classes in NORMS.items() if norm_op in classes.values()), None)


def refuse_contradiction(configuration: Mapping[str, Any], norm: str | None, trainer_name: str) -> None:
    """Refuse plans that name another norm than the trainer's name does.

    InstanceNorm in the plans is nnU-Net's own choice for every dataset and contradicts nothing; any other norm was put
    there by someone who meant it.

    Args:
        configuration: The configuration, inheritance resolved.
        norm: The trainer's norm, a name of :data:`nnunet_norm.layers.NORMS`; None for "what the plans name".
        trainer_name: For the message.

    Raises:
        PlansError: If they contradict each other.
    """
    architecture = configuration.get("architecture", {}).get("arch_kwargs", {})
    if "norm_op" not in architecture:
        return
    named = named_norm(architecture)
    if norm is None or named == "instance_norm":
        return
    if named != norm:
        raise PlansError(
            f"plans: norm_op is {architecture['norm_op']!r} and -tr {trainer_name} says {norm}; "
            "take -tr nnUNetTrainerNorm for the norm of the plans, or plans without a norm of their own"
        )
    twice = [key for key in _SCHEDULE if norm == "batch_renorm" and key in (architecture.get("norm_op_kwargs") or {})]
    if twice:
        raise PlansError(
            f"plans: norm_op_kwargs has {', '.join(twice)}, whose home with -tr {trainer_name} is "
            "nnunet_norm.batch_renorm of the configuration"
        )
