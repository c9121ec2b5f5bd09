"""What a sweep costs, before it runs: memory and work of every point, and hours where epochs have been seen."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from nnunet_norm.architectures import trains_unetr
from nnunet_norm.errors import ArchitectureError, PlansError, SetupError
from nnunet_norm.pages import text_table
from nnunet_norm.planning import resolve_configuration
from nnunet_norm.planning.batches import shares
from nnunet_norm.planning.fitting import Training
from nnunet_norm.planning.memory import Network
from nnunet_norm.planning.topology import as_text
from nnunet_norm.planning.work import epoch_flops
from nnunet_norm.reading import read_object
from nnunet_norm.sweep.grid import Grid
from nnunet_norm.sweep.points import Point, Run
from nnunet_norm.sweep.progress import read_epochs

PETA = 10**15

UNKNOWN = "-"


@dataclass(frozen=True)
class Cost:
    """Of one training of a point.

    Attributes:
        point: that costs it.
        gigabytes: of one GPU; None where that cannot be told.
        flops: of all epochs, over all GPUs; None likewise.
        seconds: of all epochs; None where no training of the sweep has finished an epoch.
        seen: whether they are from epochs of this very point, not scaled from others.
    """

    point: Point
    gigabytes: float | None
    flops: int | None
    seconds: float | None
    seen: bool


def costs(grid: Grid) -> list[Cost]:
    """The cost of a training of every point.

    Seconds are those of finished epochs of this sweep. Where a point has none, they are scaled from the others by the
    operations of its convolutions, which is rough: small batches and patches use a GPU less well.
    """
    description = read_object(grid.preprocessed / "dataset.json", SetupError, "run nnUNetv2_plan_experiment")
    estimates: dict[tuple[str, bool], tuple[float | None, int | None]] = {}  # several trainers share plans
    for point in grid.points:
        if _network_of(point) not in estimates:
            estimates[_network_of(point)] = _estimate(grid, point, description)
    seen = {point.name: _epoch_seconds(grid, point) for point in grid.points}
    rates = [
        flops / seconds
        for point in grid.points
        if (seconds := seen[point.name]) and (flops := estimates[_network_of(point)][1])
    ]
    found = []
    for point in grid.points:
        gigabytes, flops = estimates[_network_of(point)]
        seconds = seen[point.name]
        if seconds is None and flops is not None and rates:
            seconds = flops / median(rates)
        total = None if flops is None else flops * point.epochs
        whole = None if seconds is None else seconds * point.epochs
        found.append(Cost(point, gigabytes, total, whole, seen[point.name] is not None))
    return found


def describe(grid: Grid) -> list[str]:
    """A table of the points with their plans and costs, and the sum over all folds; lines for people."""
    found = costs(grid)
    rows = [("point", "trainer", "plans", "patch", "batch", "GB per GPU", "PFLOP per fold", "hours per fold")]
    for cost in found:
        resolved = resolve_configuration(dict(cost.point.plans), grid.configuration)
        each = shares(resolved["batch_size"], grid.processes)
        batch = f"{resolved['batch_size']}" + (f" ({each[0]} a GPU)" if grid.processes > 1 else "")
        rows.append(
            (
                cost.point.label,
                cost.point.trainer,
                cost.point.plans_name,
                as_text(resolved["patch_size"]),
                batch,
                UNKNOWN if cost.gigabytes is None else f"{cost.gigabytes:.1f}",
                UNKNOWN if cost.flops is None else f"{cost.flops / PETA:.3g}",
                UNKNOWN if cost.seconds is None else f"{cost.seconds / 3600:.3g}" + ("" if cost.seen else " (scaled)"),
            )
        )
    return [*text_table(rows), "", *_total(grid, found)]


def _total(grid: Grid, found: list[Cost]) -> list[str]:
    trainings = f"{len(grid.points)} points x {len(grid.folds)} folds = {len(grid.runs)} trainings"
    flops = [cost.flops for cost in found]
    if None not in flops:
        trainings += f", {sum(flop for flop in flops if flop) * len(grid.folds) / PETA:.3g} PFLOP"
    seconds = [cost.seconds for cost in found]
    if None in seconds:
        return [trainings, "Hours are estimated as soon as one training of the sweep has finished an epoch."]
    hours = sum(second for second in seconds if second) * len(grid.folds) / 3600
    where = f"on {grid.gpus * grid.nodes} GPUs each" if grid.gpus * grid.nodes > 1 else "one after the other"
    return [f"{trainings}, {hours:.3g} hours {where}, without validation"]


def _network_of(point: Point) -> tuple[str, bool]:
    """What tells the networks of points apart."""
    return point.plans_name, trains_unetr(point.trainer)


def _estimate(grid: Grid, point: Point, description: dict[str, Any]) -> tuple[float | None, int | None]:
    """Memory of a GPU and operations of an epoch."""
    network = Network.of(dict(point.plans), grid.configuration, description, point.trainer)
    samples = shares(network.resolved["batch_size"], grid.processes)[0]
    try:
        return Training(network, samples).gigabytes, epoch_flops(network, grid.processes)
    except (PlansError, ArchitectureError):  # a network of one's own, that does not run without data
        return None, None


def _epoch_seconds(grid: Grid, point: Point) -> float | None:
    """The median over the finished epochs of a point's trainings."""
    seen = [epoch.seconds for fold in grid.folds for epoch in read_epochs(grid.fold_folder(Run(point, fold)))]
    finite = [seconds for seconds in seen if seconds > 0]
    return median(finite) if finite else None
