"""How long the trainings of ``amos.py`` are: what a budget of minutes gives, from a few measured steps of every setting."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from amos_sweep import Sweep, levels

from nnunet_norm.errors import SweepError
from nnunet_norm.writing import write_json

STEPS = 10
"""Of a calibration."""


@dataclass(frozen=True)
class Length:
    """Epochs of a training, and optimizer steps of an epoch."""

    epochs: int
    iterations: int

    @property
    def fixed(self) -> dict[str, int]:
        """As a grid says it; the last is nnU-Net's ratio, or about it."""
        validation = {"val_iterations_per_epoch": max(self.iterations // 5, 1)}
        return {"epochs": self.epochs, "iterations_per_epoch": self.iterations, **validation}

    def as_dict(self) -> dict[str, int]:
        """For results."""
        return asdict(self)


def length_of(
    sweep: Sweep,
    grid_of: Callable[[Length], dict[str, Any]],
    minutes: float,
    length: Length,
    jobs: int,
    flags: Sequence[str] | None,
) -> Length:
    """As many epochs for every training as the budget allows, at least one; the same in later calls for the same grid.

    Args:
        sweep: trains the calibrations.
        grid_of: gives the grid at some length.
        minutes: for calibration and all trainings.
        length: its iterations stay.
        jobs: trainings at a time.
        flags: of ``nnunet-norm sweep run``; None to train nothing.

    Raises:
        SweepError: the length is not known yet and nothing may be trained; or a calibration has not ended.
    """
    grid = grid_of(length)
    asked = {key: grid[key] for key in ("dataset", "configuration", "plans", "folds", "fixed", "axes")}
    asked |= {"fixed": {**grid["fixed"], "epochs": None}, "minutes": minutes, "jobs": jobs}
    path = sweep.work / "amos_length.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for entry in known:
        if entry["asked"] == asked:
            return Length(entry["epochs"], length.iterations)
    if flags is None:
        raise SweepError(f"--budget {minutes:g}: nothing was trained with it yet; leave out --report-only")
    calibration = calibration_of(grid_of(Length(1, STEPS)))
    file = sweep.write(calibration)
    sweep.call("sweep", "run", str(file), *flags)
    measured = seconds_of(file)
    epochs = epochs_within(grid["axes"], len(grid["folds"]), measured, length.iterations, minutes * 60 * jobs)
    print(f"{minutes:g} minutes give {epochs} epochs of {length.iterations} steps", flush=True)
    taken = sum(one["once"] + one["step"] * STEPS for one in measured) / jobs / 60
    if taken > minutes:
        print(f"--budget {minutes:g} is exceeded: the calibration alone took about {taken:.0f} minutes", flush=True)
    print(_left_over(file), flush=True)
    write_json(path, [*known, {"asked": asked, "epochs": epochs, "measured": measured}], indent=2)
    return Length(epochs, length.iterations)


def calibration_of(grid: Mapping[str, Any]) -> dict[str, Any]:
    """A grid of every setting with the first norm and loss, and of every other norm and loss with the first setting."""
    axes = grid["axes"]
    first = {axis: values[0] for axis, values in axes.items()}
    points = [first | {axis: value} for axis, values in axes.items() for value in values]
    different = [point for number, point in enumerate(points) if point not in points[:number]]
    return {**grid, "name": "amos_calibration", "folds": grid["folds"][:1], "axes": {"what": different}, "npz": False}


def seconds_of(file: Path) -> list[dict[str, Any]]:
    """Of every calibration: seconds of a step with its share of validation, and of all that is there but once."""
    from nnunet_norm.sweep.grid import load_grid  # reads nnU-Net's variables
    from nnunet_norm.sweep.progress import read_epochs
    from nnunet_norm.sweep.records import read_attempts
    from nnunet_norm.sweep.task import record_of

    grid, found = load_grid(str(file)), []
    for run in grid.runs:
        attempts = read_attempts(record_of(grid.folder, run.name))
        if not attempts or attempts[-1].ended is None:
            raise SweepError(f"calibration {run.name} has not ended: wait for it (--slurm_wait), and call again")
        began, ended = (datetime.fromisoformat(when) for when in (attempts[-1].began, attempts[-1].ended))
        whole = (ended - began).total_seconds()
        epoch = read_epochs(grid.fold_folder(run))[-1].seconds
        found.append({**levels(run.point.values["what"]), "step": epoch / STEPS, "once": max(whole - epoch, 0.0)})
    return found


def _left_over(file: Path) -> str:
    """Where the models of the calibration lie: in the user's own folder, so that they are not deleted here."""
    from nnunet_norm.sweep.grid import load_grid  # reads nnU-Net's variables

    grid = load_grid(str(file))
    models = sorted({grid.model_folder(run.point) for run in grid.runs})
    names = ", ".join(model.name for model in models)
    return f"the calibration's {len(models)} models are of no further use and may be deleted; in {models[0].parent}: {names}"


def epochs_within(
    axes: Mapping[str, Sequence[str]],
    folds: int,
    measured: Sequence[Mapping[str, Any]],
    iterations: int,
    seconds: float,
) -> int:
    """Whole epochs that all trainings together have in ``seconds``, after those of the calibration; at least one.

    A step of a combination that was not measured takes as long as that of its setting, times the ratios of its norm and of
    its loss to the first ones.
    """
    first = {axis: values[0] for axis, values in axes.items()}
    steps = {tuple(one[axis] for axis in axes): one["step"] for one in measured}

    def step(point: Mapping[str, str]) -> float:
        base = steps[tuple(first.values())]
        seconds = base
        for axis, value in point.items():
            seconds *= steps[tuple((first | {axis: value}).values())] / base
        return seconds

    points = [{}]
    for axis, values in axes.items():
        points = [{**point, axis: value} for point in points for value in values]
    once = sum(one["once"] for one in measured) / len(measured)
    calibration = sum(one["once"] + one["step"] * STEPS for one in measured)
    left = seconds - calibration - once * len(points) * folds
    return max(int(left / (folds * iterations * sum(map(step, points)))), 1)
