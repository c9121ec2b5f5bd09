"""What ``nnunet-norm plan`` looks at before it writes: images, GPUs and their memory."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_raw

from nnunet_norm.commands.plan_table import table
from nnunet_norm.errors import ArchitectureError, PlansError, SetupError
from nnunet_norm.planning import resolve_configuration
from nnunet_norm.planning.batches import check_shares
from nnunet_norm.planning.configurations import Configuration, Plans, heirs
from nnunet_norm.planning.fitting import Training, check_fits
from nnunet_norm.planning.images import check_changed_patches, fingerprint_in
from nnunet_norm.planning.memory import Network
from nnunet_norm.planning.schedule import EPOCHS, Schedule


def check_training(args: argparse.Namespace, plans: Plans, derived: Plans, folder: Path, dataset: str) -> None:
    """Print a table for each configuration that is named or changed, and refuse what cannot be trained as asked.

    One that follows a named one, as an heir or as a stage of its cascade, may have a batch that the GPUs cannot share: it is
    warned of, and its figures are those of one GPU.

    Args:
        args: of the command.
        plans: derived from.
        derived: not written yet.
        folder: of the preprocessed dataset.
        dataset: its name.

    Raises:
        PlansError: a patch larger than every image, a named configuration whose batch the GPUs cannot share, or more memory
            than ``--vram``.
        SetupError: ``--vram`` without the dataset's description, or ``-device cuda`` without a GPU.
    """
    _check_flags(args)
    fingerprint = fingerprint_in(folder)
    if fingerprint is not None:
        check_changed_patches(plans, derived, fingerprint)
    description = _description(folder, dataset)
    if args.vram is not None and description is None:
        raise SetupError(
            f"--vram {args.vram:g}: memory cannot be estimated without {folder}/dataset.json, which says how many channels "
            "and labels there are; run nnUNetv2_plan_experiment"
        )
    trainings = []
    for name in [*dict.fromkeys(args.c), *_following(args, plans, derived)]:
        resolved = resolve_configuration(derived, name)
        parts = _parts(resolved, name, args)
        memory = _training(args, derived, name, description, parts[0])
        asked_patch = args.patch_size if name in args.c else None
        print("\n".join(["", *table(name, resolved, asked_patch, parts, memory)]))
        _warn_of_warmup(resolved, name)
        trainings.append((name, memory))
    for name, memory in trainings:
        if args.vram is not None:
            _check_memory(args, derived, name, memory)


def _parts(resolved: Configuration, name: str, args: argparse.Namespace) -> list[int]:
    """Samples per process of a training; those of one process, and a warning, where another one's batch cannot be shared."""
    try:
        return check_shares(resolved, args.num_gpus, name)
    except PlansError as error:
        if name in args.c:
            raise
        print(f"\nWARNING: {error}")
        return [resolved["batch_size"]]


def _following(args: argparse.Namespace, plans: Plans, derived: Plans) -> list[str]:
    """Configurations that are not named and have changed, by what they say or inherit."""
    return [
        name
        for name in derived["configurations"]
        if name not in args.c and resolve_configuration(plans, name) != resolve_configuration(derived, name)
    ]


def _warn_of_warmup(resolved: Configuration, name: str) -> None:
    epochs = Schedule.of(resolved).warmup_epochs
    if epochs >= EPOCHS:
        print(
            f"WARNING: configuration {name}: warmup_epochs is {epochs}, and nnU-Net trains {EPOCHS} epochs: the learning "
            "rate never gets to the end of its rise; give fewer --warmup-epochs, or more epochs in the trainer's name"
        )


def _check_memory(args: argparse.Namespace, derived: Plans, name: str, memory: Training | str) -> None:
    if isinstance(memory, str):
        raise PlansError(f"--vram {args.vram:g}: {memory}; leave out --vram")
    try:
        check_fits(memory, args.vram)
    except PlansError as error:
        if name in args.c or any(name in heirs(derived, named) for named in args.c):
            raise
        # Batch and memory of a cascade's other stage are its own: flags act on it only where it is named.
        raise PlansError(f"{error}; name {name} in -c too, where these flags are to act") from error


def _check_flags(args: argparse.Namespace) -> None:
    if args.num_gpus < 1:
        raise PlansError(f"--num-gpus is {args.num_gpus}; it must be at least 1")
    if args.vram is not None and not args.vram > 0:
        raise PlansError(f"--vram is {args.vram:g}; it must be the memory of a GPU in GB, above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("-device cuda is not available on this machine: leave it out, and memory is estimated")


def _description(folder: Path, dataset: str) -> dict[str, Any] | None:
    """The dataset's ``dataset.json``: of the preprocessed data, or else of the raw data."""
    paths = [folder / "dataset.json"]
    if nnUNet_raw.is_set():
        paths.append(Path(str(nnUNet_raw), dataset, "dataset.json"))
    for path in paths:
        if path.is_file():
            description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            # A description without these is refused by whoever needs them; here it only leaves memory unknown.
            if "labels" in description and {"channel_names", "modality"} & description.keys():
                return description
    return None


def _training(
    args: argparse.Namespace, derived: Plans, name: str, description: dict[str, Any] | None, samples: int
) -> Training | str:
    """The memory of a configuration's training, or why it is not known."""
    if description is None:
        return "there is no dataset.json that says how many channels and labels there are"
    device = torch.device("cuda") if args.device != "cpu" and torch.cuda.is_available() else None
    training = Training(Network.of(derived, name, description), samples, device)
    try:
        training.memory()
    except (PlansError, ArchitectureError) as error:
        return str(error)
    return training
