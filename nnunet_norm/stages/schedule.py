"""What running a network on one image takes, known before it starts: pieces, blocks, scratch, memory and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from nnunet_norm.stages.graph import Graph
from nnunet_norm.stages.pieces import Piece, divide, regions, scratch_peak, work
from nnunet_norm.stages.regions import Region, block_shape, blocks, clip, extent_of, intervals

BLOCK_BYTES = 12 * 2**20
"""The widest map of a block on a CPU: below what its allocator hands back at once, and near to what its caches hold."""

COPIES = 3
"""The widest map of a block is there so many times more than counted: padded, reordered by the convolution, in transit."""


@dataclass(frozen=True)
class Schedule:
    """A network on an image of one shape.

    Attributes:
        graph: the network.
        pieces: in the order of computation.
        extents: of every node's whole map.
        block_shapes: per piece the extents of its blocks.
        itemsize: bytes of a number.
        shift: moves the grid of blocks, for measuring that it does not matter.
        overlap: per axis, voxels after a block of the output that are computed with it, for whoever interpolates.
    """

    graph: Graph
    pieces: tuple[Piece, ...]
    extents: tuple[tuple[int, ...], ...]
    block_shapes: tuple[tuple[int, ...], ...]
    itemsize: int
    shift: bool = False
    overlap: tuple[int, ...] = ()

    def blocks_of(self, number: int) -> list[Region]:
        """The blocks of a piece; they cover its map once."""
        shape, extents = self.block_shapes[number], self.extents[self.pieces[number].target]
        return list(blocks(extents, shape, [edge // 2 for edge in shape] if self.shift else None))

    def computed(self, number: int, block: Region) -> Region:
        """What is computed for a block of a piece: the block, and of the output the overlap after it."""
        if number < len(self.pieces) - 1 or not self.overlap:
            return block
        beyond = tuple((start, stop + more) for (start, stop), more in zip(block, self.overlap, strict=True))
        return clip(beyond, self.extents[self.pieces[number].target])

    @cached_property
    def steps(self) -> int:
        """Number of blocks over all pieces."""
        return sum(len(self.blocks_of(number)) for number in range(len(self.pieces)))

    @property
    def settling_pieces(self) -> int:
        """Number of pieces after which every norm has the statistics of the image."""
        return max((number + 1 for number, piece in enumerate(self.pieces) if piece.observed), default=0)

    @property
    def is_one_pass(self) -> bool:
        """Whether every map is one block: then the network may as well run on the image as it is.

        But not where a norm would get the statistics of one voxel: InstanceNorm of torch refuses it.
        """
        voxels = [math.prod(self.extents[self.graph.nodes[norm].inputs[0]]) for norm in self.graph.norms]
        return self.steps == len(self.pieces) and min(voxels, default=2) > 1

    @cached_property
    def scratch_bytes(self) -> int:
        """The most that is stored at any time, in bytes."""
        return scratch_peak(self.pieces, self.map_bytes)

    @cached_property
    def block_bytes(self) -> int:
        """The most that the maps of one block take, in bytes, copies included."""
        return max(self._bytes_of_block(number) for number in range(len(self.pieces)))

    @cached_property
    def passes(self) -> float:
        """Work over that of one pass over the whole image: 1 plus what halos and computing again add."""
        once: dict[int, int] = {}
        done = 0
        for number, piece in enumerate(self.pieces):
            voxels = self._voxels_computed(number)
            for node, per_voxel in work(self.graph, piece).items():
                once[node] = per_voxel * math.prod(self.extents[node])
                done += per_voxel * voxels[node]
        return done / max(sum(once.values()), 1)

    def map_bytes(self, node: int) -> int:
        """Bytes of a node's whole map."""
        return self.graph.nodes[node].channels * math.prod(self.extents[node]) * self.itemsize

    def _bytes_of_block(self, number: int) -> int:
        piece = self.pieces[number]
        middle = tuple(
            (max((n - edge) // 2, 0), max((n - edge) // 2, 0) + min(n, edge))
            for n, edge in zip(self.extents[piece.target], self.block_shapes[number], strict=True)
        )
        found = regions(self.graph, piece, self.computed(number, middle), self.extents)
        sizes = [self.graph.nodes[node].channels * math.prod(extent_of(region)) for node, region in found.items()]
        return (sum(sizes) + COPIES * max(sizes)) * self.itemsize

    def _voxels_computed(self, number: int) -> dict[int, int]:
        """Voxels of every node of a piece over all blocks: per axis the intervals add up, and axes multiply."""
        piece, ndim = self.pieces[number], self.graph.ndim
        target, shape = self.extents[piece.target], self.block_shapes[number]
        voxels = dict.fromkeys(piece.inner, 1)
        for axis in range(ndim):
            lengths = dict.fromkeys(piece.inner, 0)
            for interval in intervals(target[axis], shape[axis], shape[axis] // 2 if self.shift else 0):
                along = tuple(interval if a == axis else (0, 1) for a in range(ndim))
                found = regions(self.graph, piece, self.computed(number, along), self.extents)
                for node in piece.inner:
                    lengths[node] += found[node][axis][1] - found[node][axis][0]
            voxels = {node: voxels[node] * lengths[node] for node in piece.inner}
        return voxels


def make_schedule(
    graph: Graph,
    shape: Sequence[int],
    *,
    itemsize: int,
    store_first_level: bool = True,
    block_bytes: int = BLOCK_BYTES,
    shift: bool = False,
    in_place: bool = True,
) -> Schedule:
    """Cut a network into pieces and the maps of an image into blocks.

    Args:
        graph: the network.
        shape: extents of the image, multiples of the total stride.
        itemsize: bytes of a number that the network computes with.
        store_first_level: see ``divide``.
        block_bytes: the widest map of a block.
        shift: move the grid of blocks by half a block.
        in_place: see ``divide``.

    Raises:
        ArchitectureError: an image that the network cannot take.
    """
    pieces = divide(graph, store_first_level=store_first_level, in_place=in_place)
    extents = tuple(graph.extents(shape))
    shapes = []
    for piece in pieces:
        own = math.prod(graph.nodes[piece.target].stride)
        per_voxel = max(
            graph.nodes[node].channels * own / math.prod(graph.nodes[node].stride)
            for node in {*piece.inner, *piece.sources}
        )
        shapes.append(block_shape(extents[piece.target], block_bytes / itemsize / float(per_voxel)))
    return Schedule(graph, pieces, extents, tuple(shapes), itemsize, shift)
