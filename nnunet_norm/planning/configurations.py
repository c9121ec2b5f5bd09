"""Configurations of a plans file as nnU-Net reads them: inheritance, cascades, and whether a network can be built."""

import copy
import pydoc
from collections.abc import Iterator
from typing import Any

import torch

from nnunet_norm.architectures import refuse_patch
from nnunet_norm.errors import PlansError
from nnunet_norm.planning.topology import as_text, total_stride
from nnunet_norm.settings import NormSettings

Plans = dict[str, Any]
Configuration = dict[str, Any]


def _lineage(plans: Plans, configuration: str) -> Iterator[str]:
    """The configuration, what it inherits from, what that inherits from, ..."""
    seen: list[str] = []
    name: str | None = configuration
    while name is not None:
        if name not in plans["configurations"]:
            child = f" (from which {seen[-1]} inherits)" if seen else ""
            raise PlansError(
                f"configuration {name}{child} is not in plans {plans['plans_name']}; "
                f"there are {', '.join(plans['configurations'])}"
            )
        if name in seen:
            raise PlansError(
                f"configuration {configuration}: inherits_from runs in a circle: {' -> '.join([*seen, name])}"
            )
        seen.append(name)
        yield name
        name = plans["configurations"][name].get("inherits_from")


def resolve_configuration(plans: Plans, configuration: str) -> Configuration:
    """A copy of the configuration with everything it inherits, as nnU-Net's PlansManager merges it.

    A child's key replaces the parent's as a whole; nested dictionaries are not merged.

    Raises:
        PlansError: no such configuration (those that exist are listed), or inheritance in a circle.
    """
    resolved: Configuration = {}
    for name in reversed(list(_lineage(plans, configuration))):
        resolved.update(copy.deepcopy(plans["configurations"][name]))
    return resolved


def heirs(plans: Plans, configuration: str) -> list[str]:
    """The other configurations that inherit from this one, directly or not."""
    return [name for name in plans["configurations"] if configuration in list(_lineage(plans, name))[1:]]


def _next_stages(resolved: Configuration) -> list[str]:
    following = resolved.get("next_stage") or []
    return [following] if isinstance(following, str) else list(following)


def cascade(plans: Plans, configuration: str) -> list[str]:
    """Every stage of the cascade that the configuration belongs to, in the order of training; itself if it is in none.

    Raises:
        PlansError: a stage that is missing, or a cascade that is not mapped both ways, which nnU-Net requires
            (``next_stage`` of the one names the other, whose ``previous_stage`` names the one).
    """
    resolved = resolve_configuration(plans, configuration)
    first = configuration
    ascended = [configuration]
    while previous := resolved.get("previous_stage"):
        if previous in ascended:
            raise PlansError(f"configuration {configuration}: its cascade runs in a circle through {previous}")
        ascended.append(previous)
        first, resolved = previous, resolve_configuration(plans, previous)
    stages: list[str] = []
    waiting = [first]
    while waiting:
        stage = waiting.pop(0)
        if stage in stages:
            raise PlansError(f"configuration {configuration}: its cascade runs in a circle through {stage}")
        stages.append(stage)
        for following in _next_stages(resolve_configuration(plans, stage)):
            named = resolve_configuration(plans, following).get("previous_stage")
            if named != stage:
                raise _one_way(stage, "next_stage", following, "previous_stage", named)
            waiting.append(following)
    if configuration not in stages:
        previous = resolve_configuration(plans, configuration)["previous_stage"]
        named = _next_stages(resolve_configuration(plans, previous))
        raise _one_way(configuration, "previous_stage", previous, "next_stage", named)
    return stages


def _one_way(stage: str, key: str, other: str, key_back: str, named: object) -> PlansError:
    return PlansError(
        f"configuration {stage}: {key} is {other}, but {other}'s {key_back} is {named!r}; "
        "a cascade has to be mapped both ways"
    )


