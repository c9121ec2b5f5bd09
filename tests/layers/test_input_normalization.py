"""Tiles are normalized by their own quantiles, as NumPy finds them, and images that nobody has normalized are refused."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError, InputImageError
from nnunet_norm.layers import confirm_normalized_images, get_input_normalization, set_input_normalization
from nnunet_norm.receptive_field import theoretical, trace
from nnunet_norm.stages import read_verified


def expected(tiles: Tensor, channels: int) -> Tensor:
    """NumPy's quantiles, tile by tile and channel by channel."""
    found = tiles.double().numpy().copy()
    for tile in found:
        for channel in tile[:channels]:
            low, high = np.quantile(channel, [0.01, 0.98])
            channel[...] = np.clip((channel - low) / (high - low), 0, 1)
    return torch.from_numpy(found).to(tiles.dtype)


def network(kind: str | None, channels: int = 2) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    if kind is not None:
        set_input_normalization(made, kind, channels)
    return made


def tiles(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7 + 3).to(dtype)


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (1, 3, 7, 9), (3, 3, 5, 6, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_are_normalized_as_numpy_does_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Enforces the formula per sample and channel, in 2d and 3d; a cascade's labels behind the image stay as they are."""
    made = network("tile_quantile")
    given = tiles(*shape, dtype=dtype)
    normalization = get_input_normalization(made)
    assert normalization is not None
    found = normalization.normalize(given)
    torch.testing.assert_close(found, expected(given, 2), rtol=0, atol=1e-6)
    assert torch.equal(found[:, 2:], given[:, 2:])
    assert found.dtype == dtype


def test_the_network_does_it_in_both_modes_and_under_every_wrapper() -> None:
    """Enforces the same input for the first layer in both modes, copied, compiled whole, and in half precision."""
    made, plain = network("tile_quantile"), network(None)
    given = tiles(2, 3, 12, 12)
    wanted = plain(expected(given, 2))
    for mode in (True, False):
        torch.testing.assert_close(made.train(mode)(given), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(made)(given), wanted, atol=1e-6, rtol=1e-5)
    compiled: Any = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(given), wanted, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(given).float(), wanted, atol=0.05, rtol=0.05)
    torch.testing.assert_close(made.to(torch.bfloat16)(given.bfloat16()).float(), wanted, atol=0.1, rtol=0.1)


def test_micro_batches_and_gradients_are_those_of_a_normalized_input() -> None:
    """Enforces that samples do not see each other, and that weights learn as if the input had come normalized."""
    made, plain = network("tile_quantile"), network(None)
    given = tiles(4, 3, 8, 8)
    made(given).square().sum().backward()
    plain(expected(given, 2)).square().sum().backward()
    for one, other in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([made(part) for part in given.split(1)]), made(given))


def test_the_image_may_ask_for_its_gradient() -> None:
    """Enforces the slope 1 / (q_high - q_low) between the quantiles, and 0 outside: quantiles count as constants."""
    normalization = get_input_normalization(network("tile_quantile"))
    assert normalization is not None
    given = tiles(1, 3, 8, 8).requires_grad_()
    normalization.normalize(given).sum().backward()
    channel = given.detach()[0, 0].numpy()
    low, high = np.quantile(channel, [0.01, 0.98])
    slope = np.where((channel > low) & (channel < high), 1 / (high - low), 0)
    assert given.grad is not None
    np.testing.assert_allclose(given.grad[0, 0].numpy(), slope, rtol=1e-5)


def test_a_constant_tile_becomes_0() -> None:
    """Enforces 0 for a tile without any contrast, and only 0 and 1 where the quantiles are equal; never NaN."""
    made = network("tile_quantile", channels=1)
    normalization = get_input_normalization(made)
    assert normalization is not None
    assert not normalization.normalize(torch.full((1, 1, 8, 8), 3.5)).any()
    spot = torch.zeros(1, 1, 20, 20)
    spot[0, 0, 4, 5] = 100
    assert torch.equal(normalization.normalize(spot), (spot > 0).float())


@pytest.mark.parametrize("kind", ["image_quantile", "tile_quantile"])
def test_weights_keep_their_keys(kind: str) -> None:
    """Enforces checkpoints that any network of the same plans can load."""
    assert list(network(kind).state_dict()) == list(network(None).state_dict())


def test_images_that_nobody_normalized_are_refused() -> None:
    """Enforces that another predictor cannot feed z-scores, in one line that names the one that can."""
    made, given = network("image_quantile"), tiles(1, 3, 8, 8)
    with pytest.raises(
        InputImageError, match=r"^input_normalization image_quantile: .*: predict with nnunet-norm predict$"
    ):
        made.eval()(given)
    confirm_normalized_images(made)
    assert torch.equal(made(given), network(None)(given))
    assert torch.equal(copy.deepcopy(made)(given), made(given))


def test_whoever_follows_the_network_sees_the_whole_tile() -> None:
    """Enforces tile statistics beside the reach of the convolutions, and no run stage by stage."""
    made = network("tile_quantile", channels=3)
    field = trace(made)
    assert field.tile_statistics == ("input_normalization",)
    assert field.normalizes_tiles
    assert field.norms_of_tiles == ()
    assert field.any_voxel == trace(network(None)).any_voxel == ((1, 1), (1, 1))
    with pytest.raises(ArchitectureError, match=r"its own quantiles \(input_normalization tile_quantile\)$"):
        read_verified(made, field)
    images = network("image_quantile", channels=3)
    confirm_normalized_images(images)
    assert trace(images) == trace(network(None))
    read_verified(images, trace(images))


def test_what_looks_at_the_network_alone_needs_no_normalized_image() -> None:
    """Enforces the reach of the plain network before anybody has confirmed images, which stay refused afterwards."""
    made = network("image_quantile")
    assert theoretical(made) == theoretical(network(None)) == ((1, 1), (1, 1))
    assert trace(made) == trace(network(None))
    with pytest.raises(InputImageError, match=r"predict with nnunet-norm predict$"):
        made(tiles(1, 3, 8, 8))
