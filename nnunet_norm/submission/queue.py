"""What SLURM's queue says of jobs, and waiting for them."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_norm.errors import SubmissionError

LAST_LINES = 12
"""How many lines of a failed command are told."""


@dataclass(frozen=True)
class Submitted:
    """Jobs that wait, run or are done.

    Attributes:
        jobs: of submitit, in the order of the commands.
        last: the one that comes after all others; None if there is none, or if it was refused.
        refusal: why the last one was refused.
        folder: of the logs.
    """

    jobs: Sequence[Any]
    last: Any | None
    refusal: str | None
    folder: Path

    @property
    def ids(self) -> list[str]:
        """Of the jobs, the last one excepted; ``<array>_<number>`` in an array."""
        return [job.job_id for job in self.jobs]

    def log_of(self, job: Any) -> Path:
        """What a job wrote."""
        return Path(job.paths.stdout)


def wait_for(submitted: Submitted, tell: Callable[[int, Mapping[str, str]], None], seconds: float = 5) -> list[int]:
    """Wait until all jobs have ended, the last one included.

    A job has ended when its result is there, or when SLURM's queue does not have it any more: without accounting SLURM says
    nothing else about a job that was killed.

    Args:
        submitted: the jobs.
        tell: called again and again with the number of jobs that have ended and the states of the others.
        seconds: between two looks at the queue.

    Returns:
        The places of the jobs that failed, in the order of the commands; the last one has the place after them.
    """
    jobs = [*submitted.jobs, *([submitted.last] if submitted.last is not None else [])]
    open_jobs, gone = dict(enumerate(jobs)), set[int]()
    while open_jobs:
        found = states([job.job_id for job in open_jobs.values()])
        for number, job in list(open_jobs.items()):
            # One that left the queue a moment ago may have a result that is on its way through a network's file system.
            if job.paths.result_pickle.exists() or (number in gone and job.job_id not in found):
                del open_jobs[number]
            elif job.job_id not in found:
                gone.add(number)
            else:
                gone.discard(number)
        tell(len(jobs) - len(open_jobs), {job.job_id: found.get(job.job_id, "") for job in open_jobs.values()})
        if open_jobs:
            time.sleep(seconds)
    return [number for number, job in enumerate(jobs) if not _succeeded(job)]


def last_lines(log: Path, count: int = LAST_LINES, start: int = 0) -> list[str]:
    """The last lines of a failed job's log, without what srun and submitit say; none if there is no log.

    Args:
        log: the file.
        count: how many.
        start: bytes at its beginning that are left out.
    """
    with suppress(OSError):
        lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
        told = [line for line in lines if line.strip() and not line.startswith(("srun: ", "submitit "))]
        raised = [number for number, line in enumerate(told) if SubmissionError.__name__ in line]
        return told[raised[-1] + 1 if raised else 0 :][-count:]
    return []


def states(ids: Sequence[str]) -> dict[str, str]:
    """What SLURM's queue says of jobs; those that ended are missing. While SLURM does not answer, all are unknown."""
    if not ids or shutil.which("squeue") is None:
        return dict.fromkeys(ids, "UNKNOWN")
    numbers = sorted({job_id.split("_")[0] for job_id in ids})
    done = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i %T %r", f"--jobs={','.join(numbers)}"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        return dict.fromkeys(ids, "UNKNOWN")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()]
    return {words[0]: words[1] if words[1] != "PENDING" else " ".join(words[1:]) for words in lines}


def _succeeded(job: Any) -> bool:
    return bool(job.paths.result_pickle.exists()) and job.exception() is None
