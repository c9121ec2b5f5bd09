"""Several processes that train one network: on any device, none ever waiting alone, and one that writes."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_norm.errors import LaunchError, NnunetNormError
from nnunet_norm.layers.stepping import fit_for_steps
from nnunet_norm.writing import write_json

LONGEST_WAIT = timedelta(days=1)
"""How long processes wait for one that computes metrics, unpacks a dataset, or predicts an image more than they do."""

SECONDS_UNTIL_SEEN = 60
"""How long a file of one node may take until others see it; network file systems remember what they saw for so long."""


class RefusedByAllError(LaunchError):
    """A refusal that every process raises, so that one of them is enough to say it."""


@contextmanager
def ddp_on_any_device(trainer: nnUNetTrainer) -> Iterator[None]:
    """Inside, nnU-Net's ``initialize`` wraps the network of ``trainer`` for its own device, and leaves buffers alone.

    nnU-Net gives ``DistributedDataParallel`` the rank as the number of a GPU: wrong on a CPU, and on all nodes but the first.

    And by default the wrapper hands the first process's buffers to all others before a forward pass, also in eval mode, if it
    is the first one or follows one with gradients: that is a collective call. Processes that predict different numbers of
    tiles, as in the final validation, where one may even have none, then wait for each other until a time limit ends the
    training. Without that no forward in eval mode is a collective call. Norms that synchronize keep their statistics equal
    themselves; for others there is :func:`share_buffers`.

    Where there is no GPU, torch's norms with running statistics become ours, which synchronize there too.

    Args:
        trainer: Whose ``device`` is that of this process.
    """

    def wrap(network: nn.Module, device_ids: Any = None, **kwargs: Any) -> DistributedDataParallel:
        del device_ids  # by rank
        own = [trainer.device.index] if trainer.device.type == "cuda" else None
        if own is None:  # the wrapper refuses torch's SyncBatchNorm, which is for GPUs alone
            fit_for_steps(network)
        wrapped = DistributedDataParallel(network, device_ids=own, **kwargs)
        wrapped.broadcast_buffers = False  # the argument has another name from torch 2.13 on, this has not
        return wrapped

    with patch.object(import_module(nnUNetTrainer.__module__), "DDP", wrap):
        yield


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Give all processes the buffers of the first, in place, with one collective call for the whole network.

    Args:
        network: The same on all processes. Every tensor counts once, however many modules hold it. Whole numbers are exact up
            to 2^53.
    """
    buffers = list(network.buffers())
    if not buffers:
        return
    flat = torch.cat([buffer.reshape(-1).double() for buffer in buffers])
    dist.broadcast(flat, src=0)
    if dist.get_rank() != 0:
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


@contextmanager
def patient_barriers(trainer: nnUNetTrainer) -> Iterator[Any]:
    """Inside, ``torch.distributed.barrier()`` waits for :data:`LONGEST_WAIT`; gives a process group that does so, too.

    NCCL ends a training whose processes wait 10 minutes for each other. That is right in a step, and wrong where their work
    is unequal. A process that dies does not keep the others waiting: whoever started it ends them.

    Args:
        trainer: With one process alone there is no group.
    """
    if not trainer.is_ddp:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    with patch.object(dist, "barrier", partial(dist.barrier, group=group)):
        yield group


@contextmanager
def only_first_process_writes(trainer: nnUNetTrainer) -> Iterator[None]:
    """Around nnU-Net's ``on_train_start``: of several processes the first one alone writes files.

    nnU-Net's processes all write ``plans.json``, ``dataset.json`` and the fingerprint, at the same time; and each makes the
    split if there is none, so that one may read what another has half written. Here the first makes it while the others wait.
    The picture of the architecture is left out: its forward pass on the first process alone would wait for the others.
    """
    if not trainer.is_ddp:
        yield
        return
    first = trainer.local_rank == 0  # nnU-Net's name for the rank among all
    module = import_module(nnUNetTrainer.__module__)
    without_copies = SimpleNamespace(**vars(shutil) | {"copyfile": _nothing})
    with (
        patient_barriers(trainer),
        patch.object(trainer, "plot_network_architecture", _nothing),
        patch.object(module, "save_json", module.save_json if first else _nothing),
        patch.object(module, "shutil", shutil if first else without_copies),
    ):
        if first and not (Path(trainer.preprocessed_dataset_folder_base) / "splits_final.json").is_file():
            trainer.do_split()
        dist.barrier()
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what another process does."""


@contextmanager
def refused_by_all() -> Iterator[None]:
    """Inside, what one process refuses all processes refuse: none is left waiting for one that has gone.

    For a block in which no process waits for another. Without a process group the refusal is raised as it is.

    Raises:
        RefusedByAllError: With the refusal of the first process that has one.
    """
    if not dist.is_initialized():
        yield
        return
    refusal = None
    try:
        yield
    except NnunetNormError as error:
        refusal = error
    found = of_all_processes(None if refusal is None else str(refusal))
    for rank, (host, text) in enumerate(found):
        if text is not None:
            alone = sum(other is not None for _, other in found) < len(found)
            raise RefusedByAllError(f"process {rank} on {host}: {text}" if alone else text) from refusal


def agree(parts: Mapping[str, Any]) -> None:
    """Refuse to train unless all processes hold the same.

    A process with other plans or another split would train another network, or make other collective calls and wait for ever.

    Args:
        parts: By a name for the user, anything that JSON can hold.

    Raises:
        RefusedByAllError: With the first part that differs, and which processes differ from the first.
    """
    if not dist.is_initialized():
        return
    every = of_all_processes({name: _digest(value) for name, value in parts.items()})
    (first_host, first), *others = every
    for name, digest in first.items():
        differ = [f"{rank} on {host}" for rank, (host, own) in enumerate(others, 1) if own.get(name) != digest]
        if differ:
            raise RefusedByAllError(
                f"{name}: not the same for all processes; {', '.join(differ)} differ from 0 on {first_host}: give all nodes "
                "the same files, arguments and versions"
            )


def gathered(value: Any, group: Any = None) -> list[Any]:
    """``value`` of every process, in the order of the ranks; of this one alone without a process group."""
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value, group=group)
    return every


def of_all_processes(value: Any) -> list[tuple[str, Any]]:
    """Every process's host and value, see :func:`gathered`."""
    return gathered((socket.gethostname(), value))


def check_shared(folder: str | Path) -> None:
    """Refuse a folder that is not one and the same for all processes.

    Validation cases are predicted by all, and counted by the first: what another node wrote into a folder of its own would
    be missing without a word.

    Raises:
        RefusedByAllError: If a process does not see what the first wrote.
    """
    if not dist.is_initialized():
        return
    token = of_all_processes(uuid.uuid4().hex)[0][1]
    path = Path(folder) / f".nnunet_norm_shared_{token}"
    with refused_by_all():
        if dist.get_rank() == 0:
            write_json(path, token)
    try:
        with refused_by_all():
            give_up = time.monotonic() + SECONDS_UNTIL_SEEN
            while not path.is_file():
                if time.monotonic() > give_up:
                    raise LaunchError(
                        f"nnUNet_results: the first process writes to another {folder}: all nodes need one file system"
                    )
                time.sleep(0.1)
    finally:
        path.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
