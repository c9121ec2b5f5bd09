"""Tasks whose trainings are pretended, and what is seen of their processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_norm.sweep.task import Task

SCRIPT = Path(__file__).parent / "pretended_run.py"


class PretendedTask(Task):
    """A task whose process pretends to train."""

    def command(self):
        return [sys.executable, str(SCRIPT), *super().command()[3:]]


def task(root, name="model", **changes):
    """A task in folders of its own; the fold's folder is there."""
    results = root / "results" / name / "fold_0"
    results.mkdir(parents=True, exist_ok=True)
    values = {"sweep": "tried", "folder": root / "sweep", "results": results, "dataset": "Dataset004_X"}
    values |= {"configuration": "2d", "fold": "0", "trainer": "nnUNetTrainerGN", "plans": "p", "device": "cpu"}
    return PretendedTask(**values | changes)


def begun(one, **environment):
    """Its process, begun."""
    return subprocess.Popen(
        one.command(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    )


def until(condition, seconds=60):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"nothing came of it in {seconds} s")
        time.sleep(0.02)
    return found


def trains(one):
    """The number of the training's process, once it trains."""
    return until(lambda: (one.results / "count").exists()) and int((one.results / "training").read_text())


def lives(number):
    """Whether a process is there."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
