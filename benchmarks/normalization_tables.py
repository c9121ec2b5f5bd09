"""The tables of ``normalization.py``, cell by cell."""

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from normalization_settings import NORMALIZATION_BATCHES, ROWS

REFERENCE = "InstanceNorm"
WHOLE, BLENDED = ("whole", "dice"), ("blending",)
"""Where a run has the Dice of both predictors."""


def average(values: Iterable[float | None]) -> float | None:
    """Over what was measured."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def shown(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean, and from the least to the most in brackets."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    middle = format(mean(there), form)
    return middle if len(there) == 1 else f"{middle} ({format(min(there), form)} to {format(max(there), form)})"


def of_runs(runs: dict[str, Any], *keys: str) -> list[Any]:
    """What lies under ``keys`` in every run, None where it is missing."""
    found = []
    for run in runs.values():
        value: Any = run
        for key in keys:
            value = None if value is None else value.get(key)
        found.append(value)
    return found


def counted(found: Sequence[Any], seeds: int) -> str:
    """How many of the seeds have something, as "1 of 3"."""
    return f"{sum(each is not None and each != [] for each in found)} of {seeds}"


def means(lists: Iterable[list[float | None] | None]) -> list[float | None]:
    """Of each run over the classes."""
    return [None if each is None else average(each) for each in lists]


def per_class(lists: Sequence[Any], number: int) -> list[float | None]:
    """One class of each run."""
    return [None if each is None else list(each.values() if isinstance(each, dict) else each)[number] for each in lists]


def classes_of(rows: dict[str, Any]) -> list[str]:
    """Names of the classes."""
    return next((names for runs in rows.values() for names in of_runs(runs, "tables", "classes") if names), [])


def best_way(rows: dict[str, Any]) -> tuple[str, ...] | None:
    """Where the Dice lies of the predictor that is the better one for InstanceNorm, over all seeds; None: not measured."""
    runs = [run["tables"] for run in rows[REFERENCE].values() if run.get("tables")]
    found = {way: average(average(_inside(run, way)) for run in runs) for way in (WHOLE, BLENDED)}
    there = {way: value for way, value in found.items() if value is not None}
    return max(there, key=lambda way: there[way]) if len(there) == len(found) else None


def differences(rows: dict[str, Any], row: str, way: Sequence[str] | None) -> list[float]:
    """Mean Dice of whole images of a row less that of InstanceNorm, seed by seed; ``way``: which Dice of the latter."""
    found: list[float] = []
    for seed, run in rows[row].items() if way else ():
        pair = run.get("tables"), rows[REFERENCE].get(seed, {}).get("tables")
        if None in pair:
            continue
        values = average(pair[0]["whole"]["dice"]), average(_inside(pair[1], way))
        if None not in values:
            found.append(values[0] - values[1])
    return found


def _inside(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found[key]
    return found or []


def in_seeds(number: int) -> str:
    """In words."""
    return f"{number} seed{'s' * (number != 1)}"


def modes_table(rows: dict[str, Any], seeds: int) -> list[list[str]]:
    """Dice in eval and train mode, and disparity."""
    classes = classes_of(rows)
    head = ["norm", "seeds", "eval", "train", "disparity", "against the batch alone", "clipped"]
    cells = [head + [f"{name}: {what}" for name in classes for what in ("eval", "train", "disparity")]]
    for row, runs in rows.items():
        measured = of_runs(runs, "tables", "modes")
        number = counted(measured, seeds)
        if not any(measured):
            cells.append([row, number, *["-"] * (len(cells[0]) - 2)])
            continue
        kinds = [("dice", "eval"), ("dice", "train"), ("disparity", "train")]
        found = [of_runs(runs, "tables", "modes", *kind) for kind in kinds]
        batch = means(of_runs(runs, "tables", "modes", "disparity", "batch"))
        clipped = of_runs(runs, "tables", "reported", "clipped")
        whole = [shown(means(each)) for each in found] + [shown(batch), shown(clipped, ".1%")]
        every = [shown(per_class(each, i)) for i in range(len(classes)) for each in found]
        cells.append([row, number, *whole, *every])
    return cells if classes else []


def seams_table(rows: dict[str, Any], seeds: int) -> list[list[str]]:
    """Tile mismatch and max dist."""
    classes = classes_of(rows)
    cells = [["norm", "seeds", *classes, "max dist", "tile", "halo", "max dist as predicted by default"]]
    for row, runs in rows.items():
        found = [each for each in of_runs(runs, "tables", "mismatch") if each]
        number = counted(found, seeds)
        if not found:
            cells.append([row, number, *["-"] * (len(cells[0]) - 2)])
            continue
        values = [each["per_class"] for each in found]
        sizes = [" x ".join(map(str, found[0]["tile"])), " x ".join(str(max(pair)) for pair in found[0]["halo"])]
        own = worst([each["verdict"] for each in found])
        default = worst(of_runs(runs, "tables", "reported", "tile_mismatch"))
        every = [shown(per_class(values, i)) for i in range(len(classes))]
        cells.append([row, number, *every, own, *sizes, default])
    return cells if classes else []


def worst(verdicts: Iterable[str | None]) -> str:
    """Of all seeds: "no" if it is for every one, else how far the largest differences reach, and for how many it is "no"."""
    there = [verdict for verdict in verdicts if verdict]
    numbers = [float(verdict) for verdict in there if not verdict.startswith("no")]
    if not there:
        return "-"
    if not numbers:
        return next((word for word in ("not measured", "no") if word in there), "no (rounding)")
    none = sum(verdict.startswith("no") and verdict != "not measured" for verdict in there)
    return shown(numbers, ".3g") + (f", no in {none} of {in_seeds(len(there))}" if none else "")


def whole_table(rows: dict[str, Any], seeds: int) -> list[list[str]]:
    """Dice of whole images."""
    classes = classes_of(rows)
    head = ["norm", "seeds", "mean", *classes, "less InstanceNorm", "blending: mean"]
    cells, way = [head + [f"blending: {name}" for name in classes]], best_way(rows)
    for row, runs in rows.items():
        found, blended = of_runs(runs, "tables", "whole", "dice"), of_runs(runs, "tables", "blending")
        less = shown(differences(rows, row, way), "+.3f") if row != REFERENCE else ""
        own = [shown(means(found)), *[shown(per_class(found, i)) for i in range(len(classes))]]
        by_tiles = [shown(per_class(blended, i)) for i in range(len(classes))]
        cells.append([row, counted(found, seeds), *own, less, shown(means(blended)), *by_tiles])
    return cells if classes else []


def tiles_table(rows: dict[str, Any], seeds: int) -> list[list[str]]:
    """Dice against the size of the tiles."""
    sizes = next((found for runs in rows.values() for found in of_runs(runs, "tiles", "sizes") if found), [])
    cells = [["norm", "seeds", *[" x ".join(map(str, each["size"])) for each in sizes], "whole image"]]
    for row, every in rows.items():
        runs = with_part(every, "tiles")
        found = [each for each in of_runs(runs, "tiles", "sizes") if each]
        if found:
            values = [shown(means([run[number]["dice"] for run in found])) for number in range(len(sizes))]
            cells.append([row, counted(found, seeds), *values, shown(means(whole_images(runs)))])
    return cells


def with_part(runs: dict[str, Any], part: str) -> dict[str, Any]:
    """The seeds of which a part was measured: what stands in one line is of the same trainings."""
    return {seed: parts for seed, parts in runs.items() if part in parts}


def whole_images(runs: dict[str, Any]) -> list[Any]:
    """Dice of whole images per run, None where those are predicted in tiles."""
    pairs = zip(*(of_runs(runs, "tables", "whole", key) for key in ("dice", "in_tiles")), strict=True)
    return [None if in_tiles else dice for dice, in_tiles in pairs]


def batches_table(rows: dict[str, Any], seeds: int) -> list[list[str]]:
    """Dice and disparity against the batch that normalizes: trained so, and evaluated so."""
    cells = [["norm", "seeds", "batch that normalizes", "eval", "train", "disparity", "against the batch alone"]]
    for size in NORMALIZATION_BATCHES:
        found = [each for each in of_runs(rows[str(size)], "ghost", "modes") if each]
        if found:
            cells.append([f"trained: GhostBN by {size}", counted(found, seeds), str(size), *modes_cells(found)])
    for row in ROWS:
        measured = [each for each in of_runs(rows[row], "batches", "sizes") if each]
        for size in NORMALIZATION_BATCHES:
            found = [one for each in measured for one in each if one["batch_size"] == size]
            if found:
                cells.append([row, counted(found, seeds), str(size), *modes_cells(found)])
    return cells


def modes_cells(found: list[dict[str, Any]]) -> list[str]:
    """Mean Dice in eval and train mode, and both disparities."""
    kinds = [("dice", "eval"), ("dice", "train"), ("disparity", "train"), ("disparity", "batch")]
    return [shown(means([each[kind].get(mode) for each in found])) for kind, mode in kinds]


def transfer_table(rows: dict[str, Any], other: dict[str, Any], seeds: int) -> list[list[str]]:
    """Membranes of the other dataset."""
    head = [
        "norm",
        "seeds",
        "own images",
        "other images, as trained",
        "with the others' statistics",
        "blended tiles",
        "max dist",
    ]
    cells = [[*head, "trained there"]]
    for row, every in rows.items():
        runs = with_part(every, "transfer")
        if runs:
            own = per_class(of_runs(runs, "tables", "whole", "dice"), 0)
            found = [of_runs(runs, "transfer", key) for key in ("as_trained", "adapted", "blending")]
            dist = worst(of_runs(runs, "transfer", "mismatch"))
            those = {seed: parts for seed, parts in other.get(row, {}).items() if seed in runs}
            there = shown(per_class(of_runs(those, "tables", "whole", "dice"), 0))
            cells.append([row, counted(found[0], seeds), shown(own), *map(shown, found), dist, there])
    return cells
