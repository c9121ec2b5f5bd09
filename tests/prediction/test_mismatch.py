import pytest
import torch
from tiny_networks import INSTANCE_NORM, predictor, unet

from nnunet_norm.prediction import measure_tile_pairs

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
    pairs = list(measure_tile_pairs(predictor(unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), (16, 16), halo=4), IMAGE))
    assert min((first - second).abs().max() for first, second in pairs) > 1e-3


def test_pairs_are_reproducible_and_bounded():
    """The same seed gives the same pairs, another one others, and never more than asked for."""
    tiles = predictor(unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), (16, 16), halo=4)
    pairs = [list(measure_tile_pairs(tiles, IMAGE, max_pairs=5, seed=seed)) for seed in (0, 0, 1)]
    assert [len(p) for p in pairs] == [5, 5, 5]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs[0], pairs[1], strict=True))
    assert any(a[0].shape != b[0].shape or not torch.equal(a[0], b[0]) for a, b in zip(pairs[0], pairs[2], strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 1, 3, 5)])
def test_one_tile_has_no_pairs(shape):
    """Nothing to compare, so nothing is measured."""
    tiles = predictor(unet([(1, 1), (2, 2)]), (16, 16))
    assert list(measure_tile_pairs(tiles, torch.zeros(shape, dtype=torch.float64))) == []


def test_mirroring_is_left_out():
    """The pairs are those of the network itself, also with a predictor that mirrors."""
    network = unet([(1, 1), (2, 2)])
    plain = list(measure_tile_pairs(predictor(network, (16, 16), halo=4), IMAGE))
    mirrored = list(measure_tile_pairs(predictor(network, (16, 16), halo=4, mirror_axes=(0, 1)), IMAGE))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, mirrored, strict=True))
