"""The runs of a sweep as an array of SLURM's jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_norm.submission import Resources, Submitted, states, submit_commands
from nnunet_norm.sweep.task import Task
from nnunet_norm.writing import write_json

JOBS, LOGS = "jobs.json", "slurm_logs"
"""In the sweep's folder: which job has which run, and what SLURM's jobs wrote."""


@dataclass(frozen=True)
class Queued:
    """A run that was submitted.

    Attributes:
        job: its number, ``<array>_<number>``.
        log: what the job wrote.
        state: as SLURM has it, with the reason of one that waits; empty if the job is gone; "UNKNOWN" if SLURM is silent.
    """

    job: str
    log: Path
    state: str = ""


def queue_of(folder: Path) -> dict[str, Queued]:
    """The last job of every run that was submitted, by the run's name, and what SLURM says of it.

    Args:
        folder: of the sweep.
    """
    noted = _noted(folder)
    found = states([entry["job"] for entry in noted.values()])
    return {
        name: Queued(entry["job"], folder / LOGS / entry["log"], found.get(entry["job"], ""))
        for name, entry in noted.items()
    }


def submit(tasks: Sequence[Task], resources: Resources) -> Submitted:
    """Submit runs as one array, and note which job has which.

    Args:
        tasks: of one sweep; one or more.
        resources: of every job.

    Raises:
        SetupError: submitit or SLURM is missing.
        SubmissionError: the cluster refuses, with its own words.
        OutputError: the sweep's folder cannot be written to.
    """
    folder = tasks[0].folder
    commands = [task.command() for task in tasks]
    submitted = submit_commands(commands, name=f"sweep-{tasks[0].sweep}", folder=folder / LOGS, resources=resources)
    jobs = {
        task.name: {"job": job.job_id, "log": submitted.log_of(job).name}
        for task, job in zip(tasks, submitted.jobs, strict=True)
    }
    write_json(folder / JOBS, _noted(folder) | jobs)
    return submitted


def _noted(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / JOBS).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # nothing was submitted
        return {}
