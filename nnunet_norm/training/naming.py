"""Trainer names: ``nnUNetTrainer<Norm>[_UNETR][_<Loss>][_<N>epochs]``, resolved when nnU-Net asks for one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnunet_norm.architectures import ARCHITECTURES
from nnunet_norm.errors import TrainerNameError
from nnunet_norm.training.losses import LOSSES

if TYPE_CHECKING:
    from nnunet_norm.training.trainer import NormTrainer

OPTIONS = {
    "architecture": re.compile("|".join(ARCHITECTURES)),
    "loss_name": re.compile("|".join(LOSSES)),
    "epochs": re.compile("([1-9][0-9]*)epochs"),
}
"""What a trainer's name may say behind the norm, in this order: the class attribute that it sets, and how it is written."""


def leaf_trainers(namespace: Mapping[str, Any]) -> dict[str, type[NormTrainer]]:
    """The trainer classes written down in a module, by name."""
    return {
        name: value
        for name, value in namespace.items()
        if isinstance(value, type) and name.startswith("nnUNetTrainer") and hasattr(value, "norm")
    }


def resolve_trainer(name: str, namespace: Mapping[str, Any]) -> type[NormTrainer]:
    """The class for a name that is composed of a written-down trainer and options; for a module's ``__getattr__``.

    nnU-Net asks every module of every trainer folder whether it has the name (``hasattr``).

    Args:
        name: What is asked for, ``nnUNetTrainerBRN_DiceTopK_100epochs`` for example.
        namespace: The module's ``globals()``.

    Raises:
        AttributeError: If the name is not ours, as a module must.
        TrainerNameError: If the name begins like one of ours and the rest is no option, or options in another order. Not
            while another folder, which may well have such a trainer, is still to be searched.
    """
    leaves = leaf_trainers(namespace)
    begun = [leaf for leaf in leaves if name.startswith(f"{leaf}_")]
    remedy = f"choose one of {', '.join(leaves)}, with or without {options_line()}"
    for leaf in begun:
        said = _options(name.removeprefix(f"{leaf}_"))
        right = "_".join([leaf, *said.values()])
        if said and right == name:
            base = leaves[leaf]
            values = {key: int(text.removesuffix("epochs")) if key == "epochs" else text for key, text in said.items()}
            return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, **values})
        remedy = f"options stand in another order: take {right}" if said else remedy
    if begun and not _other_folders():
        raise TrainerNameError(f"-tr {name}: {remedy}")
    raise AttributeError(f"no trainer {name!r}")


def _options(text: str) -> dict[str, str]:
    """The options in what stands behind a trainer, in the right order; empty if anything else is there, or one twice."""
    parts = text.split("_")
    found = {key: part for key, pattern in OPTIONS.items() for part in parts if pattern.fullmatch(part)}
    return found if len(found) == len(parts) else {}


def options_line() -> str:
    """What may stand behind each trainer's name, for people."""
    architectures, losses = (", ".join(f"_{name}" for name in names) for names in (ARCHITECTURES, LOSSES))
    return f"{architectures}, _<Loss> ({losses}) and _<N>epochs behind it (such as _{next(iter(LOSSES))}_250epochs)"


def _other_folders() -> bool:
    return len([f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f.strip()]) > 1


def trainer_names(namespace: Mapping[str, Any]) -> dict[str, str]:
    """Every written-down trainer of a module with the first line of its docstring."""
    return {name: (leaf.__doc__ or "").split("\n")[0] for name, leaf in leaf_trainers(namespace).items()}
