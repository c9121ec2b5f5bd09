"""One process of a training: ``torchrun [its options] -m nnunet_norm.training.launch DATASET CONFIG FOLD -tr TRAINER``.

torchrun starts as many as it is told to, on one machine or several, and says to each which it is. Without torchrun there is
one. The arguments are those of ``nnUNetv2_train``; ``nnunet-norm train`` runs torchrun with what it needs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.backends import cudnn
from torch.distributed.elastic.multiprocessing.errors import record

from nnunet_norm.errors import LaunchError, NnunetNormError
from nnunet_norm.orphans import end_children_with_this_process, end_with_parent
from nnunet_norm.prediction.model_folder import trainers_on_search_path
from nnunet_norm.training.distributed import (
    RefusedByAllError,
    agree,
    check_shared,
    of_all_processes,
    refused_by_all,
)
from nnunet_norm.training.preflight import add_arguments, check_flags, check_machine, what_is_trained
from nnunet_norm.training.restarting import agent, begin_or_resume, newest_checkpoint

USER_ERROR, INTERRUPTED = 2, 130
"""Exit codes of a refusal, and after Ctrl-C."""

LONGEST_STEP = timedelta(minutes=30)
"""How long a process waits for the others in a step of the training, and at the beginning."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train and validate; ends with code 2 after a refusal, which one process of each machine says in one line."""
    parser = argparse.ArgumentParser(prog="nnunet_norm.training.launch", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    end_children_with_this_process()
    if agent() is not None:
        end_with_parent()
    try:
        with _process_group(args), trainers_on_search_path():
            train(args)
    except KeyboardInterrupt:  # torchrun's command says so
        sys.exit(INTERRUPTED)
    except NnunetNormError as error:
        said_here = not isinstance(error, RefusedByAllError) or _local_rank() == 0
        parser.exit(USER_ERROR, f"{parser.prog}: {error}\n" if said_here else None)


def train(args: argparse.Namespace) -> None:
    """One process's part in a training and its validation, with what nnU-Net's own program does.

    Args:
        args: Of :func:`nnunet_norm.training.preflight.add_arguments`.

    Raises:
        NnunetNormError: What cannot be trained; before anything is written, if it can be known by then.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    with refused_by_all():
        check_flags(args)
        check_machine(args, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        trained = what_is_trained(args, processes)
    agree(trained)
    # An agent counts the restarts after its own processes' failures alone, so that the counts may differ.
    started_again = any(int(count) for _, count in of_all_processes(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    trainer = _trainer(args, started_again)
    _load_weights(trainer, args, started_again)
    if not args.val:
        trainer.run_training()
    if args.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_best.pth"))
    trainer.perform_actual_validation(args.npz)


def _trainer(args: argparse.Namespace, started_again: bool) -> nnUNetTrainer:
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", _local_rank())
        torch.cuda.set_device(device)
        torch.set_num_threads(1)  # as nnU-Net's program does
        cudnn.deterministic = False
        cudnn.benchmark = True
    if dist.is_initialized() and dist.get_rank() != 0:
        os.environ["nnUNet_wandb_enabled"] = "0"  # one training is one run
    fold = args.fold if args.fold == "all" else int(args.fold)
    with refused_by_all():
        trainer = get_trainer_from_args(
            *(args.dataset, args.configuration, fold, args.tr, args.p),
            continue_training=args.c or started_again,
            device=device,
        )
    trainer.disable_checkpointing = args.disable_checkpointing
    return trainer


def _load_weights(trainer: nnUNetTrainer, args: argparse.Namespace, started_again: bool) -> None:
    """A checkpoint to go on with, weights to start from, or nothing; the first process decides for all."""
    folder = Path(trainer.output_folder)
    check_shared(folder)
    agents = [name for _, name in of_all_processes(agent()) if name is not None]
    found: Path | None = None
    with refused_by_all():
        if args.val and not (folder / "checkpoint_final.pth").is_file():
            raise LaunchError(f"--val: there is no checkpoint_final.pth in {folder}; finish the training first (--c)")
        if trainer.local_rank == 0 and args.c:  # nnU-Net's name for the rank among all
            found = newest_checkpoint(folder)
        elif trainer.local_rank == 0 and agents and not args.val:
            found = begin_or_resume(folder, agents, started_again=started_again)
    checkpoint = of_all_processes(found)[0][1]
    if checkpoint is None:
        if args.c:
            trainer.print_to_log_file("WARNING: there is no checkpoint to continue from: the training starts afresh")
        maybe_load_checkpoint(trainer, False, args.val, args.pretrained_weights)
        return
    trainer.load_checkpoint(str(checkpoint))
    agree({checkpoint.name: [trainer.current_epoch, checkpoint.stat().st_size]})
    trainer.print_to_log_file(f"The training goes on with epoch {trainer.current_epoch}, from {checkpoint.name}")


@contextmanager
def _process_group(args: argparse.Namespace) -> Iterator[None]:
    """Inside, the processes that torchrun started can talk to each other; one alone needs nothing.

    They always have gloo, so that they can tell each other what is wrong before a GPU is used. After an error of this process
    alone the group is left to the operating system: to end it needs the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # Without a GPU NCCL cannot even be set up; that it was asked for is refused later, by all machines together.
    nccl = args.device == "cuda" and args.backend != "gloo" and torch.cuda.is_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=LONGEST_STEP)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"processes cannot meet at {place} ({reason}): start them with torchrun, on a port that is free"
        ) from error
    try:
        yield
        dist.barrier()
    except RefusedByAllError:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


if __name__ == "__main__":
    record(main)()  # an error reaches torchrun with its traceback
