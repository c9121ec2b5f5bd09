"""The plans of a sweep's points: compared with what is there, then written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_norm.architectures import refuse_patch
from nnunet_norm.errors import GridError, PlansError, SetupError
from nnunet_norm.planning import load_plans, resolve_configuration, save_plans
from nnunet_norm.planning.batches import check_shares
from nnunet_norm.planning.images import check_changed_patches, fingerprint_in
from nnunet_norm.reading import read_object
from nnunet_norm.settings import BLOCK
from nnunet_norm.sweep.grid import Grid
from nnunet_norm.sweep.points import Point
from nnunet_norm.training import NormTrainer
from nnunet_norm.training.contradictions import refuse_contradiction
from nnunet_norm.training.preflight import find_trainer
from nnunet_norm.training.scaled_trainer import ScaledTrainer


def check_points(grid: Grid) -> list[Point]:
    """Refuse what no point could be trained with; nothing is written.

    Returns:
        One point for each plans file that is not there yet.

    Raises:
        GridError: plans or results of a point's name are there that say something else.
        PlansError: the GPUs cannot share a point's batch, or its plans contradict its trainer.
        SetupError: the preprocessed data of the configuration are missing.
    """
    cases = grid.preprocessed / resolve_configuration(dict(grid.points[0].plans), grid.configuration)["data_identifier"]
    if not cases.is_dir():
        raise SetupError(
            f"{cases} is not there: run nnUNetv2_preprocess -d {grid.dataset} -c {grid.configuration} first"
        )
    trainers = {name: find_trainer(name) for name in {point.trainer: None for point in grid.points}}
    for point in grid.points:
        resolved = resolve_configuration(dict(point.plans), grid.configuration)
        trainer = trainers[point.trainer]
        if issubclass(trainer, NormTrainer):
            refuse_contradiction(resolved, trainer.norm, point.trainer)
            if trainer.architecture is not None:
                refuse_patch(resolved["patch_size"], f"point {point.label}")
        elif not issubclass(trainer, ScaledTrainer):
            _check_stock(grid, point, resolved)
        try:
            check_shares(resolved, grid.processes, grid.configuration)
        except PlansError as error:
            raise PlansError(f"point {point.label}: {error}") from error
        _check_results(grid, point)
    missing = [point for point in grid.points if not _same_plans_there(grid, point)]
    return list({point.plans_name: point for point in missing}.values())


def _check_stock(grid: Grid, point: Point, resolved: dict[str, Any]) -> None:
    """Refuse what a trainer of nnU-Net's own would not do, or not heed."""
    if grid.processes > 1:
        raise GridError(
            f"point {point.label}: {point.trainer} is not of nnunet_norm, and sweeps train such ones in one process: give "
            "gpus: 1 and nodes: 1, or sweep them by themselves"
        )
    if resolved.get(BLOCK):
        raise GridError(
            f"point {point.label}: {point.trainer} is not of nnunet_norm, and would not heed {', '.join(resolved[BLOCK])} of "
            "its plans: leave that out for it, or take nnUNetTrainerInstanceNorm"
        )


def padded_points(grid: Grid) -> list[str]:
    """One line for every patch of the grid that is larger than all images; trained, it sees padding."""
    fingerprint = fingerprint_in(grid.preprocessed)
    if fingerprint is None:
        return []
    base = load_plans(grid.preprocessed, grid.plans)
    reasons: dict[str, str] = {}
    for name, plans in {point.plans_name: point.plans for point in grid.points}.items():
        try:
            check_changed_patches(base, dict(plans), fingerprint)
        except PlansError as error:
            reasons[name] = str(error)
    found: dict[str, list[str]] = {}
    for point in grid.points:
        if point.plans_name in reasons:
            found.setdefault(reasons[point.plans_name], []).append(point.label)
    return [
        f"{len(labels)} of {len(grid.points)} points, the first is {labels[0]}: {why}, or exclude them"
        for why, labels in found.items()
    ]


def write_plans(grid: Grid) -> None:
    """Write the plans of every point; those that are there already are left.

    Raises:
        GridError, PlansError, SetupError: see :func:`check_points`; nothing was written then.
        OutputError: the folder is read-only, or the disk is full.
    """
    for point in check_points(grid):
        save_plans(dict(point.plans), grid.preprocessed)


def _same_plans_there(grid: Grid, point: Point) -> bool:
    """Whether a file of the plans' name is there.

    Raises:
        GridError: it says something else.
    """
    if not (grid.preprocessed / f"{point.plans_name}.json").is_file():
        return False
    if not _alike(load_plans(grid.preprocessed, point.plans_name), point.plans, grid.configuration):
        raise GridError(
            f"point {point.label}: {point.plans_name}.json in {grid.preprocessed} says something else than the grid: "
            "remove it, or derive the grid from plans of another name"
        )
    return True


def _check_results(grid: Grid, point: Point) -> None:
    """Refuse to go on with a training of other plans, or to take it for finished."""
    path = Path(grid.model_folder(point), "plans.json")
    if not path.is_file():
        return
    trained = read_object(path, GridError, "move that model away")
    if not _alike(trained, point.plans, grid.configuration):
        raise GridError(
            f"point {point.label}: {path.parent} was trained with other plans of the same name: move it away, or derive the "
            "grid from plans of another name"
        )


def _alike(first: Mapping[str, Any], second: Mapping[str, Any], configuration: str) -> bool:
    """Whether two plans train a configuration alike; as JSON, which knows no tuples."""
    if configuration not in first.get("configurations", {}):
        return False
    texts = [json.dumps(resolve_configuration(dict(plans), configuration), sort_keys=True) for plans in (first, second)]
    return texts[0] == texts[1]
