"""What can be asked of :func:`nnunet_norm.planning.derive_plans`, and requests in plain types."""

import json
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.planning.schedule import LR_SCALINGS
from nnunet_norm.settings import BatchRenormSettings, UnetrSettings

NAMED_ONLY = {
    *("batch_size", "batch_dice", "patch_size", "replan_topology"),
    *("micro_batch_size", "activation_checkpointing", "lr_scaling", "keep_samples"),
    "unetr",  # its patch is made of whole tokens
}
"""What is bound to a resolution and to the memory it takes: never carried over to the other stage of a cascade."""

ARCHITECTURE = ("num_stages", "base_features", "features_per_stage", "norm_op", "norm_op_kwargs")

COUNTS = {
    "batch_size",
    "micro_batch_size",
    "num_stages",
    "base_features",
    "iterations_per_epoch",
    "val_iterations_per_epoch",
    "disparity_batches",
    "population_samples",
    "reestimate_every",
    "normalization_batch_size",
}

SETTINGS = {
    "micro_batch_size": "micro_batch_size",
    "activation_checkpointing": "activation_checkpointing",
    "iterations_per_epoch": "num_iterations_per_epoch",
    "val_iterations_per_epoch": "num_val_iterations_per_epoch",
    "initial_lr": "initial_lr",
    "warmup_epochs": "warmup_epochs",
    "checkpoint_minutes": "checkpoint_minutes",
    "seed": "seed",
    "disparity_batches": "disparity_batches",
    "population_samples": "population_samples",
    "reestimate_every": "reestimate_every",
    "frozen_share": "frozen_share",
    "normalization_batch_size": "normalization_batch_size",
    "domain_statistics": "domain_statistics",
    "input_normalization": "input_normalization",
    "batch_renorm": "batch_renorm",
    "unetr": "unetr",
}
"""Options and the entries of the block ``"nnunet_norm"`` that they set."""

SCALED = ("keep_samples", "lr_scaling")
"""Options that set an entry of the block by the ratio of the new batch to the old one."""

OPTIONS = ("batch_size", "batch_dice", "patch_size", "replan_topology", *ARCHITECTURE, *SCALED, *SETTINGS)
"""Everything that can be asked for, in the order in which it stands in the default name."""

SWITCHES = {"replan_topology", "keep_samples"}
"""Options that are off where they are not asked for; those of :data:`EITHER` may be asked to be off."""

EITHER = {"batch_dice", "activation_checkpointing"}

KINDS: tuple[tuple[str, Any, str], ...] = (
    ("norm_op_kwargs", Mapping, "keyword arguments with their values"),
    ("domain_statistics", Iterable, "a list of names"),
    ("batch_renorm", (Mapping, BatchRenormSettings), "an object of settings"),
    ("unetr", (Mapping, UnetrSettings), "an object of settings"),
)
"""Options that are read as something else than a number, and what they may be."""

EXCLUSIVE = (
    ("base_features", "features_per_stage", "how many features"),
    ("lr_scaling", "initial_lr", "what the learning rate is"),
    ("keep_samples", "iterations_per_epoch", "how long an epoch is"),
)
"""Pairs of options that say the same."""


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that ask for something."""
    return {
        name: value
        for name, value in options.items()
        if value is not None and not (name in SWITCHES and value is False)
    }


def asked_for(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, in plain types and in the order of :data:`OPTIONS`.

    Raises:
        PlansError: none was given, two that exclude each other, one that means nothing alone, or a value of the wrong type.
    """
    asked = given({name: options[name] for name in OPTIONS})
    if not asked:
        raise PlansError(f"nothing to change: give at least one of {', '.join(OPTIONS)}")
    for one, other, what in EXCLUSIVE:
        if {one, other} <= asked.keys():
            raise PlansError(f"{one} and {other} both say {what}; give one of them")
    for name in COUNTS & asked.keys():
        asked[name] = _whole(name, asked[name], 1)
    if "warmup_epochs" in asked:
        asked["warmup_epochs"] = _whole("warmup_epochs", asked["warmup_epochs"], 0)
    for name in {"patch_size", "features_per_stage"} & asked.keys():
        if not isinstance(asked[name], Iterable) or isinstance(asked[name], str):
            raise PlansError(f"{name} is {asked[name]!r}; it must be a sequence of whole numbers")
        asked[name] = [_whole(name, value, 1) for value in asked[name]]
    for name, kinds, wanted in KINDS:
        if name in asked and (not isinstance(asked[name], kinds) or isinstance(asked[name], str)):
            raise PlansError(f"{name} is {asked[name]!r}; it must be {wanted}")
    for name in EITHER & asked.keys():
        if not isinstance(asked[name], bool):
            raise PlansError(f"{name} is {asked[name]!r}; it must be true or false")
    if "domain_statistics" in asked:
        asked["domain_statistics"] = list(asked["domain_statistics"])
    if "lr_scaling" in asked and asked["lr_scaling"] not in LR_SCALINGS:
        raise PlansError(f"lr_scaling is {asked['lr_scaling']!r}; it must be one of {', '.join(LR_SCALINGS)}")
    for name in SCALED:
        if name in asked and "batch_size" not in asked:
            raise PlansError(
                f"{name} is {asked[name]!r} without batch_size; it follows the batch size: give batch_size too"
            )
    if "norm_op_kwargs" in asked:
        asked["norm_op_kwargs"] = _json_object("norm_op_kwargs", asked["norm_op_kwargs"])
    return asked


def _whole(name: str, value: object, least: int) -> int:
    """The value as an int of at least ``least``, or a refusal; NumPy's integers are welcome, booleans and floats are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise PlansError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return number


def _json_object(name: str, value: Any) -> dict[str, Any]:
    value = dict(value)
    try:
        json.dumps(value)
    except TypeError as error:
        raise PlansError(f"{name} {value!r} cannot stand in a JSON file: {error}") from error
    return value
