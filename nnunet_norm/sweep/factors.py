"""In what the points of a grid differ: factors and their levels, which tables and figures are arranged by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_norm.planning import resolve_configuration
from nnunet_norm.planning.topology import as_text
from nnunet_norm.sweep.grid import Grid
from nnunet_norm.sweep.grid_file import SETTING, parts_of
from nnunet_norm.sweep.points import Point, shown

BATCH, PATCH = "batch_size", "patch_size"


@dataclass(frozen=True)
class Factors:
    """Everything in which points differ.

    Patch and batch are those of the plans, whatever axis of the grid said them (a recipe's settings say both).

    Attributes:
        levels: factor -> its levels in words, in order: sizes and numbers rising, others as in the grid.
        of_point: name of a point -> factor -> level.
    """

    levels: Mapping[str, tuple[str, ...]]
    of_point: Mapping[str, Mapping[str, str]]

    def of(self, point: Point) -> Mapping[str, str]:
        """A point's levels."""
        return self.of_point[point.name]

    def place(self, point: Point, factor: str) -> int:
        """Where a point's level stands in the order of levels; 0 for what is no factor."""
        return self.levels[factor].index(self.of(point)[factor]) if factor in self.levels else 0

    def groups(self, points: Sequence[Point], *without: str) -> dict[tuple[str, ...], list[Point]]:
        """Points by their levels of all factors but ``without``, in the order of the points."""
        found: dict[tuple[str, ...], list[Point]] = {}
        for point in points:
            key = tuple(level for factor, level in self.of(point).items() if factor not in without)
            found.setdefault(key, []).append(point)
        return found


def factors_of(grid: Grid) -> Factors:
    """The factors of a grid, in the order of its axes; a factor has two levels at least."""
    said = [dict(_said(grid, point)) for point in grid.points]
    names = [name for name in dict.fromkeys(key for of_one in said for key in of_one) if _differ(said, name)]
    if SETTING in names and len({_key(of_one, names, SETTING) for of_one in said}) == len(said):
        names.remove(SETTING)  # patch and batch say it all
    levels = {}
    for name in names:
        values = {_words(name, of_one.get(name)): of_one.get(name) for of_one in said}
        levels[name] = tuple(text for text, _ in sorted(values.items(), key=lambda level: _size(level[1])))
    of_point = {
        point.name: {name: _words(name, of_one.get(name)) for name in names}
        for point, of_one in zip(grid.points, said, strict=True)
    }
    return Factors(levels, of_point)


def spoken(factor: str) -> str:
    """A factor's name for people."""
    return factor.replace("_", " ")


def _said(grid: Grid, point: Point) -> Iterator[tuple[str, Any]]:
    """What is special about a point, key by key; patch and batch where the axes stand that say them, else last."""
    resolved = resolve_configuration(dict(point.plans), grid.configuration)
    sizes = {PATCH: list(resolved[PATCH]), BATCH: resolved[BATCH]}
    for axis, value in point.values.items():
        yield from ((key, sizes.get(key, part)) for key, part in parts_of(axis, value).items())
    yield from sizes.items()


def _differ(said: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({_words(name, of_one.get(name)) for of_one in said}) > 1


def _key(said: Mapping[str, Any], names: Sequence[str], without: str) -> tuple[str, ...]:
    return tuple(_words(name, said.get(name)) for name in names if name != without)


def _words(factor: str, value: Any) -> str:
    """A level under the heading of its factor, so without its name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if factor == PATCH:
        return as_text(value)
    if value is None and factor != "loss":
        return "-"
    return shown(factor, value)


def _size(value: Any) -> float:
    """By what levels are sorted; all the same for words, which keep their order."""
    if isinstance(value, list | tuple):
        return float(math.prod(value)) if all(isinstance(item, int | float) for item in value) else 0.0
    return float(value) if isinstance(value, int | float) else 0.0
