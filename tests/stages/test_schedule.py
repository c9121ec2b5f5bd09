import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_networks import Design
from whole_pass import by_stages, cut, difference, one_pass, padded_image

from nnunet_norm.stages import Scratch, make_schedule, read_network
from nnunet_norm.stages.operators import Concatenation, ImageNorm, Operator, Pointwise
from nnunet_norm.stages.pieces import divide, regions
from nnunet_norm.stages.regions import extent_of
from nnunet_norm.stages.windows import Convolution, Pooling, TransposedConvolution, Upsampling

D2 = ((1, 1), (2, 2), (2, 2))
D3 = ((1, 1, 1), (1, 2, 2), (2, 2, 2))

DESIGNS = {
    "plain": Design(D2, blocks=2, decoder=2),
    "InstanceNorm": Design((*D2, (2, 2)), norm="InstanceNorm", blocks=2),
    "residual": Design(D2, kind="residual", norm="GroupNorm", blocks=2),
    "residual, fixed": Design((*D2, (2, 2)), kind="residual encoder", blocks=3),
    "bottleneck": Design(D2[:2], kind="bottleneck", norm="InstanceNorm", width=6),  # whose peak is an addition
    "3d": Design(D3, ((1, 3, 3), (3, 3, 3), (3, 3, 3)), norm="InstanceNorm"),
    "linear": Design(D2, up="linear", down="max"),
}
WAYS = {
    "whole": {},
    "blocks": {"block_bytes": 1},
    "shifted": {"block_bytes": 1, "shift": True},
    "first level again": {"block_bytes": 1, "store_first_level": False},
}
KINDS = (Pointwise, Concatenation, ImageNorm, Convolution, Pooling, TransposedConvolution, Upsampling)


