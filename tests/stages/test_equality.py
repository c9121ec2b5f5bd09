"""The claim of the package: stage by stage the result is that of one pass over the whole image, for networks of any kind."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_networks import FIXED, IMAGE, Design
from whole_pass import by_stages, difference, difference_of, one_pass, padded_image

from nnunet_norm.receptive_field import trace
from nnunet_norm.stages import make_schedule, reach, read_network, read_verified
from nnunet_norm.stages.regions import pad
from nnunet_norm.stages.windows import Convolution, Pooling

D2 = {n: ((1, 1), *[(2, 2)] * (n - 1)) for n in range(2, 7)}
D3 = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
K3 = ((1, 3, 3), (3, 3, 3), (3, 5, 1))

DESIGNS = {
    "plain, stock": Design(D2[3], blocks=2, decoder=2),
    "plain, 6 stages": Design(D2[6], blocks=2, decoder=2, norm="BatchRenorm"),
    "plain, 7 stages": Design((*D2[5], (1, 2), (2, 1)), norm="InstanceNorm"),
    "plain, 3d": Design(D3, K3, blocks=2, norm="GroupNorm"),
    "two channels in": Design(D2[3], channels=2, norm="torch's GroupNorm"),
    "stride 3": Design(((1, 1), (3, 2), (1, 3)), ((3, 3), (5, 3), (3, 5)), blocks=2, norm="tracked InstanceNorm"),
    "one stage's stride is one": Design(((1, 1), (2, 2), (1, 1), (2, 2)), norm="none"),
    "1-wide kernels": Design(D2[3], 1, norm="InstanceNorm without affine"),
    "5-wide kernels": Design(D2[3], 5, blocks=3, norm="BatchNorm without statistics"),
    "maximum pooling": Design(D2[4], down="max", norm="InstanceNorm"),
    "average pooling, 3d": Design(D3, down="avg", blocks=2),
    "nearest": Design(D2[4], up="nearest", norm="InstanceNorm"),
    "bilinear, stride 3": Design(((1, 1), (3, 1), (2, 2)), up="linear", decoder=2),
    "trilinear": Design(D3, K3, up="linear", down="max", norm="GroupNorm"),
    "dropout": Design(D2[3], dropout=True),
    "deep supervision": Design(D2[3], deep_supervision=True, norm="InstanceNorm"),
    "nonlinearity first": Design(D2[3], nonlin_first=True, blocks=2, norm="InstanceNorm"),
    "residual encoder": Design(D2[4], blocks=3, kind="residual encoder", norm="BatchRenorm"),
    "residual encoder, 6 stages": Design(D2[6], blocks=1, kind="residual encoder", norm="InstanceNorm"),
    "residual encoder, 3d": Design(D3, K3, blocks=2, kind="residual encoder", norm="InstanceNorm", dropout=True),
    "residual encoder, no norm": Design(D2[3], kind="residual encoder", norm="none", deep_supervision=True),
    "bottleneck": Design(D2[4], blocks=2, kind="bottleneck", norm="GroupNorm"),
    "bottleneck, 3d": Design(D3, K3, kind="bottleneck", norm="BatchNorm"),
    "residual decoder": Design(D2[4], blocks=2, decoder=2, kind="residual", norm="InstanceNorm"),
    "residual decoder, 3d": Design(D3, kind="residual", norm="tracked InstanceNorm"),
}

BARS = {**dict.fromkeys(FIXED, 1e-12), **dict.fromkeys(IMAGE, 1e-9)}
"""Largest difference, by norm: as DESIGN.md section 6 has it."""


def image_shape(design):
    """Odd extents, more than one total stride, so that the norms at the bottom have several voxels."""
    return tuple(max(2 * s - 1, {2: 37, 3: 11}[design.ndim] - 2 * axis) for axis, s in enumerate(design.stride))


@pytest.mark.parametrize("name", DESIGNS)
def test_networks_of_every_kind_are_known_and_exact(name, tmp_path):
    """The graph is verified, its reach is the traced one, and its result is that of one pass, however it is cut."""
    design = DESIGNS[name]
    network = design.build()
    field = trace(network)
    graph = read_verified(network, field)
    assert graph.stride == field.stride == design.stride
    assert reach(graph, aligned=True) == field.aligned
    assert reach(graph, aligned=False) == field.any_voxel
    shape = image_shape(design)
    ways = [
        {},
        {"edge": 9 if design.ndim == 2 else 4},
        {"edge": 11 if design.ndim == 2 else 5, "shift": True},
        {"block_bytes": 1, "store_first_level": False},
        {"block_bytes": 1, "folder": tmp_path},
    ]
    found = [difference_of(network, shape, graph=graph, **way) for way in ways]
    assert max(found) < BARS[design.norm], dict(zip(map(str, ways), found, strict=True))


@st.composite
def designs(draw, norms, axes, depth):
    """Networks with that many stages: kernels, strides and everything else drawn."""
    most = {2: 16, 3: 6}[axes]
    strides, total = [(1,) * axes], [1] * axes
    for _ in range(depth - 1):
        stride = tuple(draw(st.sampled_from([s for s in (1, 2, 3) if t * s <= most])) for t in total)
        strides.append(stride)
        total = [t * s for t, s in zip(total, stride, strict=True)]
    kernels = tuple(tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(axes)) for _ in range(depth))
    kind = draw(st.sampled_from(["plain", "plain", "residual encoder", "bottleneck", "residual"]))
    plain = kind == "plain"
    return Design(
        tuple(strides),
        kernels,
        kind=kind,
        norm=draw(st.sampled_from(sorted(norms))),
        blocks=draw(st.integers(1, 2 if depth > 4 else 3)),
        decoder=draw(st.integers(1, 2)),
        channels=draw(st.integers(1, 2)),
        down=draw(st.sampled_from(["conv", "avg", "max"])) if plain else "conv",
        up=draw(st.sampled_from(["transposed", "nearest", "linear"])),
        dropout=draw(st.booleans()),
        deep_supervision=draw(st.booleans()),
        nonlin_first=plain and draw(st.booleans()),
    )


@st.composite
def schedules(draw, graph, design):
    """The pieces of a network with blocks of any shape on an image of any shape."""
    longest = {2: 44, 3: 14}[design.ndim]
    shape = tuple(draw(st.integers(s + 1, max(longest, 2 * s))) for s in design.stride)
    image = padded_image(graph, shape, seed=draw(st.integers(0, 9)))
    schedule = make_schedule(
        graph,
        image.shape[2:],
        itemsize=8,
        store_first_level=draw(st.booleans()),
        block_bytes=draw(st.sampled_from([1, 5_000, 50_000, 10**9])),
        shift=draw(st.booleans()),
    )
    if draw(st.booleans()):  # edges that no schedule would choose
        shortest = {2: 3, 3: 2}[design.ndim]
        shapes = tuple(
            tuple(draw(st.integers(min(shortest, n), n)) for n in schedule.extents[piece.target])
            for piece in schedule.pieces
        )
        schedule = replace(schedule, block_shapes=shapes)
    return image, schedule


@pytest.mark.parametrize("norms", [FIXED, IMAGE], ids=["fixed", "image"])
@pytest.mark.parametrize(("axes", "depth"), [(2, 2), (2, 3), (2, 4), (2, 5), (2, 6), (2, 7), (3, 2), (3, 3), (3, 4)])
def test_any_network_on_any_image_in_any_blocks_is_exact(norms, axes, depth):
    """Below 1e-12 with stored statistics and 1e-9 with the image's, whatever is drawn."""

    @given(st.data())
    @settings(max_examples=5, deadline=None)
    def holds(data):
        design = data.draw(designs(norms, axes, depth))
        network = design.build(seed=data.draw(st.integers(0, 9)))
        graph = read_network(network)
        image, schedule = data.draw(schedules(graph, design))
        assert difference(by_stages(schedule, image), one_pass(network, image)) < BARS[design.norm]

    holds()


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_reach_of_any_network_is_the_traced_one(data):
    """What the operators declare, composed, is what the tracer finds: strides, aligned reach, reach of any voxel, norms."""
    axes = data.draw(st.integers(2, 3))
    design = data.draw(designs(FIXED | IMAGE, axes, data.draw(st.integers(2, {2: 7, 3: 4}[axes]))))
    network = design.build()
    graph, field = read_network(network), trace(network)
    assert graph.stride == field.stride
    assert reach(graph, aligned=True) == field.aligned
    assert reach(graph, aligned=False) == field.any_voxel
    assert len(graph.norms) == len(field.tile_statistics)


