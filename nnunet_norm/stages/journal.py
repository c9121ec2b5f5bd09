"""How far a run through the pieces of a network has come, so that another process can go on where one was killed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nnunet_norm.layers.moments import Moments
from nnunet_norm.stages.regions import Region

Statistics = tuple[list[float], list[float]]
"""Mean and biased variance per channel; float64, which JSON keeps to the last bit."""


@dataclass(frozen=True)
class Progress:
    """A point in a run. All that came before it is in the files of scratch and with whoever takes the output.

    Attributes:
        piece: the piece that is to be computed.
        todo: its blocks that are left, in order; None: all of them.
        moments: of its map, as far as it is computed: count, mean and variance; None if nothing was gathered yet.
        maps: by node, the name of the file that holds its map.
        statistics: by norm, what was settled.
        halvings: how often blocks were halved because a device's memory did not hold them.
    """

    piece: int = 0
    todo: tuple[Region, ...] | None = None
    moments: tuple[float, list[float], list[float]] | None = None
    maps: Mapping[int, str] = field(default_factory=dict)
    statistics: Mapping[int, Statistics] = field(default_factory=dict)
    halvings: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The point for a JSON file."""
        return {
            "piece": self.piece,
            "todo": self.todo,
            "moments": self.moments,
            "maps": {str(node): name for node, name in self.maps.items()},
            "statistics": {str(norm): found for norm, found in self.statistics.items()},
            "halvings": self.halvings,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Progress:
        """The point that ``as_dict`` described; raises KeyError, TypeError or ValueError for anything else."""
        todo, moments, maps, statistics = (content[name] for name in ("todo", "moments", "maps", "statistics"))
        if moments is not None:
            number, mean, var = moments
            moments = float(number), list(mean), list(var)
        return cls(
            piece=int(content["piece"]),
            todo=None if todo is None else tuple(tuple((int(a), int(b)) for a, b in region) for region in todo),
            moments=moments,
            maps={int(node): str(name) for node, name in dict(maps).items()},
            statistics={int(norm): (list(mean), list(var)) for norm, (mean, var) in dict(statistics).items()},
            halvings=int(content["halvings"]),
        )


class Journal(Protocol):
    """Keeps the points of a run; see ``run``."""

    @property
    def resumed(self) -> Progress | None:
        """Where to go on; None: at the beginning."""

    def is_due(self) -> bool:
        """Whether the time has come to note a point in the middle of a piece."""

    def needs(self, name: str) -> bool:
        """Whether the last point that was noted names a file, which so must not go before another is."""

    def note(self, progress: Progress) -> None:
        """Take a point; everything before it has been handed to files and sink, but may not be on the disk yet."""


def moments_as_numbers(moments: Moments | None) -> tuple[float, list[float], list[float]] | None:
    """Moments for ``Progress``."""
    return None if moments is None else (float(moments.number), moments.mean.tolist(), moments.var.tolist())


def moments_of_numbers(numbers: tuple[float, list[float], list[float]] | None) -> Moments | None:
    """Moments of ``Progress``."""
    if numbers is None:
        return None
    number, mean, var = (torch.tensor(part, dtype=torch.float64) for part in numbers)
    return Moments(number, mean, var)
