"""Names of derived plans: they name a file and, in nnU-Net, the results folder of every training."""

import re
from collections.abc import Mapping
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.settings import BatchRenormSettings, UnetrSettings

LONGEST_NAME = 120
"""A results folder is named trainer__plans__configuration, and file systems allow 255 bytes."""


def check_plans_name(name: str) -> None:
    """Refuse what cannot name a file and a results folder (nnU-Net splits those at a double underscore)."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) or "__" in name or name.endswith(("_", ".", ".json")):
        raise PlansError(
            f"plans_name is {name!r}; it names a file and a results folder: letters, digits and _ . + -, beginning with "
            "a letter or digit, without a double underscore, and without .json"
        )
    if len(name) > LONGEST_NAME:
        raise PlansError(
            f"plans_name {name!r} is {len(name)} characters long; give one of at most {LONGEST_NAME} with --plans-name"
        )


PREFIXES = {
    "batch_size": "b",
    "micro_batch_size": "mb",
    "patch_size": "p",
    "num_stages": "s",
    "base_features": "f",
    "features_per_stage": "f",
    "norm_op": "",
    "norm_op_kwargs": "",
    "iterations_per_epoch": "it",
    "val_iterations_per_epoch": "vit",
    "initial_lr": "lr",
    "lr_scaling": "lr",
    "warmup_epochs": "warm",
    "checkpoint_minutes": "save",
    "seed": "seed",
    "disparity_batches": "disp",
    "population_samples": "pop",
    "reestimate_every": "every",
    "frozen_share": "frozen",
    "normalization_batch_size": "nb",
    "domain_statistics": "domains",
    "input_normalization": "",
    "batch_renorm": "brn-",
    "unetr": "unetr-",
}
"""How each option begins in the default name."""

SWITCHES = {
    ("replan_topology", True): "replan",
    ("keep_samples", True): "keep",
    ("batch_dice", True): "bdice",
    ("batch_dice", False): "sdice",
    ("activation_checkpointing", True): "ckpt",
    ("activation_checkpointing", False): "nockpt",
}
"""How options without a value of their own are called there."""


def new_name(old: str, new: str | None, asked: dict[str, Any]) -> str:
    """``new``, or the old name and what was asked for (not what differs: runs of a sweep are named alike)."""
    if new is None:
        new = "_".join([old, *(short(key, value) for key, value in asked.items())])
    if new == old:
        raise PlansError(f"plans_name {new} is that of the plans derived from; results of both would share a folder")
    check_plans_name(new)
    return new


def short(option: str, value: Any) -> str:
    """One option, as it stands in the default name: ``b16``, ``p64x160x160``, ``replan``, ``s4``, ``GroupNorm``."""
    if isinstance(value, bool):
        return SWITCHES[option, value]
    if isinstance(value, BatchRenormSettings | UnetrSettings):
        value = value.to_block()
    if isinstance(value, Mapping):
        text = "-".join(f"{key}{value[key]}" for key in sorted(value)) or "default"
    elif isinstance(value, list):
        text = ("x" if option == "patch_size" else "-").join(str(item) for item in value)
    else:
        text = str(value)
    if option == "checkpoint_minutes":
        text = f"{value:g}"
    if option == "lr_scaling":
        text = {"linear": "lin"}.get(text, text)
    if option == "domain_statistics":
        text = str(len(value))
    if option == "norm_op":
        text = text.rsplit(".", 1)[-1]
    # What a keyword argument may be called or contain is not what a folder's name may.
    return PREFIXES[option] + re.sub(r"[^A-Za-z0-9.+-]", "", text)
