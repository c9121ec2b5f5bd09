"""Where a network is cut: which maps are stored for the whole image, and what is computed block by block between them.

A piece computes one map from maps that are stored. Maps are stored where the resolution changes, after an addition (a
residual block ends there), and wherever the reach since the last stored maps would exceed a few voxels. For norms that
use the statistics of the whole image, a piece ends before every such norm: its input is stored raw while its moments are
gathered, and norm and nonlinearity are applied by whichever piece reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from nnunet_norm.stages.graph import Graph
from nnunet_norm.stages.operators import ImageNorm, Pointwise
from nnunet_norm.stages.regions import Region, clip, hull

LONGEST_REACH = 3
"""Voxels that the halo of a piece may have on one side: the stem and one residual block, or three convolutions."""

IMAGE = 0
"""The number of the image's node."""


@dataclass(frozen=True)
class Piece:
    """One map of the whole image, computed block by block.

    Attributes:
        target: the node whose map is made.
        sources: the stored nodes (and the image) that are read.
        inner: the nodes that are computed for every block, in order; the target is the last.
        stored: whether the map is kept; else it is observed only, or it is the output.
        observed: whether its moments are gathered, for a norm.
        frees: the stored nodes that nobody reads afterwards.
        replaces: the stored node whose memory the target takes over, voxel by voxel; None: it gets its own.
    """

    target: int
    sources: tuple[int, ...]
    inner: tuple[int, ...]
    stored: bool
    observed: bool
    frees: tuple[int, ...]
    replaces: int | None


def divide(graph: Graph, *, store_first_level: bool = True, in_place: bool = True) -> tuple[Piece, ...]:
    """Cut a network into pieces, in the order of computation.

    Args:
        graph: the network.
        store_first_level: keep the encoder's maps at the image's own resolution, which take most of the scratch; else they
            are computed again where they are needed.
        in_place: a map may take over the memory of one that dies with it. A run that is to be resumed may not: the block at
            which it was stopped would find its input overwritten.
    """
    stored = _stored(graph)
    if not store_first_level:
        stored -= _first_level(graph)
    observed = {graph.nodes[norm].inputs[0] for norm in graph.norms}
    output = len(graph.nodes) - 1
    targets = sorted(stored | observed | {output})
    reads = {target: _between(graph, target, stored) for target in targets}
    last = {source: target for target in targets for source in reads[target][0]}
    pieces = []
    for target in targets:
        sources, inner = reads[target]
        dying = tuple(source for source in sources if source != IMAGE and last[source] == target)
        pieces.append(
            Piece(
                target,
                sources,
                inner,
                stored=target in stored,
                observed=target in observed,
                frees=dying,
                replaces=_replaced(graph, target, inner, dying) if target in stored and in_place else None,
            )
        )
    return tuple(pieces)


def regions(graph: Graph, piece: Piece, wanted: Region, extents: Sequence[tuple[int, ...]]) -> dict[int, Region]:
    """The region of every node of a piece, sources included, that a block of its target depends on."""
    found = {piece.target: wanted}
    for number in reversed(piece.inner):
        node = graph.nodes[number]
        assert node.operator is not None
        needed = tuple(node.operator.needs(axis, interval) for axis, interval in enumerate(found[number]))
        for source in dict.fromkeys(node.inputs):
            inside = clip(needed, extents[source])
            found[source] = hull(found[source], inside) if source in found else inside
    return found


def reach(graph: Graph, *, aligned: bool) -> tuple[tuple[int, int], ...]:
    """Reach (before, after) of the whole network per axis in image voxels, composed of what its operators declare.

    Args:
        graph: the network.
        aligned: of output blocks on the grid of the total stride, else of any voxel; see ``ReceptiveField``.
    """
    sides = []
    for axis, stride in enumerate(graph.stride):
        starts = [(0, stride)] if aligned else [(i, i + 1) for i in range(stride)]
        found = [(block, _depends(graph, axis, block)) for block in starts]
        sides.append((max(0, *(b[0] - n[0] for b, n in found)), max(0, *(n[1] - b[1] for b, n in found))))
    return tuple(sides)


def work(graph: Graph, piece: Piece) -> dict[int, int]:
    """Multiplications per output voxel of every node that a piece computes."""
    nodes = graph.nodes
    found = {}
    for number in piece.inner:
        made = nodes[number].operator
        assert made is not None
        found[number] = made.work([nodes[i].channels for i in nodes[number].inputs])
    return found


def _depends(graph: Graph, axis: int, block: tuple[int, int]) -> tuple[int, int]:
    """Image voxels that output voxels depend on, along one axis of an image without ends."""
    found = {len(graph.nodes) - 1: block}
    for number in range(len(graph.nodes) - 1, IMAGE, -1):
        operator = graph.nodes[number].operator
        if number not in found or operator is None:
            continue
        start, stop = operator.needs(axis, found[number])
        for source in graph.nodes[number].inputs:
            known = found.get(source, (start, stop))
            found[source] = min(start, known[0]), max(stop, known[1])
    return found[IMAGE]


