"""What one process of a sweep trains, and its command lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_norm.sweep.grid import Grid
    from nnunet_norm.sweep.points import Run


@dataclass(frozen=True)
class Task:
    """One training of a sweep, as a process of its own is told of it.

    Attributes:
        sweep: name of the sweep.
        folder: of the sweep, with logs and records.
        results: nnU-Net's folder of the fold.
        dataset: its full name.
        configuration: that is trained.
        fold: a number, or "all".
        trainer: its name.
        plans: their name.
        device: "cuda" or "cpu".
        processes: per machine.
        nodes: machines.
        cores: of each machine that the training may use; 0 if that is not known.
        npz: whether the validation keeps probabilities.
    """

    sweep: str
    folder: Path
    results: Path
    dataset: str
    configuration: str
    fold: str
    trainer: str
    plans: str
    device: str = "cuda"
    processes: int = 1
    nodes: int = 1
    cores: int = 0
    npz: bool = False

    @property
    def name(self) -> str:
        """The model and the fold, as a relative path."""
        return f"{self.results.parent.name}/{self.results.name}"

    @property
    def log(self) -> Path:
        """What all its attempts wrote; of the first machine if there are several."""
        return log_of(self.folder, self.name)

    @property
    def record(self) -> Path:
        """What is known of its attempts."""
        return record_of(self.folder, self.name)

    def command(self) -> list[str]:
        """The command line of its process, which :func:`parse` reads again."""
        words = [sys.executable, "-m", "nnunet_norm.sweep.training"]
        for field in fields(self):
            value = getattr(self, field.name)
            words += [] if value is False else [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
        return words

    def training_arguments(self) -> list[str]:
        """Those of nnU-Net's own program: begin, or go on where a checkpoint is."""
        words = [self.dataset, self.configuration, self.fold, "-tr", self.trainer, "-p", self.plans, "--c"]
        return [*words, "-device", self.device, *(["--npz"] if self.npz else [])]


def log_of(folder: Path, name: str) -> Path:
    """The log of a run, by the sweep's folder and the run's name."""
    return folder / "logs" / f"{name}.log"


def record_of(folder: Path, name: str) -> Path:
    """The record of a run's attempts, likewise."""
    return folder / "runs" / f"{name}.json"


def parse(argv: Sequence[str] | None = None) -> tuple[Task, int | None]:
    """A task from its command line, and the process that started this one if it said so."""
    parser = argparse.ArgumentParser(prog="nnunet_norm.sweep.training", allow_abbrev=False)
    for field in fields(Task):
        if field.name == "npz":
            parser.add_argument("--npz", action="store_true")
        else:
            kind = {"Path": Path, "int": int}.get(str(field.type), str)
            parser.add_argument(f"--{field.name}", type=kind, required=True)
    parser.add_argument("--parent", type=int)
    values = vars(parser.parse_args(argv))
    parent = values.pop("parent")
    return Task(**values), parent


def task_of(grid: Grid, run: Run, *, device: str, cores: int = 0) -> Task:
    """What a process is told of a run.

    Args:
        grid: the sweep.
        run: one of its trainings.
        device: "cuda" or "cpu".
        cores: of each machine that the training may use; 0 if that is not known.
    """
    return Task(
        sweep=grid.name,
        folder=grid.folder,
        results=grid.fold_folder(run),
        dataset=grid.dataset,
        configuration=run.point.configuration,
        fold=str(run.fold),
        trainer=run.point.trainer,
        plans=run.point.plans_name,
        device=device,
        processes=max(grid.gpus, 1),
        nodes=grid.nodes,
        cores=cores,
        npz=grid.npz,
    )
