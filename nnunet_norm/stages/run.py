"""Run a network piece by piece, each block by block: the whole image's result, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nnunet_norm.errors import TilingError
from nnunet_norm.stages.graph import Graph
from nnunet_norm.stages.journal import Journal, Progress, moments_as_numbers, moments_of_numbers
from nnunet_norm.stages.moments import ChannelMoments
from nnunet_norm.stages.operators import Place
from nnunet_norm.stages.pieces import IMAGE, Piece, regions
from nnunet_norm.stages.regions import Region, clip, crop, extent_of
from nnunet_norm.stages.schedule import Schedule
from nnunet_norm.stages.scratch import Scratch, StoredMap
from nnunet_norm.stages.transfer import Transfer

Image = Callable[[Region], Tensor]
"""A region of the image as (1, C, *region), on the CPU or the device."""

Sink = Callable[[Region, Region, Tensor], None]
"""Takes the network's output: a block, the region that was computed for it (larger by the schedule's overlap), and the values
(1, K, *region). Every voxel is in one block."""


def run(
    schedule: Schedule,
    image: Image,
    sink: Sink,
    *,
    scratch: Scratch,
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
    journal: Journal | None = None,
    overlap: bool = False,
) -> int:
    """Give the network's output for a whole image to ``sink``, block by block.

    The modules must be in eval mode and on the device; nothing is differentiated.

    Args:
        schedule: the network on an image of this shape.
        image: the image, zero-padded to a multiple of the total stride.
        sink: takes the output.
        scratch: where maps are stored.
        device: where the network computes.
        progress: called after every block, also for those that a resumed run need not compute again.
        journal: takes points from which the run can be resumed, and gives the one from which this one is. Its schedule must
            not be ``in_place``, and scratch on a disk.
        overlap: read and write beside computing, as is done anyway where scratch is on a disk: for images and sinks that
            are slow themselves.

    Returns:
        How often blocks had to be halved because the device's memory did not hold them; see ``smaller``.

    Raises:
        TilingError: the device's memory does not hold the smallest block.
        OutputError: there is no room for scratch.
    """
    with Transfer(device, overlap=overlap or scratch.is_on_disk or device.type == "cuda") as transfer:
        one = _Run(schedule, image, sink, scratch, transfer, progress, journal)
        _in_step([one], first=one.resume())
        return one.halvings


def run_population(
    images: Sequence[tuple[Schedule, Image]],
    *,
    scratch: Scratch,
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Settle every norm of a graph that takes the statistics of the image, with those of many images together.

    All images go through the network in step, piece by piece, and what one piece leaves of each is in scratch at a time:
    ``schedule.scratch_bytes`` of all of them. Afterwards ``graph.norms`` have their ``statistics``; what comes after the last
    norm is not computed.

    Args:
        images: each with its schedule; all schedules are of one graph and have the same pieces.
        scratch: see ``run``.
        device: see ``run``.
        progress: called after every block.

    Raises:
        TilingError, OutputError: see ``run``.
    """
    with Transfer(device, overlap=scratch.is_on_disk or device.type == "cuda") as transfer:
        runs = [_Run(schedule, image, lambda *_: None, scratch, transfer, progress) for schedule, image in images]
        _in_step(runs, until_settled=True)


def _in_step(runs: Sequence[_Run], *, first: int = 0, until_settled: bool = False) -> None:
    """Every piece for all images before the next piece."""
    schedule = runs[0].schedule
    pieces = schedule.settling_pieces if until_settled else len(schedule.pieces)
    try:
        for number in range(first, pieces):
            moments = ChannelMoments()
            for one in runs:
                one.piece(number, moments)
            if schedule.pieces[number].observed:
                _settle(schedule.graph, schedule.pieces[number].target, moments)
            for one in runs:
                one.free_after(number)
    finally:
        for one in runs:
            one.free_all()


def _settle(graph: Graph, node: int, moments: ChannelMoments) -> None:
    for norm, operator in graph.norms.items():
        if node in graph.nodes[norm].inputs:
            operator.settle(*moments.mean_and_var())


