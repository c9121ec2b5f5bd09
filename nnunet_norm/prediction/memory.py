"""How much memory and disk there is, and how much this process has taken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

MOST_OF_IT = 0.8
"""Share of the memory that is available which a prediction may take, where nobody says how much."""


def size(count: int) -> str:
    """Bytes for the user."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def anonymous_memory() -> int:
    """Bytes of anonymous memory that this process has: what it allocated, mapped files left out. 0 where unknown."""
    return _kilobytes(Path("/proc/self/status"), "RssAnon") or 0


def default_max_memory() -> int | None:
    """Bytes that this process may come to, by what the machine and its control group have left; None where unknown."""
    left = [
        available for available in (_kilobytes(Path("/proc/meminfo"), "MemAvailable"), _left_in_group()) if available
    ]
    return anonymous_memory() + int(min(left) * MOST_OF_IT) if left else None


def free_disk(folder: Path) -> int:
    """Bytes that are free where the folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_on(device: torch.device) -> int:
    """Bytes that are free on a CUDA device, those that torch keeps for itself included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _left_in_group() -> int | None:
    """What the control group (a container, a SLURM job) may still take, where the system has cgroup v2."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].rpartition(":")[2].lstrip("/")
    except (OSError, IndexError):
        return None
    root = Path("/sys/fs/cgroup")
    found = []
    for folder in (root / group, *(root / group).parents):
        if not folder.is_relative_to(root):
            break
        try:
            most = int((folder / "memory.max").read_text())
            reclaimable = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            used = int((folder / "memory.current").read_text()) - int(reclaimable[1] if reclaimable else 0)
        except (OSError, ValueError):
            continue
        found.append(max(most - used, 0))
    return min(found) if found else None


def _kilobytes(file: Path, key: str) -> int | None:
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
