import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_norm.stages.moments import ChannelMoments


def split(values, cuts):
    """The tensor in pieces along its last axis, at the given shares of its extent."""
    n = values.shape[-1]
    places = sorted({round(share * n) for share in cuts} - {0, n})
    return torch.tensor_split(values, places, dim=-1)


def moments_of(parts):
    moments = ChannelMoments()
    for part in parts:
        moments.add(part)
    return moments.mean_and_var()


CUTS = st.lists(st.floats(0, 1), max_size=12)


@given(CUTS, st.sampled_from([(1, 3, 50), (1, 2, 5, 40), (2, 3, 3, 4, 30)]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_moments_are_those_of_everything_however_it_is_split(cuts, shape, seed):
    """Mean and biased variance in float64 are torch's of all values at once, for any split into blocks."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 - 1
    mean, var = moments_of(split(values, cuts))
    expected_var, expected_mean = torch.var_mean(values, [0, *range(2, values.ndim)], correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(var, expected_var, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize(
    "cuts", [(), (0.1, 0.5), tuple(i / 64 for i in range(64))], ids=["whole", "3 parts", "64 parts"]
)
def test_a_mean_that_is_large_against_the_deviation_loses_no_digits(offset, layout, cuts):
    """Of float32 values the moments are those of float64 arithmetic, up to the rounding of a block's mean.

    A sum of squares would be wrong in the variance's first digit at the largest offset: 1e8 is rounded to 8.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((1, 2, 64, 1024), generator=generator) + torch.tensor([offset, -2 * offset]).view(1, 2, 1, 1)
    if layout == "channels last":
        values = values.to(memory_format=torch.channels_last)
    mean, var = moments_of(split(values, cuts))
    expected_var, expected_mean = torch.var_mean(values.double(), [0, 2, 3], correction=0)
    assert mean.dtype == var.dtype == torch.float64
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, expected_var, rtol=1e-6 + offset * 1e-7, atol=0)


def test_half_precision_values_are_added_up_in_single_precision_at_least():
    """Of bfloat16 values the moments are those of float64 arithmetic on them, not of bfloat16 arithmetic."""
    values = (torch.randn((1, 2, 64, 64), generator=torch.Generator().manual_seed(0)) + 8).bfloat16()
    mean, var = moments_of(split(values, (0.3, 0.6)))
    expected_var, expected_mean = torch.var_mean(values.double(), [0, 2, 3], correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var, expected_var, rtol=1e-5, atol=0)


def test_constant_values_have_no_variance():
    """A channel that is the same everywhere has its value for a mean, and a variance that no eps of a norm notices."""
    mean, var = moments_of(split(torch.full((1, 1, 8, 100), 0.1), (0.2, 0.21, 0.9)))
    torch.testing.assert_close(mean, torch.tensor([0.1]).double(), rtol=1e-5, atol=0)
    assert 0 <= var.item() < 1e-11