def _stored(graph: Graph) -> set[int]:
    """The nodes whose maps are kept; see the module's description."""
    nodes, output = graph.nodes, len(graph.nodes) - 1
    consumers = _consumers(graph)
    raw = {nodes[norm].inputs[0] for norm in graph.norms} - {IMAGE}
    stored: set[int] = {IMAGE}
    pending: list[Fraction] = []
    for number, node in enumerate(nodes):
        if node.operator is None:
            pending.append(Fraction(0))
            continue
        own = _own_reach(graph, number)
        if any(pending[i] + own > LONGEST_REACH for i in node.inputs) and own:
            for i in node.inputs:
                if not _is_cheap(graph, i, stored):
                    stored.add(i)
                    pending[i] = Fraction(0)
        pending.append(max(pending[i] for i in node.inputs) + own)
        ends_block = _ends_addition(graph, number, consumers) or _feeds_other_resolution(graph, number, consumers)
        if number in raw or (ends_block and number != output and not _is_cheap(graph, number, stored)):
            stored.add(number)
            pending[number] = Fraction(0)
    return stored - {IMAGE, output}


def _own_reach(graph: Graph, number: int) -> Fraction:
    """The larger side of an operator's reach over all axes, in voxels of its input."""
    operator = graph.nodes[number].operator
    assert operator is not None
    most = 0
    for axis in range(graph.ndim):
        ratio = operator.ratio(axis)
        block = (0, ratio.denominator)
        start, stop = operator.needs(axis, block)
        most = max(most, -start, stop - ratio.numerator)
    return Fraction(most)


def _is_cheap(graph: Graph, number: int, stored: set[int]) -> bool:
    """Whether a node is one stored map with voxel-wise operators on it: applied on reading, not worth another map."""
    while number not in stored:
        node = graph.nodes[number]
        if len(node.inputs) != 1 or not _is_voxelwise(graph, number):
            return False
        number = node.inputs[0]
    return True


def _ends_addition(graph: Graph, number: int, consumers: dict[int, list[int]]) -> bool:
    """Whether a node is what an addition (a residual block) ends with: the last of the voxel-wise operators on it."""
    if any(_is_voxelwise(graph, i) and len(graph.nodes[i].inputs) == 1 for i in consumers[number]):
        return False
    while len(graph.nodes[number].inputs) == 1 and _is_voxelwise(graph, number):
        number = graph.nodes[number].inputs[0]
    return len(graph.nodes[number].inputs) > 1 and _is_voxelwise(graph, number)


def _feeds_other_resolution(graph: Graph, number: int, consumers: dict[int, list[int]]) -> bool:
    return any(graph.nodes[i].stride != graph.nodes[number].stride for i in consumers[number])


def _is_voxelwise(graph: Graph, number: int) -> bool:
    return isinstance(graph.nodes[number].operator, Pointwise | ImageNorm)


def _first_level(graph: Graph) -> set[int]:
    """The nodes at the image's resolution that come before any other resolution."""
    unit = (Fraction(1),) * graph.ndim
    first: set[int] = set()
    for number, node in enumerate(graph.nodes):
        if node.stride == unit and all(i in first for i in node.inputs):
            first.add(number)
    return first


def _between(graph: Graph, target: int, stored: set[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(what is read, what is computed) for a target."""
    if target == IMAGE:
        return (IMAGE,), ()
    sources, inner, stack = set(), {target}, [target]
    while stack:
        for source in graph.nodes[stack.pop()].inputs:
            if source in stored or source == IMAGE:
                sources.add(source)
            elif source not in inner:
                inner.add(source)
                stack.append(source)
    return tuple(sorted(sources)), tuple(sorted(inner))


def _replaced(graph: Graph, target: int, inner: Sequence[int], dying: Sequence[int]) -> int | None:
    """A map that dies here and whose memory suits: allowed where every voxel depends on that voxel only."""
    if not all(_is_voxelwise(graph, number) for number in inner):
        return None
    channels = graph.nodes[target].channels
    return next((source for source in dying if graph.nodes[source].channels == channels), None)


def _consumers(graph: Graph) -> dict[int, list[int]]:
    return {number: graph.consumers(number) for number in range(len(graph.nodes))}


def scratch_peak(pieces: Sequence[Piece], size: Callable[[int], int]) -> int:
    """The most that is stored at any time.

    Args:
        pieces: in the order of computation.
        size: of the whole map of a node.
    """
    kept: dict[int, int] = {}
    most = 0
    for piece in pieces:
        if piece.stored:
            kept[piece.target] = size(piece.target)
            if piece.replaces is not None:
                kept[piece.target] = kept.pop(piece.replaces)
        most = max(most, sum(kept.values()))
        for source in piece.frees:
            kept.pop(source, None)
    return most
