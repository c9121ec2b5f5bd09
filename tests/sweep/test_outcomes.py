import math

import pytest

from nnunet_norm.sweep.outcomes import Spread, Tiles


@pytest.mark.parametrize(
    ("values", "mean", "deviation", "count"),
    [
        ([1.0, 2.0, 3.0], 2.0, 1.0, 3),
        ([1.0, math.nan, 2.0], 1.5, math.sqrt(0.5), 2),
        ([4.0], 4.0, math.nan, 1),
        ([math.nan], math.nan, math.nan, 0),
        ([], math.nan, math.nan, 0),
    ],
)
def test_spread_is_that_of_a_sample(values: list[float], mean: float, deviation: float, count: int) -> None:
    """Enforces the standard deviation with n - 1, none of one fold, and that folds without a value do not count."""
    found = Spread.of(values)
    assert (found.mean, found.deviation) == pytest.approx((mean, deviation), nan_ok=True)
    assert found.count == count


def test_what_was_not_measured_is_not_zero() -> None:
    """Enforces NaN for null in norm_report.json, whole or class by class, and for a report without the part."""
    part = {"per_class": {"1": 0.25, "2": None, "3": 0.75}, "max_dist": None, "verdict": "not measured"}
    assert Tiles.of(part).mismatch == 0.5
    assert math.isnan(Tiles.of(part).max_dist)
    assert repr(Tiles.of({})) == "Tiles(mismatch=nan, max_dist=nan, verdict='not measured')"
