"""Dice, disparity and mismatch against values that can be counted by hand."""

import math

import numpy as np
import pytest
import torch

from nnunet_norm.metrics import (
    class_masks,
    compare_pair,
    dice,
    dice_counts,
    summarize,
    tile_mismatch,
    train_eval_disparity,
)


def logits_of(labels, num_classes):
    """Logits whose argmax is ``labels``."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels), num_classes).movedim(-1, 1).float() * 4 - 2


def test_dice_is_twice_the_intersection_over_the_sum():
    a = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]]], dtype=torch.bool)
    b = torch.tensor([[[0, 1, 1, 1], [0, 0, 0, 0]]], dtype=torch.bool)
    both = dice(a, b)
    assert both[0] == pytest.approx(4 / 6)
    assert math.isnan(both[1])


def test_dice_counts_of_batches_add_up_to_those_of_all():
    a, b = torch.rand(6, 3, 5, 4) > 0.5, torch.rand(6, 3, 5, 4) > 0.5
    assert torch.equal(dice_counts(a, b), dice_counts(a[:2], b[:2]) + dice_counts(a[2:], b[2:]))


def test_metrics_take_numpy_arrays():
    a = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    assert torch.equal(train_eval_disparity(a, a), torch.zeros(2, dtype=torch.double))


def test_labels_exclude_each_other_and_leave_background_out():
    masks = class_masks(logits_of([[0, 1, 2, 2]], 3))
    assert masks.int().tolist() == [[[0, 1, 0, 0], [0, 0, 1, 1]]]


def test_regions_overlap_and_are_cut_at_probability_one_half():
    logits = torch.tensor([[[0.1, -0.1, 3.0], [0.1, 0.1, -3.0]]])
    assert torch.equal(class_masks(logits, regions=True), torch.sigmoid(logits) > 0.5)


def test_disparity_is_one_minus_dice_per_class():
    train, evaluated = logits_of([[1, 1, 2, 0]], 4), logits_of([[1, 0, 2, 2]], 4)
    disparity = train_eval_disparity(train, evaluated)
    assert disparity[:2].tolist() == pytest.approx([1 - 2 / 3, 1 - 2 / 3])
    assert math.isnan(disparity[2])


def test_no_pair_is_not_measured_and_never_no():
    mismatch = tile_mismatch([])
    assert (mismatch.max_dist, mismatch.num_pairs, mismatch.verdict) == (None, 0, "not measured")


def test_equal_pairs_are_reported_as_no():
    a = torch.randn(3, 4, 4)
    mismatch = tile_mismatch([(a, a.clone())])
    assert (mismatch.max_dist, mismatch.verdict) == (0.0, "no")


def test_rounding_is_named_as_such():
    a = torch.randn(3, 16, 16)
    mismatch = tile_mismatch([(a, a * (1 + 2e-7))])
    assert 0 < mismatch.max_dist < 1e-5
    assert mismatch.verdict == f"no (float32 rounding, {mismatch.max_dist:.1e})"


def test_a_real_difference_is_a_number():
    a = torch.zeros(2, 3, 3)
    b = a.clone()
    b[1, 0, 0] = -19.25
    mismatch = tile_mismatch([(a, a), (a, b)])
    assert (mismatch.max_dist, mismatch.verdict) == (19.25, "19.2")


def test_the_same_difference_is_rounding_in_single_and_not_in_double_precision():
    a = torch.ones(2, 3, 3, dtype=torch.double)
    assert tile_mismatch([(a.float(), a.float() + 1e-6)]).is_rounding
    assert not tile_mismatch([(a, a + 1e-6)]).is_rounding


def test_mismatch_is_the_median_over_pairs_that_contain_the_class():
    same = logits_of([[1, 1]], 3)[0]
    half = logits_of([[1, 0]], 3)[0]
    none = logits_of([[0, 0]], 3)[0]
    mismatch = tile_mismatch([(same, same), (same, half), (same, none), (none, none)])
    assert mismatch.per_class[0] == pytest.approx(1 - 2 / 3)
    assert math.isnan(mismatch.per_class[1])


def test_a_logit_that_is_not_finite_does_not_hide():
    a = torch.zeros(2, 3, 3)
    b = a.clone()
    b[0, 0, 0] = float("nan")
    for pairs in ([(a, b), (a, a)], [(a, a), (a, b)]):
        assert tile_mismatch(pairs).verdict == "nan"


def test_half_precision_is_judged_by_its_own_rounding():
    a = torch.full((2, 3, 3), 8.0)
    pair = compare_pair(a, a + 0.03, dtype=torch.float16)
    assert summarize([pair]).verdict == "no (float16 rounding, 3.0e-02)"
    assert summarize([compare_pair(a, a + 0.03)]).verdict == "0.03"
    assert not summarize([compare_pair(a, a + 0.5, dtype=torch.float16)]).is_rounding
