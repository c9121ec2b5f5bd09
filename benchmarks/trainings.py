"""Trainings by nnU-Net's own programs, several at a time, each on one core; what is done is not done again."""

import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nnunet_datasets import ONE_CORE, Dataset, program

from nnunet_norm.demo.steps import continue_flag
from nnunet_norm.errors import NnunetNormError
from nnunet_norm.writing import is_whole_checkpoint


@dataclass(frozen=True)
class Training:
    """One training of fold 0.

    Attributes:
        title: what it is called while it runs.
        dataset: prepared in ``work``.
        trainer: without the number of epochs.
        epochs: how many.
        plans: name that tells apart all that is not in the trainer's name.
        changes: flags of ``nnunet-norm plan`` that make these plans.
        work: folder of nnU-Net's folders.
    """

    title: str
    dataset: Dataset
    trainer: str
    epochs: int
    plans: str
    changes: tuple[str, ...]
    work: Path

    @property
    def trainer_name(self) -> str:
        """As nnU-Net finds it."""
        return f"{self.trainer}_{self.epochs}epochs"

    @property
    def fold(self) -> Path:
        """Its results folder."""
        model = f"{self.trainer_name}__{self.plans}__{self.dataset.configuration}"
        return self.work / "nnUNet_results" / self.dataset.name / model / "fold_0"

    @property
    def checkpoint(self) -> Path:
        """What it ends with."""
        return self.fold / "checkpoint_final.pth"

    @property
    def is_done(self) -> bool:
        """Whether it was trained and validated to the end."""
        validation = self.fold / "validation"
        files = (validation / "summary.json", validation / "norm_report.json")
        return is_whole_checkpoint(self.checkpoint) and all(file.exists() for file in files)

    def make_plans(self) -> None:
        """Derive them from nnU-Net's, unless they are there."""
        if (self.work / "nnUNet_preprocessed" / self.dataset.name / f"{self.plans}.json").exists():
            return
        which = ("-d", self.dataset.number, "-c", self.dataset.configuration, "--plans-name", self.plans)
        log = f"{self.dataset.name}.log"
        program(self.work, log, lambda line: None)("nnunet-norm", "plan", *which, *self.changes)

    def run(self) -> None:
        """``nnUNetv2_train`` on one core, or nothing if that was done before."""
        if self.is_done:
            print(f"{self.title}: trained before", flush=True)
            return
        log = f"{self.trainer_name}__{self.plans}.log"
        run = program(self.work, log, partial(self._follow, time.perf_counter()))
        what = (self.dataset.number, self.dataset.configuration, "0", "-tr", self.trainer_name, "-p", self.plans)
        run(sys.executable, "-c", ONE_CORE, *what, "-device", "cpu", *continue_flag(self.fold))

    def _follow(self, start: float, line: str) -> None:
        if begun := re.search(r": Epoch (\d+)\s*$", line):
            taken = f"{time.perf_counter() - start:.0f} s"
            print(f"{self.title}: epoch {begun[1]} of {self.epochs}, {taken}", flush=True)


def run_all(trainings: Sequence[Training], jobs: int) -> None:
    """All of them, ``jobs`` at a time; one that fails does not keep the others from being trained.

    Raises:
        NnunetNormError: plans cannot be made, or trainings failed, after all others.
    """
    for training in trainings:
        training.make_plans()
    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(_failure, trainings) if failure]
    if failures:
        raise NnunetNormError("; ".join(failures))


def _failure(training: Training) -> str | None:
    try:
        training.run()
    except NnunetNormError as error:
        return f"{training.title}: {error}"
    return None
