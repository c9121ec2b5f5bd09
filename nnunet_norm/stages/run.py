"""Run a network piece by piece, each block by block: the whole image's result, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nnunet_norm.errors import TilingError
from nnunet_norm.stages.graph import Graph
from nnunet_norm.stages.moments import ChannelMoments
from nnunet_norm.stages.operators import Place
from nnunet_norm.stages.pieces import IMAGE, Piece, regions
from nnunet_norm.stages.regions import Region, clip, crop, extent_of
from nnunet_norm.stages.schedule import Schedule
from nnunet_norm.stages.scratch import Scratch, StoredMap
from nnunet_norm.stages.transfer import Transfer

Image = Callable[[Region], Tensor]
"""A region of the image as (1, C, *region), on the CPU or the device."""

Sink = Callable[[Region, Tensor], None]
"""Takes the network's output for a region, (1, K, *region); every voxel comes once."""


def run(
    schedule: Schedule,
    image: Image,
    sink: Sink,
    *,
    scratch: Scratch,
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
) -> int:
    """Give the network's output for a whole image to ``sink``, block by block.

    The modules must be in eval mode and on the device; nothing is differentiated.

    Args:
        schedule: the network on an image of this shape.
        image: the image, zero-padded to a multiple of the total stride.
        sink: takes the output.
        scratch: where maps are stored.
        device: where the network computes.
        progress: called after every block.

    Returns:
        How often blocks had to be halved because the device's memory did not hold them; see ``smaller``.

    Raises:
        TilingError: the device's memory does not hold the smallest block.
        OutputError: there is no room for scratch.
    """
    with Transfer(device, overlap=scratch.is_on_disk or device.type == "cuda") as transfer:
        one = _Run(schedule, image, sink, scratch, transfer, progress)
        _in_step([one])
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


def _in_step(runs: Sequence[_Run], *, until_settled: bool = False) -> None:
    """Every piece for all images before the next piece."""
    schedule = runs[0].schedule
    pieces = schedule.settling_pieces if until_settled else len(schedule.pieces)
    try:
        for number in range(pieces):
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
    stores: dict[int, StoredMap] = field(default_factory=dict)
    halvings: int = 0

    def free_all(self) -> None:
        for data in {id(store.data): store.data for store in self.stores.values()}.values():
            self.scratch.free(data)

    def free_after(self, number: int) -> None:
        piece = self.schedule.pieces[number]
        for source in piece.frees:
            store = self.stores.pop(source)
            if piece.target not in self.stores or store.data is not self.stores[piece.target].data:
                self.scratch.free(store.data)

    def piece(self, number: int, moments: ChannelMoments) -> None:
        piece = self.schedule.pieces[number]
        todo = deque(smaller(self.schedule, self.halvings).blocks_of(number))
        while todo:
            region = todo.popleft()
            following = todo[0] if todo else None
            try:
                result = self._block(piece, region, following)
                if piece.observed:
                    moments.add(result)
            except torch.OutOfMemoryError as error:
                todo = deque(_halves([region, *todo], error))
                self.halvings += 1
                self.transfer.forget()
                continue  # once more; torch frees what it keeps before it gives up, so nothing else needs to be freed
            self._keep(piece, region, result)
            self.progress()
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

    def _keep(self, piece: Piece, region: Region, result: Tensor) -> None:
        if piece.stored:
            if piece.target not in self.stores:
                self.stores[piece.target] = self._store(piece, result)
            on_device = self.stores[piece.target].data.device.type != "cpu"
            self.transfer.write(self.stores[piece.target].write, region, result, on_device=on_device)
        elif piece.target == len(self.schedule.graph.nodes) - 1:
            self.transfer.write(self.sink, region, result)

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
