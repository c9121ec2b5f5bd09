"""Where a training goes on after its processes were started again."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_norm.errors import LaunchError
from nnunet_norm.writing import is_whole_checkpoint, write_json

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
"""What nnU-Net writes that a training can be continued from."""

MARKER = ".nnunet_norm_run.json"
"""Stands in the training's folder: who trains, and which checkpoints were there before."""


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """What a training goes on with: a final checkpoint, unless a training began since; else the newest whole one."""
    return _newest(path for path in _checkpoints(folder) if is_whole_checkpoint(path))


def begin_or_resume(
    folder: str | os.PathLike[str], agents: Sequence[str], *, started_again: bool = False
) -> Path | None:
    """The newest whole checkpoint that this very run wrote; None if it has just begun, or has written none yet.

    A run is known by torchrun's agents, which stay while they start their processes again: one of them that took part before
    makes it the same run, also if another was replaced. What lay in the folder when the run began is another training's. By
    comparing what files were, not times, this needs no clocks that agree.

    Args:
        folder: The training's.
        agents: Of all processes, :func:`agent` of each.
        started_again: Whether one of them has started its processes before, so that it is no new run.

    Raises:
        LaunchError: If another run is there: it goes on, or it began after this one.
        OutputError: If the folder cannot be written to.
    """
    marker = Path(folder) / MARKER
    known = _read(marker)
    if not set(agents) & set(known["agents"]):
        if known["agents"] and started_again:
            raise LaunchError(f"another training began in {folder} after this one: each needs plans of another name")
        if running := [name for name in known["agents"] if _is_running(name)]:
            raise LaunchError(
                f"a training goes on in {folder} (process {running[0].split()[1]}): wait for it, or end it first"
            )
        before = {path.name: _state(path) for path in _checkpoints(folder)}
        write_json(marker, {"agents": sorted(set(agents)), "before": before})
        return None
    write_json(marker, known | {"agents": sorted({*agents, *known["agents"]})})
    own = [
        path
        for path in _checkpoints(folder)
        if is_whole_checkpoint(path) and _state(path) != known["before"].get(path.name)
    ]
    return _newest(own)


def agent() -> str | None:
    """The process of torchrun that started this one: host, number, and when it began; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    number = os.getppid()
    return f"{socket.gethostname()} {number} {_began(number)}"


def _began(number: int) -> str:
    """When a process began: its number alone is soon taken again, in containers most of all."""
    try:
        state, *rest = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (OSError, ValueError):  # it has ended, or this is another system than Linux
        return ""
    return "" if state == "Z" else rest[18]


def _is_running(name: str) -> bool:
    """Whether the agent of this name is a process of this machine."""
    host, number, began = [*name.split(), "", ""][:3]
    return bool(began) and host == socket.gethostname() and _began(int(number)) == began


def _newest(paths: Iterable[Path]) -> Path | None:
    """A final checkpoint ends a training, which removes the latest one: the best may only look newer, as after a copy."""
    times = {path.name: (path.stat().st_mtime_ns, path) for path in paths}
    final, latest = (times.get(name) for name in CHECKPOINTS[:2])
    if final is not None and (latest is None or latest[0] <= final[0]):
        return final[1]
    return max(times.values(), default=(0, None))[1]


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
