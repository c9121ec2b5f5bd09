"""Whole images are normalized by their quantiles as NumPy finds them, in memory and where they are read."""

import logging
from typing import Any

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_norm.inputs import NormalizedArray, interpolated, normalize_image, quantiles_of, ranks_of, warn_of_constant


def image(*shape: int) -> np.ndarray:
    return (np.random.default_rng(3).gamma(2.0, 5.0, shape) - 4).astype(np.float32)


def expected(values: np.ndarray) -> np.ndarray:
    found = values.astype(np.float64)
    for channel in found:
        low, high = np.quantile(channel, [0.01, 0.98])
        channel[...] = np.clip((channel - low) / (high - low), 0, 1)
    return found


def test_an_image_is_normalized_per_channel() -> None:
    """Enforces the formula, in place."""
    values = image(2, 6, 7, 8)
    values[1] *= 100
    wanted = expected(values)
    normalize_image(values)
    np.testing.assert_allclose(values, wanted, atol=1e-6)


def test_a_z_score_before_makes_no_difference() -> None:
    """Enforces that preprocessed data do for what is defined on the image itself."""
    values = image(1, 9, 9, 9)
    scored = (values - values.mean()) / values.std()
    np.testing.assert_allclose(expected(scored), expected(values), atol=1e-6)


@pytest.mark.parametrize("stored", ["numpy", "blosc2"])
def test_patches_are_those_of_the_normalized_image(stored: str) -> None:
    """Enforces equality of everything that can be cut out, and that nothing more is read."""
    values = image(2, 6, 7, 8)
    read: list[Any] = []

    class Watched:
        shape, dtype = values.shape, values.dtype
        array = values if stored == "numpy" else blosc2.asarray(values)

        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return self.array[index]

    found, wanted = NormalizedArray(Watched(), quantiles_of(values)), expected(values)
    read.clear()
    box = (slice(None), slice(1, 3), slice(0, 7), slice(4, 8))
    np.testing.assert_allclose(found[box], wanted[box], atol=1e-6)
    assert read == [box]
    for index in (slice(None), (slice(0, 1), 3), (1, 2), 1, (slice(None), slice(0, 2))):
        np.testing.assert_allclose(found[index], wanted[index], atol=1e-6)
    np.testing.assert_allclose(np.vstack((found, found)), np.vstack((wanted, wanted)), atol=1e-6)
    assert (found.shape, found.ndim, len(found), found.dtype) == ((2, 6, 7, 8), 4, 2, np.float32)
    assert found[:].dtype == np.float32


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=250))
def test_neighbours_give_numpys_quantiles(numbers: list[float]) -> None:
    """Enforces ranks and interpolation for any number of values."""
    values = np.sort(np.array(numbers, np.float32))
    found = interpolated(values[ranks_of(len(values))], len(values))
    np.testing.assert_allclose(found, np.quantile(values.astype(np.float64), [0.01, 0.98]), atol=1e-3, rtol=1e-6)


def test_a_constant_image_becomes_0_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Enforces no NaN and no division by zero, and a warning with the channel."""
    values = image(2, 5, 5, 5)
    values[1] = -3
    with caplog.at_level(logging.WARNING):
        warn_of_constant("case 'a'", normalize_image(values))
    assert not values[1].any()
    assert values[0].max() == 1
    (line,) = caplog.messages
    assert line.startswith("case 'a': channel 1 has equal quantiles 0.01 and 0.98, as a constant image")
