"""Trainer names: ``nnUNetTrainer<Norm>[_<N>epochs]``, resolved when nnU-Net asks for one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nnunet_norm.errors import TrainerNameError

if TYPE_CHECKING:
    from nnunet_norm.training.trainer import NormTrainer

_EPOCHS = re.compile(r"(?P<base>\w+?)_(?P<epochs>[1-9]\d*)epochs")


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
        name: What is asked for, ``nnUNetTrainerBRN_100epochs`` for example.
        namespace: The module's ``globals()``.

    Raises:
        AttributeError: If the name is not ours, as a module must.
        TrainerNameError: If the name begins like one of ours and the rest is no option. Not while another folder, which
            may well have such a trainer, is still to be searched.
    """
    leaves = leaf_trainers(namespace)
    match = _EPOCHS.fullmatch(name)
    if match and match["base"] in leaves:
        base = leaves[match["base"]]
        epochs = int(match["epochs"])
        return type(name, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, "epochs": epochs})
    if any(name.startswith(f"{leaf}_") for leaf in leaves) and not _other_folders():
        choice = ", ".join(leaves)
        raise TrainerNameError(f"-tr {name}: choose one of {choice}, with or without _<N>epochs (such as _250epochs)")
    raise AttributeError(f"no trainer {name!r}")


def _other_folders() -> bool:
    return len([f for f in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if f.strip()]) > 1


def trainer_names(namespace: Mapping[str, Any]) -> dict[str, str]:
    """Every written-down trainer of a module with the first line of its docstring."""
    return {name: (leaf.__doc__ or "").split("\n")[0] for name, leaf in leaf_trainers(namespace).items()}
