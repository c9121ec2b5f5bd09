"""Paired differences over cases, and how sure their mean is."""

import math

import numpy as np
import pytest

from nnunet_norm.errors import EvaluationError
from nnunet_norm.evaluation import compare, per_case


def summary(ending=".nii.gz", metric="Dice", **cases):
    """A summary with the Dice of every class, or another metric, per case."""
    return {
        "metric_per_case": [
            {
                "prediction_file": f"/somewhere/{case}{ending}",
                "metrics": {label: {metric: value} for label, value in enumerate(values, 1)},
            }
            for case, values in cases.items()
        ]
    }


def of_values(values):
    return summary(**{f"case_{i:03d}": [value] for i, value in enumerate(values)})


def test_a_case_has_the_mean_of_its_foreground_classes():
    """Classes that it does not have are left out, and so are cases without any; keys may be text, as on the disk."""
    found = summary(a=[0.5, 0.7], b=[0.4, math.nan], c=[math.nan, math.nan], **{"d.e": [1.0]})
    assert per_case(found, "Dice") == pytest.approx({"a": 0.6, "b": 0.4, "d.e": 1.0})
    stored = {
        "metric_per_case": [{"prediction_file": "x.png", "metrics": {"0": {"Dice": 0.0}, "(1, 2)": {"Dice": 0.3}}}]
    }
    assert per_case(stored, "Dice") == {"x": 0.3}


def test_a_case_of_several_folds_has_their_mean():
    twice = {"metric_per_case": summary(a=[0.5])["metric_per_case"] + summary(a=[0.7], b=[0.1])["metric_per_case"]}
    assert per_case(twice, "Dice") == pytest.approx({"a": 0.6, "b": 0.1})


def test_a_metric_that_was_not_measured_is_refused():
    with pytest.raises(EvaluationError, match="'HD95' is not in the summary; choose from Dice"):
        per_case(summary(a=[1.0]), "HD95")


def test_differences_are_paired_and_first_minus_second():
    """Cases that only one has, or that have no value in one, are left out and counted."""
    first = summary(a=[0.9], b=[0.7], c=[0.5], d=[math.nan], only_here=[0.1])
    second = summary(a=[0.8], b=[0.8], c=[0.5], d=[0.3], only_there=[0.1])
    found = compare(first, second, "Dice")
    assert found.mean == pytest.approx(0.0, abs=1e-12)
    assert (found.num_cases, found.left_out, found.wins, found.losses) == (3, 3, 1, 1)
    assert compare(second, first, "Dice").low == pytest.approx(-found.high)


def test_distances_are_of_classes_that_both_found():
    """Who misses a class that is far off has no smaller distance by that, and wins where its distance is the smaller one."""
    first = summary(metric="HD95", a=[1.0, math.nan], b=[2.0, 3.0], c=[math.nan, 5.0], d=[math.nan, 1.0])
    second = summary(metric="HD95", a=[2.0, 90.0], b=[4.0, 2.0], c=[1.0, math.nan], d=[math.nan, 1.0])
    found = compare(first, second, "HD95")
    assert found.mean == pytest.approx((-1.0 - 0.5 + 0.0) / 3)
    assert (found.num_cases, found.left_out, found.partial) == (3, 1, 1)
    assert (found.wins, found.losses) == (2, 0)
    twice = {"metric_per_case": first["metric_per_case"][:1] + summary(metric="HD95", a=[3.0, 9.0])["metric_per_case"]}
    assert compare(twice, second, "HD95").mean == pytest.approx(0.0)


def test_a_class_that_is_made_up_counts_against_dice():
    """A class that is not there is 0 for who predicts it, as in nnU-Net, and no class is left out of overlaps."""
    found = compare(summary(a=[0.8, 0.0]), summary(a=[0.8, math.nan]), "Dice")
    assert (found.mean, found.partial, found.losses) == (pytest.approx(-0.4), 0, 1)


def test_interval_is_that_of_the_mean():
    """For many cases: the normal interval of a mean; wider for a higher level; the same in every call."""
    values = np.random.default_rng(1).normal(0.02, 0.1, 400)
    first, second = of_values(0.5 + values), of_values(np.full(400, 0.5))
    found = compare(first, second, "Dice")
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)
    assert found == compare(first, second, "Dice")
    wide = compare(first, second, "Dice", level=0.99)
    assert wide.low < found.low < found.high < wide.high


def test_interval_of_few_cases_against_all_resamples():
    """Three cases have 27 resamples, whose means can be listed."""
    values = [0.1, 0.2, 0.6]
    means = [np.mean([a, b, c]) for a in values for b in values for c in values]
    found = compare(of_values(values), of_values([0.0] * 3), "Dice", level=0.9)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=0.035)


def test_equal_summaries_differ_by_nothing():
    one = of_values([0.3, 0.9, 0.5])
    found = compare(one, one, "Dice")
    assert (found.mean, found.low, found.high, found.wins, found.losses) == (0, 0, 0, 0, 0)


def test_one_case_has_no_interval():
    found = compare(summary(a=[0.9]), summary(a=[0.7]), "Dice")
    assert found.mean == pytest.approx(0.2)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_summaries_without_a_common_case_are_refused():
    with pytest.raises(EvaluationError, match="no case has a Dice in both"):
        compare(summary(a=[0.9]), summary(b=[0.7]), "Dice")
