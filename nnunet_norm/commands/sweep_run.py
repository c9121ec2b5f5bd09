"""Train every point of a grid in every fold: what is not finished, and from where it was.

    nnunet-norm sweep run grid.yaml --dry-run
    nnunet-norm sweep run grid.yaml                  one training per GPU of this machine
    nnunet-norm sweep run grid.yaml --engine slurm --slurm_partition gpu --slurm_array_limit 8

Called again, it leaves out what is finished (final checkpoint, and a validation with it), goes on with what was interrupted,
and begins anew what failed. A training that fails does not stop the others; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from nnunet_norm.commands.machine import cores
from nnunet_norm.commands.slurm import add_resource_arguments, refuse_resources, resources_of
from nnunet_norm.commands.sweep_grid import add_grid_arguments, grid_of
from nnunet_norm.errors import SetupError, SubmissionError, SweepError
from nnunet_norm.submission import check_executor

if TYPE_CHECKING:
    from nnunet_norm.sweep.cluster import Queued
    from nnunet_norm.sweep.grid import Grid
    from nnunet_norm.sweep.local import Ended
    from nnunet_norm.sweep.points import Run
    from nnunet_norm.sweep.task import Task

ENGINES = ("local", "slurm", "debug")

CPUS = 8
"""Cores of a job per GPU unless said otherwise."""

MINUTES = 1440
"""Of a job unless said otherwise."""

INTERVAL = 5.0
"""Seconds between two looks at SLURM's queue."""

FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, and where it is trained."""
    add_grid_arguments(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the points, their plans and what they cost, and do nothing"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="local: this machine, with a training per GPU at a time; slurm: an array of jobs; debug: one after the other in "
        "this process (default: local)",
    )
    parser.add_argument("-device", choices=("cuda", "cpu"), help="default: cuda; cpu if the grid has gpus: 0")
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="local: trainings at once; with -device cpu they share the cores (default: as many as there are GPUs; 1 with "
        "-device cpu)",
    )
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs of batch jobs")
    group = parser.add_argument_group(
        "SLURM",
        "For --engine slurm, which needs the package submitit (pip install 'nnunet_norm[slurm]'). GPUs and machines per job "
        "are the grid's (gpus, nodes).",
    )
    add_resource_arguments(group, cpus=f"{CPUS} per GPU", minutes=MINUTES)


def run(args: argparse.Namespace) -> None:
    """Train; ends with code 1 if a training failed.

    Raises:
        NnunetNormError: what cannot be trained so; nothing was begun then.
    """
    _check(args)
    grid = grid_of(args)
    device = args.device or ("cuda" if grid.gpus else "cpu")
    if args.dry_run:
        _show(grid)
        return
    if grid.nodes > 1 and args.engine != "slurm":
        raise SweepError(f"nodes {grid.nodes} of the grid: several machines need --engine slurm")
    {"local": _run_here, "slurm": _submit, "debug": _debug}[args.engine](args, grid, device)


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before anything heavy is imported."""
    if args.slots is not None:
        if args.engine != "local":
            raise SetupError(f"--slots {args.slots} is for --engine local; with slurm use --slurm_array_limit")
        if args.slots < 1:
            raise SetupError(f"--slots {args.slots}: must be at least 1")
    if args.engine == "slurm":
        resources_of(args, gpus=0, cpus=1, minutes=MINUTES)
        if not args.dry_run:
            check_executor()
    else:
        refuse_resources(args, "--engine slurm")


def _show(grid: Grid) -> None:
    from nnunet_norm.sweep.cost import describe
    from nnunet_norm.sweep.plans import check_points

    check_points(grid)
    print(*describe(grid), sep="\n")
    _warn_of_padding(grid)
    finished = len(grid.runs) - len(_unfinished(grid))
    if finished:
        print(f"{_counted(finished)} finished already")


def _prepare(grid: Grid) -> None:
    """Everything that trainings read and several would write at once."""
    from nnunet_norm.sweep.plans import write_plans
    from nnunet_norm.sweep.split import write_split

    write_plans(grid)
    write_split(grid)
    _warn_of_padding(grid)


