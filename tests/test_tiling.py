from functools import cache

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_norm.errors import TilingError
from nnunet_norm.receptive_field import trace
from nnunet_norm.tiling import intersection, padded_shape, plan_tiles, smallest_tile


@st.composite
def tilings(draw):
    """Arguments of plan_tiles that fulfil its conditions, for 1 to 3 axes."""
    axes = draw(st.integers(1, 3))
    limit = {1: 60, 2: 14, 3: 6}[axes]
    image, tile, halo, stride = [], [], [], []
    for _ in range(axes):
        s = draw(st.integers(1, 4))
        h = (draw(st.integers(0, 6)), draw(st.integers(0, 6)))
        image.append(draw(st.integers(1, limit * s)))
        stride.append(s)
        halo.append(h)
        tile.append(smallest_tile([h], [s])[0] + s * draw(st.integers(0, 4)))
    return image, tile, halo, stride


@given(tilings())
@settings(max_examples=300, deadline=None)
def test_writes_cover_every_voxel_exactly_once(arguments):
    """The cores partition the unpadded image."""
    image = arguments[0]
    written = np.zeros(image, dtype=int)
    for tile in plan_tiles(*arguments):
        written[tile.write] += 1
    assert (written == 1).all()


@given(tilings())
@settings(max_examples=300, deadline=None)
def test_every_tile_fulfils_the_conditions_of_exactness(arguments):
    """Equal shapes on the grid of the stride, inside the padded image, cores a halo away from every inner side."""
    image, tile_shape, halo, stride = arguments
    padded = padded_shape(image, stride)
    for tile in plan_tiles(*arguments):
        for axis, (read, core, write) in enumerate(zip(tile.read, tile.core, tile.write, strict=True)):
            assert read.stop - read.start == min(tile_shape[axis], padded[axis])
            assert read.start % stride[axis] == read.stop % stride[axis] == 0
            assert 0 <= read.start < read.stop <= padded[axis]
            assert (write.start, write.stop) == (read.start + core.start, read.start + core.stop)
            before, after = halo[axis]
            assert 0 <= core.start < core.stop <= read.stop - read.start
            assert read.start == 0 or core.start >= before
            assert read.stop == padded[axis] or core.stop <= read.stop - read.start - after


@given(tilings())
@settings(max_examples=300, deadline=None)
def test_one_tile_fewer_could_not_close_up(arguments):
    """The number of tiles along every axis is the smallest that the halo allows."""
    image, tile_shape, halo, stride = arguments
    padded = padded_shape(image, stride)
    tiles = plan_tiles(*arguments)
    for axis, (length, size, (before, after), s) in enumerate(zip(padded, tile_shape, halo, stride, strict=True)):
        count = len({tile.read[axis].start for tile in tiles})
        fewer = (count - 2) * ((size - before - after) // s * s) + size  # what count - 1 tiles can span
        assert count == 1 or fewer < length


@given(tilings())
@settings(max_examples=200, deadline=None)
def test_cores_lie_on_the_grid_when_the_halo_does(arguments):
    """With a halo in multiples of the stride, the aligned reach is enough: cores begin and end on the grid."""
    image, tile_shape, halo, stride = arguments
    halo = [(b * s, a * s) for (b, a), s in zip(halo, stride, strict=True)]
    tile_shape = [max(t, m) for t, m in zip(tile_shape, smallest_tile(halo, stride), strict=True)]
    for tile in plan_tiles(image, tile_shape, halo, stride):
        for write, n, s in zip(tile.write, image, stride, strict=True):
            assert write.start % s == 0
            assert write.stop % s == 0 or write.stop == n


def test_a_plan_by_hand():
    """One axis of 20 in tiles of 8 with halo 2: steps of at most 4, cores cut in the middle."""
    tiles = plan_tiles((20,), (8,), 2, (2,))
    assert [(t.read[0].start, t.read[0].stop) for t in tiles] == [(0, 8), (4, 12), (8, 16), (12, 20)]
    assert [(t.write[0].start, t.write[0].stop) for t in tiles] == [(0, 6), (6, 10), (10, 14), (14, 20)]
    assert [(t.core[0].start, t.core[0].stop) for t in tiles] == [(0, 6), (2, 6), (2, 6), (2, 8)]


def test_surplus_overlap_is_shared():
    """Five tiles of 288 must cover 1024 where four do not quite: no tile is left with a sliver."""
    writes = [t.write[0] for t in plan_tiles((1000,), (288,), 32, (32,))]
    assert [(w.start, w.stop) for w in writes] == [(0, 224), (224, 384), (384, 576), (576, 768), (768, 1000)]


def test_halo_forms_mean_the_same():
    """One number, a number per axis and a pair per axis are the same halo."""
    expected = plan_tiles((40, 30), (16, 16), [(3, 3), (3, 3)], (2, 2))
    assert plan_tiles((40, 30), (16, 16), 3, (2, 2)) == expected
    assert plan_tiles((40, 30), np.array([16, 16]), [np.int64(3), (3, 3)], [2, 2]) == expected


def test_image_not_larger_than_the_tile_is_one_tile():
    """A small image is one tile of its padded extent, whatever the halo."""
    (tile,) = plan_tiles((13, 5), (16, 16), 100, (4, 4))
    assert tile.read == (slice(0, 16), slice(0, 8))
    assert tile.core == tile.write == (slice(0, 13), slice(0, 5))


def test_smallest_tile_is_the_smallest():
    """The smallest tile is accepted, one stride less is refused and names it."""
    assert smallest_tile([(159, 128), 5], (32, 8)) == (320, 24)
    plan_tiles((5000,), (320,), [(159, 128)], (32,))
    with pytest.raises(TilingError, match=r"halo 159 before and 128 after .* tile of 288 .* smallest .* 320$"):
        plan_tiles((5000,), (288,), [(159, 128)], (32,))
    with pytest.raises(TilingError, match=r"smallest tile size that will do is 304$"):
        plan_tiles((304,), (288,), [(159, 128)], (16,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((100,), (30,), 2, (16,)), "tile size 30 on axis 0 .* stride 16: the next valid size is 32"),
        (((100, 100), (32,), 2, (16, 16)), r"tile shape \(32,\) has 1 axes, but the image has 2"),
        (((100, 100), (32, 32), 2, (16,)), r"stride \(16,\) has 1 axes, but the image has 2"),
        (((100, 100), (32, 32), (2,), (16, 16)), r"halo \(2,\) has 1 axes, but the image has 2"),
        (((100,), (32,), [(1, 2, 3)], (16,)), r"halo \(1, 2, 3\) of an axis has 3 numbers"),
        (((100,), (32,), -1, (16,)), r"halo \(-1, -1\) has a value below 0"),
        (((100,), (32,), 1.5, (16,)), r"halo \(1.5, 1.5\) is not a sequence of whole numbers"),
        (((100,), (32,), 1, (0,)), r"stride \(0,\) has a value below 1"),
        (((0, 4), (32, 32), 1, (1, 1)), r"image shape \(0, 4\) has a value below 1"),
        (((), (), 1, ()), r"image shape \(\) has no axes"),
    ],
)
def test_what_cannot_be_tiled_is_refused(arguments, message):
    """Every refusal names the value and the remedy."""
    with pytest.raises(TilingError, match=message):
        plan_tiles(*arguments)


