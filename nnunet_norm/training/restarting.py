"""Where a training goes on after its processes were started again."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_norm.writing import is_whole_checkpoint, write_json

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""What nnU-Net writes that a training can be continued from."""

MARKER = ".nnunet_norm_run.json"
"""Stands in the training's folder: who trains, and which checkpoints were there before."""


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint that was written last; nnU-Net prefers a final one, even if it is that of an older training."""
    whole = [path for path in _checkpoints(folder) if is_whole_checkpoint(path)]
    return max(whole, key=lambda path: path.stat().st_mtime_ns, default=None)


def begin_or_resume(folder: str | os.PathLike[str], agents: Sequence[str]) -> Path | None:
    """The newest whole checkpoint that this very run wrote; None if it has just begun, or has written none yet.

    A run is known by torchrun's agents, which stay while they start their processes again: one of them that took part before
    makes it the same run, also if another was replaced. What lay in the folder when the run began is another training's. By
    comparing what files were, not times, this needs no clocks that agree.

    Args:
        folder: The training's.
        agents: Of all processes, :func:`agent` of each.

    Raises:
        OutputError: If the folder cannot be written to.
    """
    marker = Path(folder) / MARKER
    known = _read(marker)
    if not set(agents) & set(known["agents"]):
        before = {path.name: _state(path) for path in _checkpoints(folder)}
        write_json(marker, {"agents": sorted(set(agents)), "before": before})
        return None
    write_json(marker, known | {"agents": sorted({*agents, *known["agents"]})})
    own = [
        path
        for path in _checkpoints(folder)
        if is_whole_checkpoint(path) and _state(path) != known["before"].get(path.name)
    ]
    return max(own, key=lambda path: path.stat().st_mtime_ns, default=None)


def agent() -> str | None:
    """The process of torchrun that started this one: host, number, and when it began; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    number = os.getppid()
    try:  # a number alone is soon taken again, in containers most of all
        began = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:  # another system than Linux
        began = ""
    return f"{socket.gethostname()} {number} {began}"


def _checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    return [path for name in CHECKPOINTS if (path := Path(folder) / name).is_file()]


def _state(path: Path) -> list[int]:
    """What a file that is replaced does not keep."""
    found = path.stat()
    return [found.st_mtime_ns, found.st_ino, found.st_size]


def _read(marker: Path) -> dict[str, Any]:
    try:
        known = json.loads(marker.read_text(encoding="utf-8"))
        return {"agents": list(known["agents"]), "before": dict(known["before"])}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        return {"agents": [], "before": {}}
