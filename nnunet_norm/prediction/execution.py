"""How a prediction is carried out, behind a narrow interface, and the plan that cuts the image into tiles.

The predictor knows networks, devices and mirroring; an execution plan knows which part of the image goes through the
network when, and what of the output is kept. Neither knows the other's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_norm.prediction.halo import Decision
from nnunet_norm.tiling import Box, Tile, plan_tiles

Forward = Callable[[Tensor], Tensor]
"""(1, C, *spatial) -> logits (1, K, *spatial), mirrored passes averaged; spatial extents are multiples of the stride."""


class Result:
    """Logits (K, *extents) of an image, added up over mirrored passes and folds."""

    def __init__(
        self,
        extents: Sequence[int],
        allocate: Callable[[Sequence[int], torch.dtype], Tensor] = lambda shape, dtype: torch.zeros(
            *shape, dtype=dtype
        ),
        weight: float = 1.0,
    ) -> None:
        """Begin with nothing.

        Args:
            extents: of the image.
            allocate: gives zeroed memory, where the result shall lie.
            weight: of everything that is added: 1 / folds.
        """
        self.extents = tuple(extents)
        self.weight = weight
        self.dtype: torch.dtype | None = None
        self._allocate = allocate
        self._sum: Tensor | None = None

    def add(self, place: tuple[int | slice, ...], logits: Tensor, weight: float = 1.0) -> None:
        """Add logits (K, *box) to the box; they are kept in single precision or better.

        Args:
            place: indices and slices of the image.
            logits: on any device; the precision of the first is told by ``dtype``.
            weight: of this pass among those that are averaged.
        """
        if self._sum is None:
            self.dtype = logits.dtype
            self._sum = self._allocate((len(logits), *self.extents), torch.promote_types(logits.dtype, torch.float32))
        logits = logits.to(self._sum.device, self._sum.dtype)
        if self.weight * weight != 1:
            logits = logits * (self.weight * weight)
        self._sum[(slice(None), *place)] += logits

    @property
    def logits(self) -> Tensor:
        """The sum, (K, *extents)."""
        assert self._sum is not None
        return self._sum


class ExecutionPlan(Protocol):
    """One way to predict one image."""

    @property
    def steps(self) -> int:
        """How often ``progress`` is called."""

    def describe(self) -> str:
        """The plan for the user, in one line."""

    def as_dict(self) -> dict[str, Any]:
        """The plan for a JSON file; ``plan`` is its name."""

    def run(self, forward: Forward, image: Tensor, result: Result, progress: Callable[[], object]) -> None:
        """Predict.

        Args:
            forward: the network; takes its input from any device.
            image: (C, *spatial), or (C, Z, *spatial) for a 2d network that takes a stack slice by slice.
            result: takes the logits.
            progress: called after every step.
        """


class TilesPlan:
    """Overlapping tiles on the grid of the total stride; the halo is cut away and every voxel written once."""

    def __init__(self, decision: Decision, shape: tuple[int, ...], reason: str = "") -> None:
        """Lay out the tiles.

        Args:
            decision: tile size and halo.
            shape: what is cut into tiles, at least the image's shape; the network sees zeros beyond the image.
            reason: why the image is predicted in tiles.
        """
        self.decision = decision
        self.shape = shape
        self.reason = reason

    @cached_property
    def tiles(self) -> list[Tile]:
        """The tiles of an image, or of one slice of a stack."""
        return plan_tiles(self.shape, self.decision.tile_size, self.decision.halo, self.decision.stride)

    @property
    def steps(self) -> int:
        """One step per tile."""
        return self.decision.tiles

    def describe(self) -> str:
        """See ``Decision.describe``."""
        return self.decision.describe() + (f"; in tiles because {self.reason}" if self.reason else "")

    def as_dict(self) -> dict[str, Any]:
        """See ``Decision.as_dict``; with whose statistics, and why in tiles."""
        population = "tile" if self.decision.statistics == "tile" else "stored"
        return self.decision.as_dict() | {"population": population, "why_tiles": self.reason or None}

    def run(
        self, forward: Forward, image: Tensor, result: Result, progress: Callable[[], object] = lambda: None
    ) -> None:
        """See ``ExecutionPlan.run``."""
        for index, plane in planes(image, len(self.shape)):
            for tile in self.tiles:
                logits = forward(read(plane, tile.read))[0]
                core, write = _within(tile, plane.shape[1:])
                result.add((*index, *write), logits[(slice(None), *core)])
                progress()


def flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """The mirrored passes that are averaged: the axes that are flipped in each; first the one without any."""
    return [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]


def planes(image: Tensor, ndim: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """What the network takes at a time: (index of a slice, slice) for a stack and a 2d network, else the image itself."""
    if image.ndim == ndim + 1:
        yield (), image
    else:
        for z in range(image.shape[1]):
            yield (z,), image[:, z]


def read(plane: Tensor, box: Box) -> Tensor:
    """The box of (C, *spatial) as a batch of one, with zeros where it reaches beyond the far end of the image."""
    inside = plane[(slice(None), *box)]
    missing = [(b.stop - b.start) - n for b, n in zip(box, inside.shape[1:], strict=True)]
    padding = [width for m in reversed(missing) for width in (0, m)]
    return functional.pad(inside, padding)[None].contiguous()


def _within(tile: Tile, extents: tuple[int, ...]) -> tuple[Box, Box]:
    """Core and write of a tile, as far as they lie within the image."""
    write = tuple(slice(w.start, min(w.stop, n)) for w, n in zip(tile.write, extents, strict=True))
    core = tuple(slice(c.start, c.start + w.stop - w.start) for c, w in zip(tile.core, write, strict=True))
    return core, write
