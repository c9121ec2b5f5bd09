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

from nnunet_norm import stages
from nnunet_norm.prediction.execution import Forward, Result, flips, planes, read
from nnunet_norm.prediction.halo import by
from nnunet_norm.prediction.memory import size
from nnunet_norm.stages import Schedule, Scratch, ScratchOnDisk, scratch_folder
from nnunet_norm.stages.regions import Region, clip, slices, whole
from nnunet_norm.stages.scratch import channels_last


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
    reason: str

    @property
    def flips(self) -> list[tuple[int, ...]]:
        """The mirrored passes: the axes that are flipped in each."""
        return flips(self.mirror_axes)

    @property
    def steps(self) -> int:
        """One step per block, or per pass over all mirrored ones where the image is one block."""
        return self.slices * (1 if self.schedule.is_one_pass else self.schedule.steps * len(self.flips))

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
        self, forward: Forward, image: Tensor, result: Result, progress: Callable[[], object] = lambda: None
    ) -> None:
        """See ``ExecutionPlan.run``; ``forward`` is called if the image is one block and the device's memory holds it."""
        schedule = self.schedule
        with self._scratch() as scratch:
            for index, plane in planes(image, len(self.image_shape)):
                if self.schedule.is_one_pass and self._in_one_pass(forward, plane, index, result):
                    progress()
                    continue
                for flip in self.flips:
                    halvings = self._pass(schedule, plane, index, flip, result, scratch, progress)
                    schedule = stages.smaller(schedule, halvings)

    def _in_one_pass(self, forward: Forward, plane: Tensor, index: tuple[int, ...], result: Result) -> bool:
        """Give the image to the network as it is; False if the device's memory does not hold that."""
        inside = slices(whole(self.image_shape))
        try:
            logits = forward(read(plane, slices(whole(self.schedule.extents[0]))))[0][(slice(None), *inside)]
        except torch.OutOfMemoryError:
            return False
        result.add((*index, *inside), logits)
        return True

    def result_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed memory for the result, where it was announced; a file goes when the result does."""
        if self.place != "disk":
            return torch.zeros(tuple(shape), dtype=dtype)
        with ExitStack() as stack:
            data = stack.enter_context(self._scratch()).zeros(shape, dtype)
            weakref.finalize(data, stack.pop_all().close)
        return data

    def _pass(
        self,
        schedule: Schedule,
        plane: Tensor,
        index: tuple[int, ...],
        flip: Sequence[int],
        result: Result,
        scratch: Scratch,
        progress: Callable[[], object],
    ) -> int:
        """One mirrored pass over an image or a slice; how often blocks were halved."""
        padded = schedule.extents[0]

        def image(region: Region) -> Tensor:
            return read_mirrored(plane, mirrored(region, padded, flip), flip).to(dtype=self.dtype)

        def sink(region: Region, logits: Tensor) -> None:
            place = mirrored(region, padded, flip)
            inside = clip(place, self.image_shape)
            if all(start < stop for start, stop in inside):
                values = logits[0].flip([axis + 1 for axis in flip]) if flip else logits[0]
                part = values[(slice(None), *slices(inside, [start for start, _ in place]))]
                result.add((*index, *slices(inside)), part, 1 / len(self.flips))

        return stages.run(schedule, image, sink, scratch=scratch, device=self.device, progress=progress)

    @contextmanager
    def _scratch(self) -> Iterator[Scratch]:
        if self.place == "disk":
            assert self.scratch_folder is not None
            with scratch_folder(self.scratch_folder) as folder:
                yield ScratchOnDisk(folder)
        else:
            yield Scratch(self.device if self.place == "device" else torch.device("cpu"))


def mirrored(region: Region, extents: Sequence[int], flip: Sequence[int]) -> Region:
    """Where a region of a map lies in its mirror image along some axes."""
    return tuple(
        (n - stop, n - start) if axis in flip else (start, stop)
        for axis, ((start, stop), n) in enumerate(zip(region, extents, strict=True))
    )


def read_mirrored(plane: Tensor, region: Region, flip: Sequence[int]) -> Tensor:
    """A region of (C, *spatial), zeros beyond its far end, flipped: (1, C, *region), channels last."""
    return channels_last(read(plane, slices(region)).flip([axis + 2 for axis in flip]))


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
