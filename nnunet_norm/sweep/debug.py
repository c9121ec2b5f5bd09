"""The runs of a sweep in this very process, one after the other: for a debugger."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_norm.errors import SweepError
from nnunet_norm.sweep.finished import missing_of
from nnunet_norm.sweep.locking import locked
from nnunet_norm.sweep.task import Task
from nnunet_norm.training import launch


def run_here(tasks: Sequence[Task]) -> None:
    """Train all, with their output as it comes; the first error goes on to the caller.

    Args:
        tasks: of one process each.

    Raises:
        SweepError: a run of several processes; somebody else trains in one of the folders.
        SystemExit: with code 2 after a refusal of the training, which it says itself.
        Others: of the training.
    """
    for task in tasks:
        if task.processes * task.nodes > 1:
            raise SweepError(f"{task.name} takes several processes, and --engine debug is one: use --engine local")
    for task in tasks:
        with locked(task.results, task.sweep):
            if missing_of(task.results, npz=task.npz) is not None:
                launch.main(task.training_arguments())