def _warn_of_padding(grid: Grid) -> None:
    from nnunet_norm.sweep.plans import padded_points

    for line in padded_points(grid):
        print(f"WARNING: {line}")


def _run_here(args: argparse.Namespace, grid: Grid, device: str) -> None:
    """By the local engine."""
    from nnunet_norm.sweep.cluster import queue_of
    from nnunet_norm.sweep.local import run_local
    from nnunet_norm.sweep.locking import locked, refuse_locked
    from nnunet_norm.sweep.task import task_of

    slots = _slots(args, grid, device)
    with locked(grid.folder, grid.name):
        _prepare(grid)
        runs = _unfinished(grid)
        waiting = [queued.job for queued in queue_of(grid.folder).values() if queued.state not in ("", "UNKNOWN")]
        if waiting:
            raise SweepError(
                f"SLURM has {len(waiting)} jobs of this sweep ({waiting[0]}, ...): wait for them, or cancel them (scancel)"
            )
        for unfinished in runs:
            refuse_locked(grid.fold_folder(unfinished))
        tasks = [task_of(grid, one, device=device, cores=max(cores() // len(slots), 1)) for one in runs]
        _tell(grid, len(grid.runs) - len(runs), len(tasks), f"{len(slots)} at once")
        if tasks:
            with tqdm(total=len(tasks), unit="run", disable=args.disable_progress_bar) as bar:
                told = _Told(grid, dict(zip(tasks, runs, strict=True)), bar)
                run_local(tasks, slots, began=told.began, ended=told.ended)
    _conclude(args, grid)


def _slots(args: argparse.Namespace, grid: Grid, device: str) -> Sequence[dict[str, str]]:
    """What each of the trainings that go on at once has for itself."""
    from nnunet_norm.sweep.local import gpu_slots

    if device == "cpu":
        return [{}] * (args.slots or 1)
    if not grid.gpus:
        raise SweepError("-device cuda: the grid has gpus: 0; give it GPUs, or train with -device cpu")
    import torch

    return gpu_slots(torch.cuda.device_count(), grid.gpus, args.slots)


def _debug(args: argparse.Namespace, grid: Grid, device: str) -> None:
    from nnunet_norm.sweep.debug import run_here
    from nnunet_norm.sweep.locking import locked
    from nnunet_norm.sweep.task import task_of

    with locked(grid.folder, grid.name):
        _prepare(grid)
        run_here([task_of(grid, run, device=device) for run in _unfinished(grid)])
    _conclude(args, grid)


def _submit(args: argparse.Namespace, grid: Grid, device: str) -> None:
    """As an array of jobs; what is queued or running already is left as it is."""
    from nnunet_norm.sweep.cluster import queue_of, submit
    from nnunet_norm.sweep.locking import locked, refuse_locked
    from nnunet_norm.sweep.state import state_of
    from nnunet_norm.sweep.task import task_of

    gpus = grid.gpus if device == "cuda" else 0
    resources = resources_of(args, gpus=gpus, cpus=CPUS * max(gpus, 1), minutes=MINUTES, nodes=grid.nodes)
    with locked(grid.folder, grid.name):
        _prepare(grid)
        queue = queue_of(grid.folder)
        unknown = [queued.job for queued in queue.values() if queued.state == "UNKNOWN"]
        if unknown:
            raise SubmissionError(
                f"SLURM does not say whether job {unknown[0]} of this sweep is still there: try later"
            )
        runs, all_unfinished = [], _unfinished(grid)
        for unfinished in all_unfinished:
            state = state_of(grid, unfinished, queue)
            if state.kind not in ("queued", "running"):
                runs.append(unfinished)
            elif state.owner is not None and (state.owner.sweep != grid.name or state.owner.job is None):
                refuse_locked(grid.fold_folder(unfinished))
        tasks = [task_of(grid, one, device=device, cores=resources.cpus) for one in runs]
        waiting = len(all_unfinished) - len(tasks)
        _tell(grid, len(grid.runs) - len(all_unfinished), len(tasks), "as jobs of SLURM")
        if waiting:
            print(f"{_counted(waiting)} queued or running already")
        if tasks:
            submitted = submit(tasks, resources)
            ids = submitted.ids
            print(f"submitted {ids[0]}" + (f" to {ids[-1]}" if len(ids) > 1 else ""))
            print(
                f"what SLURM's jobs write: {submitted.folder}; state: nnunet-norm sweep status {args.grid}", flush=True
            )
    if args.slurm_wait:
        _wait(args, grid)
        _conclude(args, grid, queue_of(grid.folder))


def _wait(args: argparse.Namespace, grid: Grid) -> None:
    """Until SLURM has no job of the sweep any more."""
    from nnunet_norm.sweep.cluster import queue_of

    names = {run.name for run in grid.runs}
    gone = 0  # a job that is requeued is missing for a moment
    with tqdm(total=len(names), unit="run", disable=args.disable_progress_bar) as bar:
        while gone < 2:
            states = [queued.state for name, queued in queue_of(grid.folder).items() if name in names and queued.state]
            gone = 0 if states else gone + 1
            found = Counter(state.split()[0] for state in states)
            bar.set_postfix_str(", ".join(f"{count} {state}" for state, count in sorted(found.items())))
            bar.update(len(names) - len(states) - bar.n)
            time.sleep(INTERVAL if states else 1)


def _unfinished(grid: Grid) -> list[Run]:
    from nnunet_norm.sweep.finished import missing_of

    return [run for run in grid.runs if missing_of(grid.fold_folder(run), npz=grid.npz) is not None]


def _tell(grid: Grid, finished: int, count: int, how: str) -> None:
    print(f"{grid.name}: {len(grid.points)} points in {len(grid.folds)} folds; {_counted(finished)} finished already")
    if count:
        print(f"{_counted(count)} to be trained, {how}; logs: {grid.folder / 'logs'}", flush=True)


def _counted(runs: int) -> str:
    return f"{runs} run is" if runs == 1 else f"{runs} runs are"


class _Told:
    """Tells of trainings that end, above the bar."""

    def __init__(self, grid: Grid, runs: dict[Task, Run], bar: tqdm[None]) -> None:
        self.grid, self.runs, self.bar = grid, runs, bar
        self.begun: dict[Task, float] = {}
        self.failed = 0

    def began(self, task: Task) -> None:
        self.begun[task] = time.monotonic()
        self._postfix()

    def ended(self, end: Ended) -> None:
        run = self.runs[end.task]
        what = f"{run.point.label}, fold {run.fold}"
        taken = tqdm.format_interval(time.monotonic() - self.begun.pop(end.task))
        self.bar.update()
        if end.code:
            from nnunet_norm.sweep.records import ending

            self.failed += 1
            lines = [f"failed: {what} ({ending(end.code)}, after {taken}); its log is {end.task.log}"]
            lines += [f"    {line}" for line in end.output.splitlines()]
        else:
            from nnunet_norm.sweep.state import state_of

            lines = [f"done: {what} (Dice {state_of(self.grid, run).dice:.4f}, after {taken})"]
        with self.bar.external_write_mode():
            print(*lines, sep="\n", flush=True)
        self._postfix()

    def _postfix(self) -> None:
        failed = f", {self.failed} failed" if self.failed else ""
        self.bar.set_postfix_str(f"{len(self.begun)} running{failed}")


def _conclude(args: argparse.Namespace, grid: Grid, queue: Mapping[str, Queued] | None = None) -> None:
    """Say what came of it, with the last lines of what failed; code 1 unless everything is finished."""
    from nnunet_norm.commands.sweep_status import failures
    from nnunet_norm.sweep.state import state_of

    states = {run.name: state_of(grid, run, queue) for run in grid.runs}
    lost = [state for state in states.values() if state.kind != "done"]
    if not lost:
        print(f"all {len(states)} runs of {grid.name} are finished; next: nnunet-norm sweep report {args.grid}")
        return
    for line in failures(grid, states):
        print(line, file=sys.stderr)
    print(
        f"{len(states) - len(lost)} of {len(states)} runs are finished; the same command again goes on with the others",
        file=sys.stderr,
    )
    sys.exit(FAILED)