class Watched(Scratch):
    """Scratch that adds up what is stored, and fills what was not written or is not there any more with NaN."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.most = 0

    def allocate(self, shape, dtype):
        data = super().allocate(shape, dtype).fill_(torch.nan)
        self.kept[data.data_ptr()] = data.nbytes
        self.most = max(self.most, sum(self.kept.values()))
        return data

    def free(self, data):
        del self.kept[data.data_ptr()]
        data.fill_(torch.nan)


class Spy:
    """Counts work and bytes of every call of an operator."""

    def __init__(self, monkeypatch):
        self.done, self.once, self.widest = 0, {}, 0
        for kind in KINDS:
            monkeypatch.setattr(kind, "apply", self._watched(kind.apply))

    def _watched(self, original):
        def apply(operator: Operator, inputs, place):
            per_voxel = operator.work([x.shape[1] for x in inputs])
            bytes_in = sum(x.nbytes for x in inputs)
            result = original(operator, inputs, place)
            assert tuple(result.shape[2:]) == extent_of(place.wanted)
            whole = [operator.length(axis, n) for axis, n in enumerate(place.extents[0])]
            self.done += per_voxel * math.prod(extent_of(place.wanted))
            self.once[id(operator)] = per_voxel * math.prod(whole)
            self.widest = max(self.widest, bytes_in + result.nbytes)
            return result

        return apply


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DESIGNS)
def test_what_is_announced_is_what_happens(monkeypatch, name, way):
    """Scratch, steps, cost and the memory of a block, known before the start, against what a run takes."""
    network = DESIGNS[name].build()
    graph = read_network(network)
    image = padded_image(graph, (37, 50, 21)[: graph.ndim] if graph.ndim == 2 else (19, 22, 13))
    schedule = make_schedule(graph, image.shape[2:], itemsize=8, **WAYS[way])
    expected = one_pass(network, image)
    spy, scratch, steps = Spy(monkeypatch), Watched(), []
    result = by_stages(schedule, image, scratch=scratch, progress=lambda: steps.append(None))
    assert difference(result, expected) < 1e-9  # nothing is read that was not written, or that was freed
    assert scratch.most == schedule.scratch_bytes
    assert scratch.kept == {}
    assert len(steps) == schedule.steps
    assert schedule.passes == pytest.approx(spy.done / sum(spy.once.values()), rel=1e-12)
    assert spy.widest <= schedule.block_bytes


def test_one_block_costs_one_pass_and_blocks_cost_their_halos():
    """A network with stored statistics, uncut, does everything once; halos add to it; the first level twice adds more."""
    graph = read_network(Design(D2, blocks=2, decoder=2).build())
    passes = [make_schedule(graph, (48, 64), itemsize=8, **way).passes for way in WAYS.values()]
    once = make_schedule(graph, (48, 64), itemsize=8)
    recomputed = sum(len(piece.inner) for piece in once.pieces) - (len(graph.nodes) - 1)
    assert passes[0] == pytest.approx(1, abs=0.02 * recomputed)
    assert passes[0] < passes[1] < passes[3]


def test_first_level_computed_again_takes_less_scratch():
    """The encoder's maps at the image's resolution are what can be saved."""
    graph = read_network(Design(D2, blocks=2, norm="InstanceNorm").build())
    stored, again = (make_schedule(graph, (64, 64), itemsize=4, store_first_level=first) for first in (True, False))
    assert again.scratch_bytes < 0.8 * stored.scratch_bytes
    assert again.passes > stored.passes


@pytest.mark.parametrize(("norm", "most"), [("BatchRenorm", 224), ("InstanceNorm", 288)])
def test_scratch_of_a_network_of_stock_width_is_as_announced(norm, most):
    """Width 32, six stages, single precision: bytes per voxel; half of them in half precision.

    With stored statistics no more than DESIGN.md section 3 says. With the image's the first level's raw skip, the raw map
    beside it and half as many channels below are there at a time: (32 + 32 + 64 / 8) * 4 bytes.
    """
    strides = ((1, 1, 1), *[(2, 2, 2)] * 5)
    graph = read_network(Design(strides, width=32, blocks=2, decoder=2, norm=norm).build())
    shape = (128, 128, 128)
    single, half = (make_schedule(graph, shape, itemsize=size).scratch_bytes / math.prod(shape) for size in (4, 2))
    assert single == 2 * half
    assert 128 < single <= most


@pytest.mark.parametrize(
    "design",
    [
        Design(((1, 1), *[(2, 2)] * 5), kind="residual encoder", blocks=4),
        Design(((1, 1), *[(2, 2)] * 5), kind="residual", blocks=3, decoder=2),
        Design(((1, 1), *[(2, 2)] * 5), blocks=4, decoder=3),
        Design(((1, 1), *[(2, 2)] * 5), blocks=2, decoder=2, up="linear"),
        Design(((1, 1), *[(2, 2)] * 5), 7, blocks=3),
        Design(((1, 1), *[(2, 2)] * 5), blocks=2, norm="InstanceNorm"),
    ],
    ids=["residual encoder", "residual", "plain", "linear", "7-wide kernels", "InstanceNorm"],
)
def test_long_stages_are_divided(design):
    """However many blocks a stage has, no piece reads more than three voxels beyond what a block covers."""
    graph = read_network(design.build())
    endless = [(10**6,) * graph.ndim] * len(graph.nodes)
    block = 64
    for piece in divide(graph):
        wanted = ((8 * block, 9 * block),) * graph.ndim
        found = regions(graph, piece, wanted, endless)
        for source in piece.sources:
            ratio = graph.nodes[piece.target].stride[0] / graph.nodes[source].stride[0]
            start, stop = found[source][0]
            longest = 3 * max(ratio, 1)  # in voxels of the source or of the target, whichever are larger
            assert 8 * block * ratio - start <= longest
            assert stop - 9 * block * ratio <= longest


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_blocks_of_every_piece_cover_its_map(data):
    """For any image, size of blocks and shift, every voxel of every piece's map is computed in exactly one block."""
    graph = read_network(Design(D2, norm="InstanceNorm").build())
    shape = tuple(4 * data.draw(st.integers(1, 20)) for _ in range(2))
    most, shift = data.draw(st.sampled_from([1, 3000, 10**6])), data.draw(st.booleans())
    schedule = make_schedule(graph, shape, itemsize=4, block_bytes=most, shift=shift)
    if data.draw(st.booleans()):
        schedule = cut(schedule, data.draw(st.integers(1, 12)))
    for number, piece in enumerate(schedule.pieces):
        covered = torch.zeros(schedule.extents[piece.target], dtype=torch.int)
        for (a, b), (c, d) in schedule.blocks_of(number):
            covered[a:b, c:d] += 1
        assert (covered == 1).all()


def test_pieces_read_what_is_stored_and_free_it_once():
    """Every piece's sources are stored by an earlier piece and freed by the last that reads them, none twice."""
    for design in DESIGNS.values():
        graph = read_network(design.build())
        for first in (True, False):
            kept = set()
            for piece in divide(graph, store_first_level=first):
                assert set(piece.sources) - {0} <= kept
                assert piece.replaces in {None, *piece.frees}
                kept -= set(piece.frees)
                kept |= {piece.target} if piece.stored else set()
            assert kept == set()
            assert piece.target == len(graph.nodes) - 1
