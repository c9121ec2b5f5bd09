"""Training steps of one process and of several that share a batch, for ``training.py``.

Run by torchrun (or alone) as a program of its own it measures the steps of every contender and writes them to a file::

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/training_processes.py SETTINGS.json RESULT.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layers_measure import synchronize
from training_step import NORMS, Contender, Step, trainers

from nnunet_norm.writing import write_json

WARM_UP = 1

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""As ``nnunet_norm.training.launch`` has them."""


def synchronizing(sync: str) -> Contender:
    """BatchRenorm of which the processes share as much."""
    return replace(
        NORMS["batch_renorm"],
        title=f'BatchRenorm, sync="{sync}"',
        settings=lambda _: {"batch_renorm": {"sync": sync}},
    )


CONTENDERS = {
    "instance_norm": NORMS["instance_norm"],
    "batch_renorm_none": synchronizing("none"),
    "batch_renorm_running": synchronizing("running"),
    "batch_renorm_full": synchronizing("full"),
}


def in_processes(plans: dict[str, Any], mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start one process and several in turn; seconds of each step, a list per start.

    Returns:
        ``processes``, ``starts``, ``backend``, and ``contenders``: title, and under ``alone`` and ``together`` a list of
        seconds for each start.
    """
    rows: dict[str, dict[str, Any]] = {
        name: {"title": one.title, "alone": [], "together": []} for name, one in CONTENDERS.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        told = {key: getattr(args, key) for key in ("device", "classes", "rounds")}
        write_json(settings, {"plans": plans, "mode": mode} | told)
        counts = {"alone": 1, "together": args.processes}
        for start in range(args.starts):
            order = list(counts) if start % 2 == 0 else list(counts)[::-1]
            for key in order:
                print(f"  start {start + 1} of {args.starts}: {counts[key]} process(es)", flush=True)
                for name, seconds in started(counts[key], settings, Path(folder) / "result.json").items():
                    rows[name][key].append(seconds)
    return {"processes": args.processes, "starts": args.starts, "backend": BACKENDS[args.device], "contenders": rows}


def started(count: int, settings: Path, result: Path) -> dict[str, list[float]]:
    """What ``count`` processes measured; one runs without torchrun, as nnU-Net's trainings do."""
    result.unlink(missing_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    line = [sys.executable, *torchrun, __file__, str(settings), str(result)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return json.loads(result.read_text())


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """This process's device, within the group that torchrun's environment describes, if there is one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    own = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(own)
    if "RANK" not in os.environ:
        yield own
        return
    dist.init_process_group(BACKENDS[device])
    yield own
    dist.destroy_process_group()  # after an error torchrun ends them all


def step_seconds(step: Step, device: str) -> float:
    """Of one step of the slowest process."""
    if dist.is_initialized():
        dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    step.train()
    synchronize(device)
    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=step.trainer.device)
    if dist.is_initialized():
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken.item())


def main() -> None:
    settings, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    device, names = settings["device"], list(CONTENDERS)
    with (
        process_group(device) as own,
        trainers(CONTENDERS, settings["mode"], settings["plans"], settings["classes"], own) as made,
    ):
        rank = dist.get_rank() if dist.is_initialized() else 0
        steps = {name: Step(trainer, settings["classes"], seed=rank) for name, trainer in made.items()}
        for step in steps.values():
            for _ in range(WARM_UP):
                step.train()
        taken: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(settings["rounds"]):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                taken[name].append(step_seconds(steps[name], device))
        if rank == 0:
            write_json(result, taken)


if __name__ == "__main__":
    main()
