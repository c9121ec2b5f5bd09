"""What ``nnunet-norm plan`` says about a configuration before it writes: network, patch, batch, memory, length."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from nnunet_norm.architectures import TOKEN, UNETR
from nnunet_norm.layers import IMAGE, TILE
from nnunet_norm.layers.input_normalization import QUANTILES
from nnunet_norm.planning.fitting import Training, counted
from nnunet_norm.planning.schedule import EPOCHS, Schedule
from nnunet_norm.planning.topology import as_text, total_stride
from nnunet_norm.settings import NormSettings

Row = tuple[str, str]


INPUTS = {IMAGE: "of every image", TILE: "of every tile, which makes seams,"}
"""Whose quantiles normalize, in words."""


def table(
    name: str, resolved: dict[str, Any], asked_patch: Sequence[int] | None, parts: list[int], memory: Training | str
) -> list[str]:
    """Lines about one configuration.

    Args:
        name: of the configuration.
        resolved: with everything that it inherits.
        asked_patch: the patch before it was made divisible; None if none was asked for.
        parts: samples per GPU.
        memory: of the training, or why there is no figure.
    """
    schedule = Schedule.of(resolved)
    rows = [
        ("topology", _topology(resolved, name)),
        ("patch", _patch(resolved["patch_size"], asked_patch)),
        ("batch", _batch(resolved, parts)),
        ("voxels per step", f"{math.prod(resolved['patch_size']) * schedule.batch_size:,}"),
        ("memory per GPU", _memory(memory)),
        ("steps", _steps(schedule)),
        ("learning rate", _learning_rate(schedule)),
    ]
    kind = NormSettings.from_configuration(resolved).input_normalization
    if kind is not None:
        rows.append(("input", f"quantiles {QUANTILES[0]} and {QUANTILES[1]} {INPUTS[kind]} become 0 and 1 ({kind})"))
    width = max(len(key) for key, _ in rows)
    return [name, *(f"  {key:<{width}}  {value}" for key, value in rows)]


def _topology(resolved: dict[str, Any], name: str) -> str:
    sizes = NormSettings.from_configuration(resolved).unetr
    if sizes is not None:
        listed = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(sizes).items())
        return f"{UNETR} (trainers with _{UNETR}), tokens of {as_text([TOKEN] * len(resolved['patch_size']))}, {listed}"
    architecture = resolved["architecture"]
    network, kwargs = architecture["network_class_name"].rsplit(".", 1)[-1], architecture["arch_kwargs"]
    if "strides" not in kwargs or "n_stages" not in kwargs:
        return str(network)
    features = kwargs["features_per_stage"]
    listed = f"{features}" if isinstance(features, int) else " ".join(map(str, features))
    stride = total_stride(architecture, len(resolved["patch_size"]), name)
    return f"{network}, {kwargs['n_stages']} stages, total stride {as_text(stride)}, features {listed}"


def _patch(patch: Sequence[int], asked: Sequence[int] | None) -> str:
    text = f"{as_text(patch)}, {math.prod(patch):,} voxels"
    return text if asked is None or list(asked) == list(patch) else f"{text} (asked for {as_text(asked)})"


def _batch(resolved: dict[str, Any], parts: list[int]) -> str:
    text = counted(resolved["batch_size"], "sample")
    if len(parts) > 1:
        each = str(parts[0]) if parts[0] == parts[-1] else f"{parts[0]} or {parts[-1]}"
        text += f", {each} on each of {len(parts)} GPUs"
    micro = NormSettings.from_configuration(resolved).micro_batch_size
    if micro is not None:
        text += f", {min(micro, parts[0])} at once in the network"
    return text


def _memory(memory: Training | str) -> str:
    if isinstance(memory, str):
        return f"unknown: {memory}"
    text = f"{memory.gigabytes:.1f} GB with {counted(memory.at_once, 'sample')} at once"
    if memory.checkpointed:
        text += ", activations computed again"
    return f"{text} ({memory.source})"


def _steps(schedule: Schedule) -> str:
    steps = schedule.iterations_per_epoch * EPOCHS
    validation = counted(schedule.val_iterations_per_epoch, "validation step")
    return (
        f"{schedule.iterations_per_epoch} x {EPOCHS} epochs = {steps:,}, with {steps * schedule.batch_size:,} samples; "
        f"{validation} per epoch (other epochs: _<N>epochs in the trainer's name)"
    )


def _learning_rate(schedule: Schedule) -> str:
    text = f"{schedule.initial_lr:.4g}"
    if not schedule.warmup_epochs:
        return f"{text}, no warm-up"
    return f"{text}, after {counted(schedule.warmup_epochs, 'epoch')} of warm-up"