def one_short(original, side):
    """``needs`` of an operator, one voxel short on a side."""

    def needs(self, axis, interval):
        start, stop = original(self, axis, interval)
        narrow = self.kernel[axis] < 2
        return (start, stop) if narrow else (start + (side == "before"), stop - (side == "after"))

    return needs


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    ("operator", "design"),
    [
        (Convolution, Design(D2[3], blocks=2)),
        (Convolution, Design(D2[6], norm="InstanceNorm")),
        (Convolution, Design(D3, kind="residual encoder", norm="GroupNorm")),
        (Pooling, Design(D2[3], down="avg")),
    ],
    ids=["plain", "plain, 6 stages", "residual 3d", "pooling"],
)
def test_a_halo_that_is_one_voxel_short_is_noticed(monkeypatch, operator, design, side):
    """The comparison can fail: zeros in the place of the outermost voxels that a block reads change the result."""
    network, shape = design.build(), image_shape(design)
    assert difference_of(network, shape, edge=7) < 1e-12
    original = operator.needs

    def apply(self, inputs, place):
        needed = tuple(original(self, axis, interval) for axis, interval in enumerate(place.wanted))
        return self.slide(pad(inputs[0], place.given[0], needed, self.fill))

    monkeypatch.setattr(operator, "apply", apply)
    assert difference_of(network, shape, edge=7) < 1e-12  # this alone changes nothing
    monkeypatch.setattr(operator, "needs", one_short(original, side))
    assert difference_of(network, shape, edge=7) > 1e-6


@pytest.mark.parametrize("norm", ["BatchRenorm", "InstanceNorm"])
def test_in_single_precision_the_difference_is_rounding(norm):
    """Of a float32 network the difference is a few roundings of the largest output, not more."""
    design = Design(D2[5], norm=norm)
    network = design.build().float()
    graph = read_network(network)
    image = padded_image(graph, (61, 47), dtype=torch.float32)
    result = by_stages(make_schedule(graph, image.shape[2:], itemsize=4, block_bytes=1), image)
    assert result.dtype == torch.float32
    assert difference(result, one_pass(network, image)) < 1e-4
    exact = one_pass(design.build(), image.double())
    assert difference(result.double(), exact) < 1e-4


def test_every_voxel_of_the_image_matters():
    """The networks of these tests let no voxel of the image go without effect, or equality would show little."""
    network = Design(D2[4], blocks=2).build()
    image = padded_image(read_network(network), (39, 35)).requires_grad_()
    (gradient,) = torch.autograd.grad(network(image).square().sum(), image)
    assert (gradient.abs() > 1e-6).all()
