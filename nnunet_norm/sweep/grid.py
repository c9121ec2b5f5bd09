"""From a grid's axes to points: derived plans, a trainer's name, and where results lie."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results

from nnunet_norm.errors import GridError, NnunetNormError
from nnunet_norm.planning import derive_plans, load_plans, resolve_configuration
from nnunet_norm.planning.datasets import dataset_name, require_folders
from nnunet_norm.planning.recipes import find_recipe
from nnunet_norm.planning.schedule import EPOCHS
from nnunet_norm.sweep.grid_file import PREFIX, SETTING, TRAINER_AXES, GridFile, folds_of, parts_of, read_grid
from nnunet_norm.sweep.points import Point, Run
from nnunet_norm.training.preflight import find_trainer

SWEEPS = "sweeps"
"""Folder of all sweeps of a dataset, among its results."""

FOLDS = 5
"""Of nnU-Net's own split, where there is none yet."""

LOSS = "loss"


@dataclass(frozen=True)
class Grid:
    """A sweep: points, and the folds in which each is trained.

    Attributes:
        name: of the sweep.
        dataset: its full name.
        configuration: that is trained.
        plans: from which all points are derived.
        folds: of every point.
        axes: axis -> values.
        gpus: per training and machine.
        nodes: machines per training.
        npz: whether validations keep probabilities.
        points: without those that are excluded.
        baseline: with which all others are compared.
    """

    name: str
    dataset: str
    configuration: str
    plans: str
    folds: tuple[int | str, ...]
    axes: Mapping[str, list[Any]]
    gpus: int
    nodes: int
    npz: bool
    points: tuple[Point, ...]
    baseline: Point

    @property
    def runs(self) -> tuple[Run, ...]:
        """All trainings; every point's first fold before any second one, so that a stopped sweep says something of each."""
        return tuple(Run(point, fold) for fold in self.folds for point in self.points)

    @property
    def processes(self) -> int:
        """Of one training, on all its machines: one per GPU, or one."""
        return max(self.gpus, 1) * self.nodes

    @property
    def folder(self) -> Path:
        """Everything of the sweep that is not nnU-Net's: logs, records, the report."""
        return Path(str(nnUNet_results), self.dataset, SWEEPS, f"{self.name}__{self.configuration}")

    def model_folder(self, point: Point) -> Path:
        """Where nnU-Net puts a model."""
        return Path(str(nnUNet_results), self.dataset, point.name)

    def fold_folder(self, run: Run) -> Path:
        """Where nnU-Net puts a training."""
        return self.model_folder(run.point) / f"fold_{run.fold}"

    @property
    def preprocessed(self) -> Path:
        """The preprocessed dataset, with plans and references."""
        return Path(str(nnUNet_preprocessed), self.dataset)


def load_grid(
    source: str,
    *,
    dataset: str | None = None,
    configuration: str | None = None,
    folds: Sequence[int | str] | None = None,
) -> Grid:
    """Read a grid and derive the plans of its points, without writing anything.

    Args:
        source: a YAML file, or a recipe of ``plans/`` that has a grid.
        dataset: name or number, in place of the grid's.
        configuration: in place of the grid's.
        folds: in place of the grid's; a list, or "all" in one.

    Raises:
        GridError: see :func:`nnunet_norm.sweep.grid_file.read_grid`; also a grid without points, or with one twice.
        PlansError: a point whose plans cannot be derived.
        LaunchError: a trainer that does not exist.
        SetupError: nnU-Net's folders are not set, or there is no such dataset.
    """
    file = read_grid(source)
    configuration = configuration or file.configuration
    for key, value in (("dataset", dataset or file.dataset), ("configuration", configuration)):
        if value is None:
            raise GridError(f"{source}: {key} is missing; give it in the grid, or with -{key[0]}")
    assert configuration is not None
    require_folders(nnUNet_preprocessed, nnUNet_results)
    name = dataset_name(str(dataset or file.dataset))
    chosen_folds = file.folds if folds is None else folds_of(folds, "-f")
    preprocessed = Path(str(nnUNet_preprocessed), name)
    _check_folds(chosen_folds, preprocessed)
    base = load_plans(preprocessed, file.plans)
    resolve_configuration(base, configuration)
    with _silent():
        points = tuple(_points(replace(file, configuration=configuration), base, source))
    if not points:
        raise GridError(f"{source}: the grid is empty: every combination of its axes is excluded")
    chosen = [point for point in points if all(point.values[axis] == value for axis, value in file.baseline.items())]
    if not chosen:
        raise GridError(f"{source}: baseline {dict(file.baseline)} is excluded; name a point of the grid")
    return Grid(
        name=file.name,
        dataset=name,
        configuration=configuration,
        plans=file.plans,
        folds=chosen_folds,
        axes=file.axes,
        gpus=file.gpus,
        nodes=file.nodes,
        npz=file.npz,
        points=points,
        baseline=chosen[0],
    )


