"""The execution plan that cuts the image into tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnunet_norm.prediction.execution import Folds, Image, PartOf, Result, Sink, planes, read, stream
from nnunet_norm.prediction.halo import Decision
from nnunet_norm.prediction.journal import Position, RunJournal
from nnunet_norm.stages.transfer import Transfer
from nnunet_norm.tiling import Box, Tile, plan_tiles


class TilesPlan:
    """Overlapping tiles on the grid of the total stride; the halo is cut away and every voxel written once."""

    def __init__(
        self,
        decision: Decision,
        shape: tuple[int, ...],
        reason: str = "",
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        """Lay out the tiles.

        Args:
            decision: tile size and halo.
            shape: what is cut into tiles, at least the image's shape; the network sees zeros beyond the image.
            reason: why the image is predicted in tiles.
            device: where the network computes.
        """
        self.decision = decision
        self.shape = shape
        self.reason = reason
        self.device = device

    @cached_property
    def tiles(self) -> list[Tile]:
        """The tiles of an image, or of one slice of a stack."""
        return plan_tiles(self.shape, self.decision.tile_size, self.decision.halo, self.decision.stride)

    def steps(self, folds: int) -> int:
        """One step per tile."""
        del folds
        return self.decision.tiles

    def describe(self) -> str:
        """See ``Decision.describe``."""
        return self.decision.describe() + (f"; in tiles because {self.reason}" if self.reason else "")

    def as_dict(self) -> dict[str, Any]:
        """See ``Decision.as_dict``; with whose statistics, and why in tiles."""
        return self.decision.as_dict() | {"population": self.decision.population, "why_tiles": self.reason or None}

    def run(
        self,
        folds: Folds,
        image: Image,
        sink: Sink,
        progress: Callable[[], object] = lambda: None,
        journal: RunJournal | None = None,
    ) -> None:
        """See ``ExecutionPlan.run``. Of every tile all folds are averaged before it is written."""
        start = journal.position if journal is not None else Position()
        beside = self.device.type == "cuda" or not isinstance(image, Tensor)
        with Transfer(self.device, overlap=beside) as transfer:
            for _ in range(start.plane * len(self.tiles)):
                progress()
            for number, (index, plane) in enumerate(planes(image, len(self.shape), start.plane), start.plane):
                here = start if number == start.plane else Position(number)
                _Plane(self, folds, plane, PartOf(sink, index), transfer, progress, journal).run(here)
                if journal is not None and journal.is_due():
                    transfer.flush()
                    journal.note(Position(number + 1))


class _Plane:
    """The tiles of an image, or of a slice of a stack."""

    def __init__(
        self,
        plan: TilesPlan,
        folds: Folds,
        plane: Image,
        sink: Sink,
        transfer: Transfer,
        progress: Callable[[], object],
        journal: RunJournal | None,
    ) -> None:
        self.plan, self.folds, self.plane, self.sink = plan, folds, plane, sink
        self.transfer, self.progress, self.journal = transfer, progress, journal
        self.extents = tuple(plane.shape[1:])

    def run(self, start: Position) -> None:
        """Predict the tiles from a position on."""
        tiles = self.plan.tiles
        for _ in tiles[: start.step]:
            self.progress()
        total = self._total(start)
        for done in range(start.step, len(tiles)):
            tile, following = tiles[done], tiles[done + 1] if done + 1 < len(tiles) else None
            batch = self.transfer.read(done, self._reading(tile))[0]
            if following is not None:
                self.transfer.fetch(done + 1, self._reading(following))
            logits = self.folds.mean(batch)[0]
            core, write = _within(tile, self.extents)
            put = self.sink.add if total is None else total.put
            self.transfer.write(put, write, logits[(slice(None), *core)])
            self.progress()
            if self.journal is not None and self.journal.is_due():
                self.transfer.flush()
                names = () if total is None else (self.journal.scratch.name_of(total.logits),)
                self.journal.note(Position(start.plane, done + 1, names))
        self.transfer.flush()
        if total is not None:
            stream(total.logits, self.sink)
            if self.journal is not None:
                if self.journal.needs(self.journal.scratch.name_of(total.logits)):
                    self.journal.note(Position(start.plane + 1))  # before the file that the last point names is gone
                self.journal.scratch.free(total.logits)

    def _total(self, start: Position) -> Result | None:
        """Where logits are gathered if the sink wants what comes after a core, which is the next tile's business."""
        if self.sink.adds_up or not any(self.sink.overlap):
            return None
        if self.journal is None:
            return Result(self.extents)
        if start.results:
            return Result.reopened(self.extents, self.journal.scratch, start.results[0])
        return Result(self.extents, self.journal.scratch.zeros)

    def _reading(self, tile: Tile) -> Callable[[], dict[int, Tensor]]:
        return lambda: {0: read(self.plane, tile.read)}


def _within(tile: Tile, extents: tuple[int, ...]) -> tuple[Box, Box]:
    """Core and write of a tile, as far as they lie within the image."""
    write = tuple(slice(w.start, min(w.stop, n)) for w, n in zip(tile.write, extents, strict=True))
    core = tuple(slice(c.start, c.start + w.stop - w.start) for c, w in zip(tile.core, write, strict=True))
    return core, write
