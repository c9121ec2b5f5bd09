import pytest
import torch
from tiny_networks import INSTANCE_NORM, noise, predictor, randomized, unet, whole, without_the_voxel_before

from nnunet_norm.layers import convert_norm, find_norms
from nnunet_norm.metrics import compare_pair, summarize
from nnunet_norm.prediction import measure_block_pairs, measure_tile_pairs, ways
from nnunet_norm.prediction.execution import Result
from nnunet_norm.stages.moments import ChannelMoments
from nnunet_norm.stages.windows import Convolution

IMAGE = torch.randn(1, 3, 60, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Position(torch.nn.Module):
    """Passes the image on: what is compared can be read from the values."""

    def __init__(self):
        super().__init__()
        self.pool = torch.nn.Conv2d(1, 1, 2, 2, bias=False)
        self.up = torch.nn.ConvTranspose2d(1, 1, 2, 2, bias=False)

    def forward(self, x):
        return x + 0 * self.up(self.pool(x))


def test_pairs_are_the_same_voxels():
    """Both parts of a pair show the same box of the image, all boxes within it."""
    image = torch.arange(60 * 50, dtype=torch.float64).reshape(1, 1, 60, 50)
    tiles = predictor(Position().double(), (16, 16), halo=3)
    pairs = list(measure_tile_pairs(tiles, image))
    assert len(pairs) == 12
    for first, second in pairs:
        assert torch.equal(first, second)
        assert first.numel() > 0


def test_fixed_statistics_and_an_exact_halo_have_no_mismatch():
    """Different tiles, equal logits; a halo that is too small shows."""
    network = unet([(1, 1), (2, 2), (2, 2)])
    exact = list(measure_tile_pairs(predictor(network, (32, 32), halo="exact"), IMAGE))
    assert len(exact) == 12
    assert max((first - second).abs().max() for first, second in exact) < 1e-12
    small = list(measure_tile_pairs(predictor(network, (32, 32), halo=1), IMAGE))
    assert max((first - second).abs().max() for first, second in small) > 1e-6


def test_tile_statistics_have_a_mismatch():
    """InstanceNorm: the same voxels differ by far more than rounding."""
    pairs = list(
        measure_tile_pairs(
            predictor(unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), (16, 16), halo=4, population="tile"), IMAGE
        )
    )
    assert min((first - second).abs().max() for first, second in pairs) > 1e-3


def test_pairs_are_reproducible_and_bounded():
    """The same seed gives the same pairs, another one others, and never more than asked for."""
    tiles = predictor(unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), (16, 16), halo=4, population="tile")
    pairs = [list(measure_tile_pairs(tiles, IMAGE, max_pairs=5, seed=seed)) for seed in (0, 0, 1)]
    assert [len(p) for p in pairs] == [5, 5, 5]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs[0], pairs[1], strict=True))
    assert any(a[0].shape != b[0].shape or not torch.equal(a[0], b[0]) for a, b in zip(pairs[0], pairs[2], strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 1, 3, 5)])
def test_one_tile_has_no_pairs(shape):
    """Nothing to compare, so nothing is measured."""
    tiles = predictor(unet([(1, 1), (2, 2)]), (16, 16), execution="tiles")
    assert list(measure_tile_pairs(tiles, torch.zeros(shape, dtype=torch.float64))) == []


def test_mirroring_is_left_out():
    """The pairs are those of the network itself, also with a predictor that mirrors."""
    network = unet([(1, 1), (2, 2)])
    plain = list(measure_tile_pairs(predictor(network, (16, 16), halo=4), IMAGE))
    mirrored = list(measure_tile_pairs(predictor(network, (16, 16), halo=4, mirror_axes=(0, 1)), IMAGE))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, mirrored, strict=True))


# --- stage by stage: two grids of blocks ---

NETWORKS = {
    "2d": unet([(1, 1), (2, 2), (2, 2)]),
    "2d InstanceNorm": unet([(1, 1), (2, 2)], norm=INSTANCE_NORM),
    "3d": unet([(1, 1, 1), (2, 2, 2)]),
    "3d residual InstanceNorm": unet([(1, 1, 1), (2, 2, 2)], norm=INSTANCE_NORM, residual=True),
}
IMAGES = {2: noise(1, 6, 45, 38), 3: noise(1, 22, 17, 19)}


def ndim_of(name):
    return int(name[0])


def block_pairs(name, **options):
    made = predictor(NETWORKS[name], (8,) * ndim_of(name), mirror_axes=(0,))
    image = IMAGES[ndim_of(name)]
    return list(measure_block_pairs(made, image, made.plan(image), **options))


