"""Say how far every training of a sweep is.

A row per point, a column per fold:

    pending                  nothing was trained yet
    queued                   SLURM has it
    12/1000 0.61 20:15:03    running: epochs, pseudo Dice of the last one, and how long the others will take
    interrupted 12/1000      something was trained; nnunet-norm sweep run goes on there
    failed                   with the last lines of its log below
    done 0.853               Dice of the validation, mean over classes and cases
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tqdm import tqdm

from nnunet_norm.commands.sweep_grid import add_grid_arguments, grid_of
from nnunet_norm.pages import text_table

if TYPE_CHECKING:
    from nnunet_norm.sweep.grid import Grid
    from nnunet_norm.sweep.points import Run
    from nnunet_norm.sweep.state import State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid."""
    add_grid_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table, and what failed."""
    grid = grid_of(args)
    from nnunet_norm.sweep.cluster import queue_of
    from nnunet_norm.sweep.state import state_of

    queue = queue_of(grid.folder)
    states = {run.name: state_of(grid, run, queue) for run in grid.runs}
    print(*table(grid, states), sep="\n")
    kinds = Counter(state.kind for state in states.values())
    print(f"\n{len(states)} runs: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    reasons = Counter(state.detail.split(": ", 1)[-1] for state in states.values() if state.kind == "queued")
    if reasons:
        print("queued: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()))
    for line in failures(grid, states):
        print(line)


def table(grid: Grid, states: Mapping[str, State]) -> list[str]:
    """A line per point, with a cell per fold.

    Args:
        grid: the sweep.
        states: of all its runs, by their names.
    """
    by_place = {(run.point.name, run.fold): cell(run, states[run.name]) for run in grid.runs}
    rows = [["point", *(f"fold {fold}" for fold in grid.folds)]]
    rows += [[point.label, *(by_place[point.name, fold] for fold in grid.folds)] for point in grid.points]
    return text_table(rows)


def cell(run: Run, state: State) -> str:
    """One run in a few characters.

    Args:
        run: a training.
        state: how far it is.
    """
    reached = f"{state.epochs_done}/{run.point.epochs}"
    if state.kind == "done":
        return "done" if math.isnan(state.dice) else f"done {state.dice:.4f}"
    if state.kind == "running":
        if state.epochs_done >= run.point.epochs:
            return f"{reached} validates"
        dice = "" if math.isnan(state.dice) else f" {state.dice:.2f}"
        left = "" if state.seconds_left is None else f" {tqdm.format_interval(state.seconds_left)}"
        return f"{reached}{dice}{left}"
    return f"{state.kind} {reached}" if state.epochs_done else state.kind


def failures(grid: Grid, states: Mapping[str, State]) -> Iterator[str]:
    """What failed, and the last lines of each log.

    Args:
        grid: the sweep.
        states: of all its runs, by their names.
    """
    for run in grid.runs:
        state = states[run.name]
        if state.kind == "failed":
            yield f"failed: {run.point.label}, fold {run.fold} ({state.detail}); its log is {state.log}"
            yield from (f"    {line}" for line in state.lines)
