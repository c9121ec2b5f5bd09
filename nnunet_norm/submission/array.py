"""Submitting: an array of jobs, and one that comes after it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from nnunet_norm.errors import SetupError, SubmissionError
from nnunet_norm.submission.command import Command
from nnunet_norm.submission.queue import Submitted

TIMEOUTS = 20
"""How often a job that ran out of its time is requeued."""

EARLIER_SECONDS = 90
"""How long before the end of its time a job is warned, if its time is not short."""


@dataclass(frozen=True)
class Resources:
    """What one job is to have.

    Attributes:
        partition: None: the cluster's default.
        gpus: per job, on each of its machines.
        cpus: per job, likewise.
        memory: bytes per job, likewise; None: the cluster's default.
        minutes: after which a job is warned, requeued and continued.
        array_limit: how many jobs of an array run at once; None: as many as there is room for.
        setup: lines of the shell that go before the command, as ``module load cuda``.
        nodes: machines per job; the command runs once on each.
    """

    partition: str | None = None
    gpus: int = 0
    cpus: int = 1
    memory: int | None = None
    minutes: int = 240
    array_limit: int | None = None
    setup: Sequence[str] = ()
    nodes: int = 1

    def __post_init__(self) -> None:
        at_least = {"gpus": 0, "nodes": 1, "cpus": 1, "minutes": 1, "array_limit": 1, "memory": 2**20}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SubmissionError(f"{name} {value} of a job must be {least} or more")


def submit_commands(
    commands: Sequence[Sequence[str]],
    *,
    name: str,
    folder: str | os.PathLike[str],
    resources: Resources,
    executor: str = "slurm",
    then: Sequence[str] | None = None,
) -> Submitted:
    """Submit command lines as one array of jobs; a job that runs out of its time or is preempted is requeued.

    Args:
        commands: one or more; a command that is begun again must go on where it was.
        name: of the jobs.
        folder: of the logs, on a disk that all machines of the cluster see; made if need be.
        resources: of every job.
        executor: of submitit: "slurm", or "local" for processes of this machine, all at once.
        then: a command without GPU that runs once when all others have ended, however they ended (SLURM's ``afterany``): one
            that waited for their success (``afterok``) would wait for ever after a failure, and not tell of it. Under "slurm"
            alone.

    Raises:
        SetupError: submitit or SLURM is missing.
        SubmissionError: the cluster refuses the jobs, with its own words. If it refuses the last one alone, that is told in
            what is returned.
    """
    check_executor(executor)
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _without_own_job():
        jobs = _executor(folder, name, resources, executor).submit_array([Command(command) for command in commands])
        if then is None or executor != "slurm":
            return Submitted(jobs, None, None, folder)
        after = f"afterany:{jobs[0].job_id.split('_')[0]}"
        alone = replace(resources, gpus=0, cpus=1, nodes=1)
        try:
            last = _executor(folder, f"{name}-then", alone, executor, dependency=after).submit(Command(then))
        except SubmissionError as error:
            return Submitted(jobs, None, str(error), folder)
    return Submitted(jobs, last, None, folder)


def check_executor(executor: str = "slurm") -> None:
    """See that jobs can be submitted from here.

    Raises:
        SetupError: submitit or SLURM is missing.
    """
    try:
        importlib.import_module("submitit")
    except ImportError as error:
        raise SetupError(
            f"submitting jobs needs the package submitit ({error}): pip install 'nnunet_norm[slurm]'"
        ) from error
    missing = [program for program in ("sbatch", "srun", "squeue") if shutil.which(program) is None]
    if executor == "slurm" and missing:
        raise SetupError(
            f"{missing[0]} is not on this machine: submit where SLURM's programs are (a login node), or do without"
        )


def _executor(folder: Path, name: str, resources: Resources, cluster: str, dependency: str | None = None) -> Any:
    """An executor of submitit, whose refusals are those of this package."""
    submitit = importlib.import_module("submitit")
    made = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=TIMEOUTS)
    made.update_parameters(
        name=name,
        timeout_min=resources.minutes,
        nodes=resources.nodes,
        tasks_per_node=1,
        cpus_per_task=resources.cpus,
        gpus_per_node=resources.gpus or None,
        mem_gb=None if resources.memory is None else resources.memory / 2**30,
        stderr_to_stdout=True,
        slurm_partition=resources.partition,
        slurm_array_parallelism=resources.array_limit or 10**6,
        slurm_setup=list(resources.setup) or None,
        slurm_dependency=dependency,
        slurm_signal_delay_s=min(EARLIER_SECONDS, resources.minutes * 60 // 4),
        slurm_additional_parameters={"requeue": True},
        # Since SLURM 22.05 srun does not take this over from sbatch, and would bind the command to one core.
        slurm_srun_args=[f"--cpus-per-task={resources.cpus}"],
    )
    return _Refusing(made, submitit.core.utils)


class _Refusing:
    """An executor whose errors are refusals in one line."""

    def __init__(self, executor: Any, errors: Any) -> None:
        self.executor = executor
        self.errors = (errors.FailedJobError, errors.FailedSubmissionError, OSError)

    def submit_array(self, functions: list[Command]) -> list[Any]:
        with self._told():
            return list(self.executor.submit_array(functions))

    def submit(self, function: Command) -> Any:
        with self._told():
            return self.executor.submit(function)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with open(os.devnull, "w") as nowhere, _stderr(nowhere):  # submitit prints what it raises
                yield
        except self.errors as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["sbatch gave no reason"]
            raise SubmissionError(f"the jobs were refused: {lines[-1]}") from error


@contextmanager
def _stderr(file: IO[str]) -> Iterator[None]:
    before, sys.stderr = sys.stderr, file
    try:
        yield
    finally:
        sys.stderr = before


@contextmanager
def _without_own_job() -> Iterator[None]:
    """Inside a job of SLURM, hide what that job was given: one that is submitted from it would inherit its limits."""
    own = {} if "SLURM_JOB_ID" not in os.environ else {k: v for k, v in os.environ.items() if k.startswith("SLURM")}
    own.pop("SLURM_CONF", None)
    for name in own:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(own)