def largest(pairs):
    return max((first - second).abs().max() / first.abs().max() for first, second in pairs)


@pytest.mark.parametrize("block_bytes", [2**12, 2**30])
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_elsewhere_have_no_mismatch(name, block_bytes, monkeypatch):
    """Also with image statistics, of which nothing but the order of summation depends on blocks, and in one pass."""
    monkeypatch.setattr(ways, "BLOCK_BYTES", block_bytes)
    pairs = block_pairs(name)
    assert len(pairs) == 12 if block_bytes == 2**12 else 2 <= len(pairs) <= 16
    assert all(first.shape == second.shape and first.numel() for first, second in pairs)
    assert largest(pairs) < (1e-9 if "InstanceNorm" in name else 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_boxes_of_the_whole_image_pass(name):
    """Not mirrored, though the predictor mirrors; of a stack the slices in the middle."""
    network, image = NETWORKS[name], IMAGES[ndim_of(name)]
    if ndim_of(name) == 2:
        image = image[:, 1:5]  # the slices in the middle
    expected = whole(network, image)
    for first, _ in block_pairs(name, max_pairs=3):
        windows = expected
        for axis, n in enumerate(first.shape[1:], start=1):
            windows = windows.unfold(axis, n, 1)
        differences = (windows - first.view(len(first), *([1] * image[0].ndim), *first.shape[1:])).abs()
        assert differences.flatten(4).amax(-1).amax(0).min() < 1e-9


@pytest.mark.parametrize("name", ["2d", "2d InstanceNorm", "3d"])
def test_a_halo_of_blocks_that_is_too_small_shows(name, monkeypatch):
    """The measurement can fail: without one voxel of the halo the grids differ by far more than rounding."""
    made = predictor(NETWORKS[name], (8,) * ndim_of(name))
    plan = made.plan(IMAGES[ndim_of(name)])  # read and verified before it is spoiled
    monkeypatch.setattr(Convolution, "apply", without_the_voxel_before(Convolution.apply))
    pairs = list(measure_block_pairs(made, IMAGES[ndim_of(name)], plan))
    difference = summarize([compare_pair(*pair) for pair in pairs])
    assert difference.max_dist > 1e-2
    assert not difference.verdict.startswith("no")


def test_statistics_of_a_block_show(monkeypatch):
    """And if a norm saw a block in place of the image."""
    made = predictor(NETWORKS["2d InstanceNorm"], (8, 8))
    plan, real = made.plan(IMAGES[2]), ChannelMoments.add

    def add(moments, values):
        moments.__init__()
        real(moments, values)

    monkeypatch.setattr(ChannelMoments, "add", add)
    assert largest(list(measure_block_pairs(made, IMAGES[2], plan))) > 1e-2


def test_an_image_of_one_voxel_has_no_pairs():
    """It cannot be cut into blocks."""
    made = predictor(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1)).double(), (8, 8))
    image = noise(1, 1, 1, 1)
    assert list(measure_block_pairs(made, image, made.plan(image))) == []


def six_stages():
    """The depth of a stock network, with BatchRenorm whose running statistics are those of its own activations."""
    network = unet([(1, 1), *[(2, 2)] * 5], convs=2)
    network = randomized(convert_norm(network, "batch_renorm"))
    for norm in find_norms(network).values():
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        network(noise(2, 1, 128, 128))
    return network.float().eval()


def test_a_six_stage_batchrenorm_network_has_no_mismatch_stage_by_stage_and_one_in_tiles():
    """Max dist "no", in single precision, where a halo cut at the end would have to be 160 voxels wide."""
    network, image = six_stages(), noise(1, 1, 250, 210, dtype=torch.float32)
    made = predictor(network, (96, 96))
    plan = made.plan(image)
    assert (plan.as_dict()["plan"], made.field.aligned[0]) == ("stages", (159, 128))
    mismatch = summarize([compare_pair(*pair) for pair in measure_block_pairs(made, image, plan)])
    assert mismatch.num_pairs == 12
    assert mismatch.verdict.startswith("no")
    result = Result(image.shape[1:])
    made.run_plan(plan, image, result)
    assert (result.logits - whole(network, image)).abs().max() <= 1e-4 * result.logits.abs().max()
    tiles = summarize(
        [compare_pair(*pair) for pair in measure_tile_pairs(predictor(network, (96, 96), halo=16), image)]
    )
    assert tiles.max_dist > 0.1
