"""The execution plan that runs the network stage by stage over the whole image."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_norm.prediction.execution import Folds, Image, PartOf, Sink, flips, planes, read
from nnunet_norm.prediction.halo import by
from nnunet_norm.prediction.journal import Position, RunJournal
from nnunet_norm.prediction.memory import size
from nnunet_norm.prediction.passes import Passes
from nnunet_norm.stages import Schedule, Scratch, ScratchOnDisk, scratch_folder
from nnunet_norm.stages.regions import slices, whole


@dataclass(frozen=True, kw_only=True)
class StagesPlan:
    """Every stage over the whole image, in blocks with the halo of that stage alone: the result of one pass, exactly.

    Attributes:
        schedule: the network on an image, or on a slice of a stack.
        image_shape: the image without padding; that of a slice for a stack.
        slices: how many slices there are.
        mirror_axes: spatial axes that are mirrored: one run for each of their combinations.
        population: "stored", "image" or "batch", see ``HaloPredictor``.
        device: where the network computes.
        dtype: in which precision, apart from autocast.
        place: where scratch lies: "memory", "device", or "disk".
        scratch_folder: where on the disk.
        result_bytes: of the result, which lies in memory, or on the disk if scratch does.
        memory_bytes: anonymous memory at the peak, as predicted, on top of what the process has before.
        first_level: "stored", or "computed again".
        block_bytes: the widest map of a block.
        reason: why this plan was taken.
    """

    schedule: Schedule
    image_shape: tuple[int, ...]
    slices: int
    mirror_axes: tuple[int, ...]
    population: str
    device: torch.device
    dtype: torch.dtype
    place: str
    scratch_folder: Path | None
    result_bytes: int
    memory_bytes: int
    first_level: str
    block_bytes: int
    reason: str

    @property
    def flips(self) -> list[tuple[int, ...]]:
        """The mirrored passes: the axes that are flipped in each."""
        return flips(self.mirror_axes)

    def steps(self, folds: int) -> int:
        """One step per block, or per pass over all mirrored ones where the image is one block."""
        return self.slices * self._steps_of_plane(folds)

    def _steps_of_plane(self, folds: int) -> int:
        return 1 if self.schedule.is_one_pass else self.schedule.steps * len(self.flips) * folds

    def describe(self) -> str:
        """The plan for the user, in one line."""
        schedule, where = self.schedule, "in memory" if self.place == "memory" else f"on the {self.place}"
        how = (
            "in one pass"
            if schedule.is_one_pass
            else (f"stage by stage, {len(schedule.pieces)} pieces in {schedule.steps} blocks")
        )
        passes = f"{schedule.passes:.2f} passes over the image" + (
            f" x {len(self.flips)} mirrored" if len(self.flips) > 1 else ""
        )
        stored = "" if schedule.is_one_pass else f"scratch at most {size(schedule.scratch_bytes)} {where} and "
        level = "" if schedule.is_one_pass else f", first level {self.first_level}"
        return (
            f"image of {by(self.image_shape)} voxels{f' x {self.slices} slices' if self.slices > 1 else ''}: {how}; "
            f"statistics: {self.population}; {stored}{size(self.result_bytes)} for the result, in all about "
            f"{size(self.memory_bytes)} of memory{level}; cost {passes}; exact: {self.reason}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan for a JSON file."""
        return {
            "plan": "stages",
            "population": self.population,
            "exact": True,
            "reason": self.reason,
            "image_shape": self.image_shape,
            "slices": self.slices,
            "stride": self.schedule.graph.stride,
            "pieces": len(self.schedule.pieces),
            "blocks": self.schedule.steps,
            "one_pass": self.schedule.is_one_pass,
            "passes": self.schedule.passes,
            "mirrored_passes": len(self.flips),
            "first_level": self.first_level,
            "scratch": self.place,
            "scratch_bytes": self.schedule.scratch_bytes,
            "result_bytes": self.result_bytes,
            "memory_bytes": self.memory_bytes,
        }

    def run(
        self,
        folds: Folds,
        image: Image,
        sink: Sink,
        progress: Callable[[], object] = lambda: None,
        journal: RunJournal | None = None,
    ) -> None:
        """See ``ExecutionPlan.run``; an image of one block goes to the network as it is if memory holds that."""
        start = journal.position if journal is not None else Position()
        with self._scratch(journal) as scratch:
            for _ in range(start.plane * self._steps_of_plane(folds.count)):
                progress()
            for number, (index, plane) in enumerate(planes(image, len(self.image_shape), start.plane), start.plane):
                of_plane = PartOf(sink, index)
                if self.schedule.is_one_pass and self._in_one_pass(folds, plane, of_plane):
                    progress()
                else:
                    here = start if number == start.plane else Position(number)
                    Passes(self, folds, plane, of_plane, scratch, progress, journal).run(here)
                if journal is not None and journal.is_due():
                    journal.note(Position(number + 1))

    def _in_one_pass(self, folds: Folds, plane: Image, sink: Sink) -> bool:
        """Give the image to the network as it is; False if the device's memory does not hold that."""
        inside = slices(whole(self.image_shape))
        try:
            logits = folds.mean(read(plane, slices(whole(self.schedule.extents[0]))))[0][(slice(None), *inside)]
        except torch.OutOfMemoryError:
            return False
        sink.add(inside, logits)
        return True

    def result_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed memory for the result, where it was announced; a file goes when the result does."""
        if self.place != "disk":
            return torch.zeros(tuple(shape), dtype=dtype)
        with ExitStack() as stack:
            data = stack.enter_context(self._scratch(None)).zeros(shape, dtype)
            weakref.finalize(data, stack.pop_all().close)
        return data

    @contextmanager
    def _scratch(self, journal: RunJournal | None) -> Iterator[Scratch]:
        if self.place == "disk" and journal is not None:
            yield journal.scratch
        elif self.place == "disk":
            assert self.scratch_folder is not None
            with scratch_folder(self.scratch_folder) as folder:
                yield ScratchOnDisk(folder)
        else:
            yield Scratch(self.device if self.place == "device" else torch.device("cpu"))


def with_blocks_elsewhere(plan: StagesPlan) -> tuple[StagesPlan, StagesPlan]:
    """The plan with small blocks, and with the grid of these blocks moved by half a block; nothing is mirrored.

    Every axis that is long enough has two blocks or more, so that there are borders of blocks to look at.
    """
    schedule = plan.schedule
    shapes = tuple(
        tuple(min(edge, max(-(-n // 2), 1)) for edge, n in zip(shape, schedule.extents[piece.target], strict=True))
        for piece, shape in zip(schedule.pieces, schedule.block_shapes, strict=True)
    )
    small = replace(schedule, block_shapes=shapes)
    first = replace(plan, schedule=small, mirror_axes=())
    return first, replace(first, schedule=replace(small, shift=True))