def test_intersection_is_the_set_of_shared_voxels():
    """The box of the voxels that two boxes share, None where they share none, symmetric."""
    a, b = (slice(0, 5), slice(2, 9)), (slice(3, 8), slice(0, 4))
    assert intersection(a, b) == intersection(b, a) == (slice(3, 5), slice(2, 4))
    assert intersection(a, (slice(5, 8), slice(0, 9))) is None
    with pytest.raises(TilingError, match="boxes of 2 and 1 axes"):
        intersection(a, (slice(0, 1),))


@cache
def network(kind, kernels, strides, seed):
    """A small U-Net in float64 with random weights and random fixed statistics, and its receptive field."""
    torch.manual_seed(seed)
    blocks = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    net = kind(
        input_channels=1,
        n_stages=len(strides),
        features_per_stage=3,
        conv_op=nn.Conv2d,
        kernel_sizes=kernels,
        strides=strides,
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.BatchNorm2d,
        norm_op_kwargs={},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **{blocks: 1},
    )
    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net, trace(net)


NETWORKS = [
    (PlainConvUNet, 3, (1, 2, 2)),
    (PlainConvUNet, (5, 3), (1, 3)),
    (PlainConvUNet, ((3, 1), (3, 3), (3, 3)), ((1, 1), (2, 1), (2, 4))),
    (ResidualEncoderUNet, 3, (1, 2)),
]


def whole_and_tiled(net, image, tiles, stride):
    """The network once on the image padded at its far end, and the cores of its tiles put together."""
    pad = [p - n for n, p in zip(image.shape, padded_shape(image.shape, stride), strict=True)]
    padded = nn.functional.pad(image, (0, pad[1], 0, pad[0]))[None, None]
    tiled = torch.full((2, *image.shape), torch.nan, dtype=image.dtype)
    with torch.inference_mode():
        whole = net(padded)[0][:, : image.shape[0], : image.shape[1]]
        for tile in tiles:
            tiled[:, *tile.write] = net(padded[:, :, *tile.read])[0][:, *tile.core]
    return whole, tiled


@given(
    which=st.sampled_from(NETWORKS),
    seed=st.integers(0, 3),
    image_shape=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    surplus=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    on_grid=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_tiled_equals_whole_when_the_halo_is_the_reach(which, seed, image_shape, surplus, on_grid):
    """The aligned reach rounded up to the stride and the reach of any voxel give the whole image's prediction."""
    net, field = network(*which, seed)
    if on_grid:
        halo = [tuple(-(-r // s) * s for r in reach) for reach, s in zip(field.aligned, field.stride, strict=True)]
    else:
        halo = field.any_voxel
    tile_shape = [t + k * s for t, k, s in zip(smallest_tile(halo, field.stride), surplus, field.stride, strict=True)]
    image = torch.rand(image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole, tiled = whole_and_tiled(net, image, plan_tiles(image_shape, tile_shape, halo, field.stride), field.stride)
    assert (whole - tiled).abs().max() < 1e-12


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("which", NETWORKS)
def test_a_smaller_halo_is_not_exact(which, axis, side):
    """One stride less than the aligned reach on one side alone shows, in a network where nothing cancels."""
    net, field = network(*which, seed=4)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.BatchNorm2d):
                module.weight.abs_().clamp_(min=0.1)
    halo = [[-(-r // s) * s for r in reach] for reach, s in zip(field.aligned, field.stride, strict=True)]
    image_shape = [24, 24]
    image_shape[axis] = smallest_tile(halo, field.stride)[axis] + 2 * field.stride[axis]
    image = torch.rand(image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for enough in (True, False):
        if not enough:
            halo[axis][side] -= field.stride[axis]
        tile_shape = [24, 24]
        tile_shape[axis] = smallest_tile(halo, field.stride)[axis]
        whole, tiled = whole_and_tiled(
            net, image, plan_tiles(image_shape, tile_shape, halo, field.stride), field.stride
        )
        relative = (whole - tiled).abs().max() / whole.abs().max()
        assert (relative < 1e-13) if enough else (relative > 1e-10)
