"""What can be refused before a training has written anything."""

from __future__ import annotations

import argparse
import io
import os
import socket
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_norm.errors import LaunchError, SetupError
from nnunet_norm.planning import load_plans, resolve_configuration
from nnunet_norm.planning.batches import check_shares
from nnunet_norm.planning.datasets import dataset_name, require_folders
from nnunet_norm.prediction.model_folder import trainers_on_search_path
from nnunet_norm.training.scaled_trainer import ScaledTrainer

VARIABLES = ("nnUNet_compile",)
"""Variables of nnU-Net on which it depends what a process computes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained and on what, with the flags of ``nnUNetv2_train``."""
    parser.add_argument("dataset", metavar="DATASET", help="name or id of the dataset")
    parser.add_argument("configuration", metavar="CONFIG", help="configuration to train, e.g. 3d_fullres")
    parser.add_argument("fold", metavar="FOLD", help="fold of the cross-validation, 0 to 4, or all")
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="one of those that nnunet-norm trainers lists")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: nnUNetPlans")
    parser.add_argument("-pretrained_weights", metavar="FILE", help="checkpoint to start from")
    parser.add_argument(
        "--npz", action="store_true", help="save probabilities of the final validation, to find the best ensemble"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--c", action="store_true", help="continue from the newest checkpoint")
    start.add_argument("--val", action="store_true", help="run the validation only; the training must have finished")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best instead of checkpoint_final")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    parser.add_argument("-device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--backend", choices=("nccl", "gloo"), help="how processes talk (default: nccl with -device cuda, else gloo)"
    )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that exclude each other.

    Raises:
        LaunchError: For ``-pretrained_weights`` with a training that began already, or with a file that is not there;
            ``--val_best`` without checkpoints; a fold that is none.
    """
    if args.pretrained_weights is not None:
        if args.c or args.val:
            raise LaunchError("-pretrained_weights starts a training, --c and --val go on with one: leave one out")
        if not Path(args.pretrained_weights).is_file():
            raise LaunchError(f"-pretrained_weights {args.pretrained_weights}: there is no such file")
    if args.val_best and args.disable_checkpointing:
        raise LaunchError("--val_best needs a checkpoint: leave --disable_checkpointing out")
    if args.fold != "all" and not args.fold.isdecimal():
        raise LaunchError(f"fold {args.fold!r}: give a number, or all")


def check_machine(args: argparse.Namespace, processes: int) -> None:
    """Refuse a device or a backend that this machine does not have.

    Args:
        args: Of :func:`add_arguments`.
        processes: That are to run on this machine.

    Raises:
        LaunchError: For a backend that does not fit the device, no GPU, or more processes than GPUs.
    """
    host = socket.gethostname()
    if args.device == "cpu":
        if args.backend == "nccl":
            raise LaunchError("--backend nccl is for GPUs: with -device cpu use --backend gloo")
        return
    gpus = torch.cuda.device_count()
    if not gpus:
        flag = "--backend nccl" if args.backend == "nccl" else "-device cuda"
        raise LaunchError(f"{flag}: torch finds no GPU on {host}; train with -device cpu, which talks through gloo")
    if processes > gpus:
        raise LaunchError(
            f"{processes} processes on {host}, which has {gpus} GPU(s): start at most {gpus} there (-num_gpus)"
        )
    if processes > 1 and args.backend != "gloo" and not dist.is_nccl_available():
        raise LaunchError("--backend nccl: this build of torch has none; use --backend gloo")


def what_is_trained(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """Everything that all processes must have alike, by name: plans, dataset, cases, split, arguments, versions.

    Args:
        args: Of :func:`add_arguments`.
        processes: On all machines together.

    Raises:
        SetupError: A folder of nnU-Net is not set, or there is no such dataset.
        PlansError: The plans or the configuration are not there, or the processes cannot share the batch.
        LaunchError: No such trainer, or one that cannot be trained so.
    """
    require_folders(nnUNet_preprocessed, nnUNet_results)
    dataset = Path(str(nnUNet_preprocessed), dataset_name(args.dataset))
    plans = load_plans(dataset, args.p)
    configuration = resolve_configuration(plans, args.configuration)
    check_shares(configuration, processes, args.configuration)
    trainer = find_trainer(args.tr)
    if processes > 1 and not issubclass(trainer, ScaledTrainer):
        raise LaunchError(f"-tr {args.tr} is not of nnunet_norm: train it with nnUNetv2_train -num_gpus {processes}")
    split = dataset / "splits_final.json"
    cases = dataset / configuration["data_identifier"]
    if not cases.is_dir():
        raise SetupError(f"{cases} is not there: run nnUNetv2_preprocess -c {args.configuration} first")
    return {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("dataset", "debug")},
        "plans": plans,
        "dataset.json": load_json(str(dataset / "dataset.json")),
        "splits_final.json": load_json(str(split)) if split.is_file() else None,
        "preprocessed cases": sorted(path.name for path in cases.glob("*.pkl")),
        "versions": {name: version(name) for name in ("nnunet_norm", "nnunetv2", "torch")},
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The trainer's class, by nnU-Net's own lookup, without its messages.

    Raises:
        LaunchError: If there is none.
        TrainerNameError: As :func:`nnunet_norm.training.naming.resolve_trainer`.
    """
    try:
        with redirect_stdout(io.StringIO()), trainers_on_search_path():
            found: type[nnUNetTrainer] = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise LaunchError(
            f"-tr {name}: there is no such trainer; nnunet-norm trainers lists those of this package"
        ) from error
    return found
