"""The machine that a command works on: its device, threads and processes, with nnU-Net's flags and defaults."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from nnunet_norm.errors import SetupError

if TYPE_CHECKING:
    import torch

DEVICES = ("cuda", "cpu", "mps")


def device_named(name: str) -> torch.device:
    """The device, and threads as nnUNetv2_predict sets them.

    Raises:
        SetupError: the machine has no such device.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise SetupError(f"-device {name} is not available on this machine: use -device cpu, or see why torch lacks it")
    if name == "cpu":
        torch.set_num_threads(cores())
    elif name == "cuda":
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
    return torch.device(name)


def cores() -> int:
    """Cores for this process: those that SLURM gave its job, else all that it may run on."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(int(granted), usable) if granted.isdecimal() else usable


def default_processes(variable: str) -> int:
    """nnU-Net's default number of processes: 3 unless the variable has another."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 3