def smaller(schedule: Schedule, halvings: int) -> Schedule:
    """The schedule with its blocks halved that often, each time along their longest axis."""
    shapes = list(schedule.block_shapes)
    for _ in range(halvings):
        for number, shape in enumerate(shapes):
            axis = max(range(len(shape)), key=lambda a: shape[a])
            shapes[number] = (*shape[:axis], max(-(-shape[axis] // 2), 1), *shape[axis + 1 :])
    return replace(schedule, block_shapes=tuple(shapes))


@dataclass
class _Run:
    schedule: Schedule
    image: Image
    sink: Sink
    scratch: Scratch
    transfer: Transfer
    progress: Callable[[], object]
    journal: Journal | None = None
    stores: dict[int, StoredMap] = field(default_factory=dict)
    halvings: int = 0
    _left: Progress | None = None

    def resume(self) -> int:
        """Go to the point from which the journal resumes; the number of its piece."""
        left = self.journal.resumed if self.journal is not None else None
        if left is None:
            return 0
        graph, extents = self.schedule.graph, self.schedule.extents
        for node, name in left.maps.items():
            self.stores[node] = StoredMap(self.scratch.reopen(name, (*extents[node], graph.nodes[node].channels)))
        for norm, statistics in left.statistics.items():
            mean, var = (torch.tensor(values, dtype=torch.float64) for values in statistics)
            graph.norms[norm].statistics = mean, var
        self.halvings, self._left = left.halvings, left
        for _ in range(sum(len(self.schedule.blocks_of(number)) for number in range(left.piece))):
            self.progress()
        return left.piece

    def _note(self, piece: int, todo: Sequence[Region] | None, moments: ChannelMoments | None) -> None:
        """Give the journal the point that is reached now, with everything before it written."""
        assert self.journal is not None
        self.transfer.flush()
        settled = {norm: operator.statistics for norm, operator in self.schedule.graph.norms.items()}
        self.journal.note(
            Progress(
                piece,
                None if todo is None else tuple(todo),
                None if moments is None else moments_as_numbers(moments.moments),
                {node: self.scratch.name_of(store.data) for node, store in self.stores.items()},
                {norm: (found[0].tolist(), found[1].tolist()) for norm, found in settled.items() if found is not None},
                self.halvings,
            )
        )

    def free_all(self) -> None:
        """Free what a run that was stopped leaves, unless it is to be resumed."""
        if self.journal is not None:
            return
        for data in {id(store.data): store.data for store in self.stores.values()}.values():
            self.scratch.free(data)

    def free_after(self, number: int) -> None:
        piece = self.schedule.pieces[number]
        dead = [self.stores.pop(source) for source in piece.frees]
        if self.journal is not None and (
            self.journal.is_due() or any(self.journal.needs(self.scratch.name_of(store.data)) for store in dead)
        ):
            self._note(number + 1, None, None)  # before what it does not need any more is gone
        for store in dead:
            if piece.target not in self.stores or store.data is not self.stores[piece.target].data:
                self.scratch.free(store.data)

    def _begin(self, number: int, moments: ChannelMoments) -> deque[Region]:
        """The blocks of a piece that are to be computed."""
        blocks = smaller(self.schedule, self.halvings).blocks_of(number)
        left, self._left = self._left, None
        if left is None or left.todo is None:
            return deque(blocks)
        moments.moments = moments_of_numbers(left.moments)
        for _ in range(len(blocks) - len(left.todo)):
            self.progress()
        return deque(left.todo)

    def piece(self, number: int, moments: ChannelMoments) -> None:
        piece = self.schedule.pieces[number]
        todo = self._begin(number, moments)
        while todo:
            block = todo.popleft()
            region = self.schedule.computed(number, block)
            following = self.schedule.computed(number, todo[0]) if todo else None
            try:
                result = self._block(piece, region, following)
                if piece.observed:
                    moments.add(result)
            except torch.OutOfMemoryError as error:
                todo = deque(_halves([block, *todo], error))
                self.halvings += 1
                self.transfer.forget()
                continue  # once more; torch frees what it keeps before it gives up, so nothing else needs to be freed
            self._keep(piece, block, region, result)
            self.progress()
            if self.journal is not None and todo and self.journal.is_due():
                self._note(number, todo, moments)
        self.transfer.flush()

    def _block(self, piece: Piece, region: Region, following: Region | None) -> Tensor:
        """The piece's map for one block; what the following block reads is fetched meanwhile."""
        graph, extents = self.schedule.graph, self.schedule.extents
        found = regions(graph, piece, region, extents)
        values = self.transfer.read(region, self._reading(piece, found))
        if following is not None and self.transfer.overlaps:
            ahead = regions(graph, piece, following, extents)
            self.transfer.fetch(following, self._reading(piece, ahead))
        last = {source: number for number in piece.inner for source in graph.nodes[number].inputs}
        for number in piece.inner:
            node = graph.nodes[number]
            assert node.operator is not None
            needed = tuple(node.operator.needs(axis, interval) for axis, interval in enumerate(found[number]))
            given = [clip(needed, extents[source]) for source in node.inputs]
            inputs = [crop(values[i], found[i], part) for i, part in zip(node.inputs, given, strict=True)]
            values[number] = node.operator.apply(inputs, Place(given, found[number], [extents[i] for i in node.inputs]))
            del inputs
            for source in {i for i in node.inputs if last[i] == number}:
                del values[source]
        return values[piece.target]

    def _reading(self, piece: Piece, found: dict[int, Region]) -> Callable[[], dict[int, Tensor]]:
        return lambda: {
            source: self.image(found[source]) if source == IMAGE else self.stores[source].read(found[source])
            for source in piece.sources
        }

    def _keep(self, piece: Piece, block: Region, region: Region, result: Tensor) -> None:
        if piece.stored:
            if piece.target not in self.stores:
                self.stores[piece.target] = self._store(piece, result)
            on_device = self.stores[piece.target].data.device.type != "cpu"
            self.transfer.write(self.stores[piece.target].write, region, result, on_device=on_device)
        elif piece.target == len(self.schedule.graph.nodes) - 1:
            self.transfer.write(self._hand_on, (block, region), result)

    def _hand_on(self, where: tuple[Region, Region], values: Tensor) -> None:
        self.sink(*where, values)

    def _store(self, piece: Piece, result: Tensor) -> StoredMap:
        """Memory for a piece's map: that of one that dies with this piece, or new."""
        if piece.replaces is not None and self.stores[piece.replaces].data.dtype == result.dtype:
            return StoredMap(self.stores[piece.replaces].data)
        extents = self.schedule.extents[piece.target]
        return StoredMap(self.scratch.allocate((*extents, result.shape[1]), result.dtype))


def _halves(blocks: list[Region], error: torch.OutOfMemoryError) -> list[Region]:
    """Every block in two, along its longest axis; the first is the one that was too large."""
    if max(extent_of(blocks[0])) < 2:
        raise TilingError("the device's memory is too small for one voxel of a stage: choose -device cpu") from error
    found: list[Region] = []
    for region in blocks:
        edges = extent_of(region)
        axis = max(range(len(edges)), key=lambda a: edges[a])
        if edges[axis] < 2:
            found.append(region)
            continue
        start, stop = region[axis]
        middle = (start + stop) // 2
        found += [(*region[:axis], half, *region[axis + 1 :]) for half in ((start, middle), (middle, stop))]
    return found
