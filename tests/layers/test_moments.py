"""Merging: count, mean and variance of parts are those of everything, to the accuracy of float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_norm.layers.moments import merge, num_processes

SETTINGS = settings(max_examples=60, deadline=None)


def moments_of(parts):
    """Counts, means, biased variances; an empty part has zeros."""
    counts = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    means = torch.stack([part.mean(0) if len(part) else part.new_zeros(part.shape[1]) for part in parts])
    variances = [part.var(0, correction=0) if len(part) else part.new_zeros(part.shape[1]) for part in parts]
    return counts, means, torch.stack(variances)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9).filter(any), st.floats(-1e6, 1e6), st.integers(0, 99))
@SETTINGS
def test_merged_moments_are_those_of_all_values(sizes, offset, seed):
    """For any sizes, empty parts too, and means that are up to a million deviations away from zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) + offset
    number, mean, var = merge(*moments_of(values.split(sizes)))
    assert number == sum(sizes)
    torch.testing.assert_close(mean, values.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, values.var(0, correction=0), rtol=1e-8, atol=1e-9)


def test_a_sum_of_squares_would_lose_what_merging_keeps():
    """Deviation 1e-3 at a mean of 1e6: E[x^2] - E[x]^2 has no digit of the variance left in float64."""
    values = torch.randn(4, 500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 1e6
    parts = list(values)
    expected = (values - 1e6).flatten(0, 1).var(0, correction=0)
    torch.testing.assert_close(merge(*moments_of(parts)).var, expected, rtol=1e-5, atol=0)
    squares = torch.stack([part.square().mean(0) for part in parts]).mean(0)
    assert not torch.isclose(squares - values.flatten(0, 1).mean(0).square(), expected, rtol=0.1).all()


@given(st.permutations(range(4)))
@SETTINGS
def test_the_order_of_the_parts_does_not_matter(order):
    """Nor does merging in two steps."""
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = values.split([3, 0, 10, 7])
    expected = merge(*moments_of(parts))
    first = merge(*moments_of([parts[i] for i in order[:3]])) if order[:3] != [1] else None
    last = moments_of([parts[order[3]]])
    assert first is not None
    both = [torch.cat([a[None], b]) for a, b in zip(first, last, strict=True)]
    for mine, theirs in zip(merge(*both), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("place", ["mean", "variance"])
def test_a_part_that_is_not_finite_is_not_hidden(place):
    counts, means, variances = moments_of(torch.ones(6, 2, dtype=torch.float64).split([2, 4]))
    (means if place == "mean" else variances)[1, 0] = torch.nan
    assert merge(counts, means, variances).var.isnan().tolist() == [True, False]


def test_there_is_one_process_without_a_group():
    assert num_processes() == 1