def _points(file: GridFile, base: dict[str, Any], source: str) -> Iterator[Point]:
    varying = tuple(axis for axis, values in file.axes.items() if len(values) > 1)
    seen: dict[str, Point] = {}
    for combination in itertools.product(*file.axes.values()):
        values = dict(zip(file.axes, combination, strict=True))
        if any(all(values[axis] in left_out for axis, left_out in rule.items()) for rule in file.exclude):
            continue
        point = _point(file, base, values, varying, source)
        if point.name in seen:
            raise GridError(
                f"{source}: {point.label} and {seen[point.name].label} are the same model, {point.name}; exclude one of them"
            )
        seen[point.name] = point
        yield point


def _point(
    file: GridFile, base: dict[str, Any], values: Mapping[str, Any], varying: tuple[str, ...], source: str
) -> Point:
    assert file.configuration is not None
    asked = _merged(file, values, source)
    trainer, epochs = _trainer({key: asked[key] for key in TRAINER_AXES if key in asked}, source)
    options = {key: value for key, value in asked.items() if key not in (*TRAINER_AXES, SETTING)}
    try:
        if file.recipe is not None:
            plans = find_recipe(file.recipe, asked.get(SETTING)).derive(base, file.configuration, **options)
        else:
            plans = derive_plans(base, file.configuration, **options) if options else base
    except NnunetNormError as error:
        what = ", ".join(f"{axis}: {value}" for axis, value in values.items())
        raise type(error)(f"{source}: point {what}: {error}") from error
    return Point(values, trainer, plans["plans_name"], file.configuration, epochs, varying, plans)


def _merged(file: GridFile, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Everything that is asked of a point; values that are mappings say several things."""
    asked = dict(file.fixed)
    for axis, value in values.items():
        for key, part in parts_of(axis, value).items():
            if key in asked:
                raise GridError(f"{source}: {key} is said twice for {dict(values)}; leave it out in one place")
            asked[key] = part
    return asked


def _trainer(asked: Mapping[str, Any], source: str) -> tuple[str, int]:
    """A trainer's name and its epochs.

    Raises:
        GridError: the name is said in two ways, or in none.
        LaunchError: there is no such trainer.
    """
    if "trainer" in asked:
        if len(asked) > 1:
            others = ", ".join(key for key in asked if key != "trainer")
            raise GridError(f"{source}: trainer is the whole name; leave out {others}, or trainer")
        return str(asked["trainer"]), _epochs_of(str(asked["trainer"]))
    if "norm" not in asked:
        raise GridError(f"{source}: a point has no norm; give norm (or trainer) as an axis, or in fixed")
    parts = [PREFIX + asked["norm"]]
    if asked.get(LOSS) is not None:
        parts.append(asked[LOSS])
    if "epochs" in asked:
        parts.append(f"{asked['epochs']}epochs")
    name = "_".join(parts)
    return name, asked.get("epochs", EPOCHS)


def _epochs_of(trainer: str) -> int:
    """What a trainer's name says, as nnU-Net's own trainers say it too; the trainer must exist."""
    find_trainer(trainer)
    said = re.search(r"_([1-9][0-9]*)epochs?$", trainer)
    return int(said[1]) if said else EPOCHS


def _check_folds(folds: Sequence[int | str], preprocessed: Path) -> None:
    """Refuse folds that the dataset's split does not have: nnU-Net would draw one at random instead."""
    split = preprocessed / "splits_final.json"
    try:
        there = len(json.loads(split.read_text(encoding="utf-8"))) if split.is_file() else FOLDS
    except (OSError, ValueError, TypeError) as error:
        raise GridError(f"{split} cannot be read ({error}): remove it, and nnU-Net splits the cases again") from error
    missing = [fold for fold in folds if isinstance(fold, int) and fold >= there]
    if missing:
        raise GridError(f"folds has {missing[0]}, and the split has {there}: choose from 0 to {there - 1}, or all")


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, deriving says nothing: a grid is read by every command, and ``run`` shows what comes of it."""
    logger = logging.getLogger("nnunet_norm.planning")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
