"""The passes of a network over one image, stage by stage: one for every fold and mirroring, averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from nnunet_norm import stages
from nnunet_norm.prediction.execution import Folds, Image, Place, Result, Sink, read, stream
from nnunet_norm.prediction.journal import Position, RunJournal
from nnunet_norm.stages import Scratch
from nnunet_norm.stages.regions import Region, clip, slices
from nnunet_norm.stages.scratch import channels_last

if TYPE_CHECKING:
    from nnunet_norm.prediction.stages_plan import StagesPlan


class Passes:
    """What the network makes of a plane: an image, or a slice of a stack.

    One pass goes to the sink as it comes. Several are added up before, unless the sink does that itself. A sum can be
    continued after it was killed in the middle of a block, because no pass changes that of the passes before: it is read, and
    the sum with this pass is written to another file.
    """

    def __init__(
        self,
        plan: StagesPlan,
        folds: Folds,
        plane: Image,
        sink: Sink,
        scratch: Scratch,
        progress: Callable[[], object],
        journal: RunJournal | None,
    ) -> None:
        self.plan, self.folds, self.plane, self.sink = plan, folds, plane, sink
        self.scratch, self.progress = scratch, progress
        self.journal = journal if scratch.is_on_disk else None
        # Sums of logits are in files wherever there is a folder for them, also if memory holds the maps.
        self.sums = scratch if journal is None else journal.scratch
        self.passes = [(fold, flip) for fold in range(folds.count) for flip in plan.flips]
        overlap = tuple(sink.overlap) if len(self.passes) == 1 else ()
        self.schedule = replace(plan.schedule, overlap=overlap)

    def run(self, start: Position) -> None:
        """Compute the passes from a position on."""
        for _ in range(start.step * self.plan.schedule.steps):
            self.progress()
        if len(self.passes) == 1 or self.sink.adds_up:
            for number in range(start.step, len(self.passes)):
                self._pass(number, self.sink, start)
            return
        before, now = (self._reopened(start, place) for place in (0, 1))
        for number in range(start.step, len(self.passes)):
            before, now = self._added(number, before, now, start), None
        assert before is not None
        stream(before.logits, self.sink)
        self._free(before, Position(start.plane + 1))

    def _reopened(self, start: Position, place: int) -> Result | None:
        """A result that another process left."""
        if place >= len(start.results) or not start.results[place]:
            return None
        return Result.reopened(self.plan.image_shape, self.sums, start.results[place])

    def _added(self, number: int, before: Result | None, now: Result | None, start: Position) -> Result:
        """The sum of the passes before and of this one."""
        if self.journal is None:
            total = before or Result(self.plan.image_shape, self.sums.zeros)
            self._pass(number, total, start)
            return total
        if now is None:
            now = Result(self.plan.image_shape, self.sums.zeros)
            now.reserve(self.schedule.graph.nodes[-1].channels, self.plan.dtype)
        old = "" if before is None else self.sums.name_of(before.logits)
        new = self.sums.name_of(now.logits)
        self._pass(number, _Sum(before, now), start, (old, new))
        if before is not None:
            self._free(before, Position(start.plane, number + 1, (new,)))
        return now

    def _free(self, result: Result, position: Position) -> None:
        """Give up a result that is not needed from a position on; if the last point names it, the position is noted first."""
        journal = self.journal
        if journal is not None and (journal.is_due() or journal.needs(self.sums.name_of(result.logits))):
            journal.note(position)
        self.sums.free(result.logits)

    def _pass(self, number: int, target: Sink, start: Position, results: tuple[str, ...] = ()) -> None:
        """One fold, mirrored in one way."""
        fold, flip = self.passes[number]
        self.folds.use(fold)
        extents, weight = self.schedule.extents[0], 1 / len(self.passes)

        def image(region: Region) -> Tensor:
            return read_mirrored(self.plane, mirrored(region, extents, flip), flip).to(dtype=self.plan.dtype)

        def sink(block: Region, region: Region, logits: Tensor) -> None:
            core, place = (clip(mirrored(box, extents, flip), self.plan.image_shape) for box in (block, region))
            if any(start >= stop for start, stop in core):
                return  # beyond the image
            values = logits[0].flip([axis + 1 for axis in flip]) if flip else logits[0]
            first = [start for start, _ in mirrored(region, extents, flip)]
            target.add(slices(place), values[(slice(None), *slices(place, first))], weight, slices(core))

        halvings = stages.run(
            self.schedule,
            image,
            sink,
            scratch=self.scratch,
            device=self.plan.device,
            progress=self.progress,
            journal=None if self.journal is None else self.journal.inner(start.plane, number, results),
            overlap=not isinstance(self.plane, Tensor),
        )
        self.schedule = stages.smaller(self.schedule, halvings)


class _Sum:
    """Takes one pass, and writes the sum of it and of those before to a file of its own."""

    adds_up = True

    def __init__(self, before: Result | None, now: Result) -> None:
        self.before, self.now, self.overlap = before, now, now.overlap

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Sink.add``."""
        assert core is None or core == place
        part = logits.to(self.now.logits.device, self.now.logits.dtype) * weight
        self.now.put(place, part if self.before is None else self.before.logits[(slice(None), *place)] + part)


def mirrored(region: Region, extents: Sequence[int], flip: Sequence[int]) -> Region:
    """Where a region of a map lies in its mirror image along some axes."""
    return tuple(
        (n - stop, n - start) if axis in flip else (start, stop)
        for axis, ((start, stop), n) in enumerate(zip(region, extents, strict=True))
    )


def read_mirrored(plane: Image, region: Region, flip: Sequence[int]) -> Tensor:
    """A region of (C, *spatial), zeros beyond its far end, flipped: (1, C, *region), channels last."""
    return channels_last(read(plane, slices(region)).flip([axis + 2 for axis in flip]))
