"""Train with one process per GPU, on one machine or several, and go on after a crash.

    nnunet-norm train 4 3d_fullres 0 -tr nnUNetTrainerBRN -num_gpus 2 --max-restarts 3

The arguments are those of nnUNetv2_train. On several machines, which need one file system, the same command runs on each, but
for its --node-rank:

    nnunet-norm train 4 3d_fullres 0 -tr nnUNetTrainerBRN -num_gpus 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29400

torchrun does the work: whatever ends one process ends all, and with --max-restarts all start again from the newest checkpoint
of this training. Plans say how often one is written (nnunet-norm plan --checkpoint-minutes).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.resources import files

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from nnunet_norm.commands.machine import cores
from nnunet_norm.commands.network import address_of, interface_with, refuse_taken_port
from nnunet_norm.errors import LaunchError
from nnunet_norm.prediction.model_folder import SEARCH_PATH
from nnunet_norm.training.preflight import add_arguments as add_training_arguments
from nnunet_norm.training.preflight import check_flags, check_machine, what_is_trained

PORT = 29400
"""torchrun's own, where the endpoint names none."""

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""On which torchrun ends its processes with it; SLURM and submitit send the last two, which would orphan them."""

REFUSED, FAILED = 2, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained; with how many processes, and where."""
    add_training_arguments(parser)
    group = parser.add_argument_group("processes")
    group.add_argument(
        "-num_gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on each machine, also with -device cpu (default: 1)",
    )
    group.add_argument(
        "--max-restarts", type=int, default=0, metavar="R", help="start again so often after a crash (default: 0)"
    )
    group.add_argument("--nnodes", type=int, default=1, metavar="K", help="machines (default: 1)")
    group.add_argument("--node-rank", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help=f"where they meet: machine 0, a free port (default port: {PORT})"
    )
    group.add_argument(
        "--rdzv-id", metavar="ID", help="name of the meeting, the same on all (default: from what is trained)"
    )
    group.add_argument("--local-addr", metavar="ADDRESS", help="this machine's address in the network to use")


def run(args: argparse.Namespace) -> None:
    """Check what can be checked, then let torchrun start the processes; ends with code 1 if one of them failed.

    Raises:
        NnunetNormError: If the training cannot be started so.
    """
    for flag, value, least in (("-num_gpus", args.num_gpus, 1), ("--nnodes", args.nnodes, 1)):
        if value < least:
            raise LaunchError(f"{flag} {value}: must be at least {least}")
    if args.max_restarts < 0:
        raise LaunchError(f"--max-restarts {args.max_restarts}: must be at least 0")
    check_flags(args)
    where = _machines(args)
    check_machine(args, args.num_gpus)
    what_is_trained(args, args.num_gpus * args.nnodes)
    _set_environment(args)
    command = [*where, "--nproc-per-node", str(args.num_gpus), "--max-restarts", str(args.max_restarts)]
    command += ["--signals-to-handle", _signals(), "-m", "nnunet_norm.training.launch", *_training_arguments(args)]
    try:
        torchrun.main(command)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == REFUSED:  # the process has said why
            sys.exit(REFUSED)
        print(error.format_msg(), file=sys.stderr)
        sys.exit(FAILED)
    except SignalException as error:
        sys.exit(128 + error.sigval.value)
    except RendezvousError as error:
        raise LaunchError(
            f"--rdzv-endpoint {args.rdzv_endpoint}: the machines did not meet ({' '.join(str(error).split())}): start the "
            "same command on all, and see that they reach machine 0 at this port"
        ) from error


def _signals() -> str:
    """Those of :data:`SIGNALS` that are not ignored here: nohup has the end of a session ignored."""
    return ",".join(name for name in SIGNALS if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN)


def _machines(args: argparse.Namespace) -> list[str]:
    """Where processes meet, as options of torchrun.

    Raises:
        LaunchError: For options that are missing, not a number, or name a port that is taken.
    """
    if args.nnodes == 1:
        for name in ("node_rank", "rdzv_endpoint", "rdzv_id", "local_addr"):
            if getattr(args, name) is not None:
                raise LaunchError(
                    f"--{name.replace('_', '-')} is for several machines: give their number with --nnodes"
                )
        return ["--standalone"]
    if args.node_rank is None or not 0 <= args.node_rank < args.nnodes:
        given = "is missing" if args.node_rank is None else f"{args.node_rank} is out of range"
        raise LaunchError(
            f"--nnodes {args.nnodes}: --node-rank {given}; give 0 on the machine of --rdzv-endpoint, then 1, ..."
        )
    if args.rdzv_endpoint is None:
        raise LaunchError(
            f"--nnodes {args.nnodes}: --rdzv-endpoint is missing; give HOST:PORT of machine 0 on all machines"
        )
    host, port = address_of(args.rdzv_endpoint, PORT)
    if args.node_rank == 0:
        refuse_taken_port(port)
    if args.local_addr is not None:
        interface_with(args.local_addr)
    name = args.rdzv_id or f"{args.dataset}-{args.configuration}-{args.fold}-{args.tr}-{args.p}"
    options = [
        "--nnodes",
        str(args.nnodes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{host}:{port}",
        "--rdzv-id",
        name,
    ]
    options += ["--rdzv-conf", f"is_host={int(args.node_rank == 0)}"]
    return options + (["--local-addr", args.local_addr] if args.local_addr else [])


def _set_environment(args: argparse.Namespace) -> None:
    """What torchrun and the processes read; what the user has set stays."""
    # Sharing the store of the meeting, a second training of the same processes may hang (pytorch issues 135712 and 108158).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault(SEARCH_PATH, str(files("nnunet_norm.trainers")))
    threads = max(cores() // args.num_gpus, 1) if args.device == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if args.local_addr is not None:
        # Otherwise they look up their own host name, which on many systems leads to themselves alone.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface_with(args.local_addr))


def _training_arguments(args: argparse.Namespace) -> list[str]:
    """The same arguments for each process."""
    given = [args.dataset, args.configuration, args.fold, "-tr", args.tr, "-p", args.p, "-device", args.device]
    for flag in ("-pretrained_weights", "--backend"):
        if (value := getattr(args, flag.strip("-"))) is not None:
            given += [flag, value]
    return given + [
        f"--{name}" for name in ("c", "val", "npz", "val_best", "disable_checkpointing") if getattr(args, name)
    ]
