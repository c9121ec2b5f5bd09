"""How far every run of a sweep is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nnunet_norm.submission import last_lines
from nnunet_norm.sweep.cluster import Queued
from nnunet_norm.sweep.finished import missing_of, read_summary
from nnunet_norm.sweep.grid import Grid
from nnunet_norm.sweep.locking import Owner, owner_of
from nnunet_norm.sweep.points import Run
from nnunet_norm.sweep.progress import Epoch, read_epochs
from nnunet_norm.sweep.records import Attempt, ending, read_attempts
from nnunet_norm.sweep.task import log_of, record_of

Kind = Literal["pending", "queued", "running", "interrupted", "failed", "done"]

RECENT = 10
"""Epochs whose mean time says how long the others will take."""


@dataclass(frozen=True)
class State:
    """Of one run.

    Attributes:
        kind: pending: nothing was trained; queued: SLURM has it; interrupted: something was, and the same command goes on.
        detail: SLURM's reason, how it failed, or who trains.
        epochs_done: finished ones.
        seconds_left: of the training, without its validation; None where that is not known.
        dice: running, interrupted or failed: nnU-Net's pseudo Dice of the last epoch; done: the mean over foreground classes
            and cases of the validation; NaN where there is none.
        lines: the last ones of a failed run's log.
        log: of a failed run.
        owner: who trains, if it is running.
    """

    kind: Kind
    detail: str = ""
    epochs_done: int = 0
    seconds_left: float | None = None
    dice: float = math.nan
    lines: tuple[str, ...] = ()
    log: Path | None = None
    owner: Owner | None = None


def state_of(grid: Grid, run: Run, queue: Mapping[str, Queued] | None = None) -> State:
    """How far a run is.

    Args:
        grid: the sweep.
        run: one of its trainings.
        queue: of :func:`nnunet_norm.sweep.cluster.queue_of`; None: SLURM is not asked.
    """
    results = grid.fold_folder(run)
    if missing_of(results, npz=grid.npz) is None:
        summary = read_summary(results) or {}
        dice = summary.get("foreground_mean", {}).get("Dice", math.nan)
        return State("done", epochs_done=run.point.epochs, dice=dice)
    epochs = read_epochs(results)
    reached = State("pending")
    if epochs:
        reached = State("interrupted", epochs_done=epochs[-1].number + 1, dice=epochs[-1].dice)
    queued = (queue or {}).get(run.name)
    owner = owner_of(results)
    if owner is not None:
        return replace(reached, kind="running", detail=str(owner), owner=owner, seconds_left=_left(run, epochs))
    if queued is not None and queued.state == "RUNNING":  # it begins or ends this moment, or there are no locks
        return replace(reached, kind="running", detail=f"job {queued.job}", seconds_left=_left(run, epochs))
    if queued is not None and queued.state:
        return replace(reached, kind="queued", detail=f"job {queued.job}: {queued.state}")
    attempts = read_attempts(record_of(grid.folder, run.name))
    return _left_alone(attempts, queued, reached, log_of(grid.folder, run.name))


def _left_alone(attempts: list[Attempt], queued: Queued | None, reached: State, log: Path) -> State:
    """Of a run that nobody has in hand."""
    if attempts and attempts[-1].failed:
        last = attempts[-1]
        assert last.code is not None
        return replace(reached, kind="failed", detail=ending(last.code), lines=tuple(last.lines), log=log)
    began = queued is not None and queued.log.is_file()  # a job that is cancelled while it waits leaves no log
    if queued is not None and began and queued.job not in [attempt.job for attempt in attempts]:
        detail = f"job {queued.job} ended before it began to train"
        return replace(reached, kind="failed", detail=detail, lines=tuple(last_lines(queued.log)), log=queued.log)
    return replace(reached, kind="interrupted") if attempts else reached


def _left(run: Run, epochs: list[Epoch]) -> float | None:
    times = [epoch.seconds for epoch in epochs[-RECENT:] if epoch.seconds > 0]
    if not times:
        return None
    return sum(times) / len(times) * max(run.point.epochs - epochs[-1].number - 1, 0)