def require_architecture(resolved: Configuration, configuration: str) -> dict[str, Any]:
    """The configuration's architecture.

    Raises:
        PlansError: the plans are of the format that nnU-Net wrote before it had this key.
    """
    if "architecture" not in resolved:
        raise PlansError(
            f"configuration {configuration} has no architecture: these plans were written by an old nnU-Net; "
            "run nnUNetv2_plan_experiment again"
        )
    architecture: dict[str, Any] = resolved["architecture"]
    return architecture


def locate(path: object, key: str, configuration: str) -> Any:
    """The object behind a dotted path.

    nnU-Net resolves these paths with ``pydoc.locate``, which returns None for a typo; a block whose norm is None is then
    built without a norm, in silence.

    Raises:
        PlansError: nothing callable is there, or its module cannot be imported.
    """
    try:
        found = pydoc.locate(path) if isinstance(path, str) else None
    except pydoc.ErrorDuringImport as error:
        raise PlansError(f"configuration {configuration}: {key} {path!r} cannot be imported: {error.value}") from error
    if not callable(found):
        raise PlansError(
            f"configuration {configuration}: {key} {path!r} is nowhere to be found; give the dotted path of a class, "
            "e.g. torch.nn.BatchNorm3d"
        )
    return found


def check_norm(architecture: dict[str, Any], ndim: int, configuration: str) -> None:
    """Build the norm as nnU-Net's blocks do, ``norm_op(channels, **norm_op_kwargs)``, and apply it once.

    Raises:
        PlansError: it takes other arguments (``torch.nn.GroupNorm`` has the number of groups first), or another number
            of spatial axes.
    """
    kwargs = architecture["arch_kwargs"]
    norm_op = locate(kwargs["norm_op"], "norm_op", configuration)
    norm_op_kwargs = kwargs.get("norm_op_kwargs") or {}
    try:
        norm = norm_op(32, **norm_op_kwargs)
        if not isinstance(norm, torch.nn.Module):
            raise TypeError("it does not make a torch.nn.Module")
        with torch.no_grad():
            norm.eval()(torch.zeros(2, 32, *[4] * ndim))
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PlansError(
            f"configuration {configuration}: norm_op {kwargs['norm_op']} does not work as norm_op(channels, "
            f"**{norm_op_kwargs}) on {ndim} spatial axes: {reason}"
        ) from error


def check_configuration(plans: Plans, configuration: str) -> None:
    """Refuse a configuration whose network nnU-Net could not build, or would build without some part.

    Raises:
        PlansError: a dotted path that leads nowhere, lists that do not have one entry per stage, a patch that the strides,
            or for a UNETR its tokens, do not divide, or a block ``"nnunet_norm"`` that is not valid.
    """
    resolved = resolve_configuration(plans, configuration)
    architecture = require_architecture(resolved, configuration)
    kwargs = architecture["arch_kwargs"]
    locate(architecture["network_class_name"], "network_class_name", configuration)
    for key in architecture["_kw_requires_import"]:
        if key not in kwargs:
            raise PlansError(f"configuration {configuration}: _kw_requires_import names {key}, which arch_kwargs lacks")
        if kwargs[key] is not None:
            locate(kwargs[key], key, configuration)
    if NormSettings.from_configuration(resolved).unetr is not None:
        refuse_patch(resolved["patch_size"], f"configuration {configuration}")
    elif (reason := indivisible(resolved, configuration)) is not None:
        raise PlansError(f"configuration {configuration}: {reason}; give patch_size, which is then corrected")


def indivisible(resolved: Configuration, configuration: str) -> str | None:
    """That the strides of the plans' network do not divide the patch; None if they do, or there are none."""
    patch, architecture = resolved["patch_size"], require_architecture(resolved, configuration)
    if "strides" not in architecture["arch_kwargs"]:
        return None
    stride = total_stride(architecture, len(patch), configuration)
    if all(size % step == 0 for size, step in zip(patch, stride, strict=True)):
        return None
    return f"patch size {as_text(patch)} is not divisible by the total stride {as_text(stride)}"
