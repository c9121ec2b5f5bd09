import math

import pytest
import torch

from nnunet_norm.metrics import TileMismatch
from nnunet_norm.training.patches import foreground_of, foreground_patches, whole_batches
from nnunet_norm.training.reporting import mismatch_as_dict, named


def test_foreground_is_what_wins_against_background():
    """Of labels any class above background; of regions any that is there at all."""
    logits = torch.tensor([[1.0, -1.0, 2.0], [0.0, -0.5, 3.0], [-1.0, -2.0, -1.0]])
    assert foreground_of(logits, regions=False).tolist() == [False, True, True]
    assert foreground_of(logits, regions=True).tolist() == [True, False, True]


@pytest.mark.parametrize("size", [(4, 4, 4), (4, 4), (4, 16, 4)])
def test_patches_lie_around_foreground(size):
    """Each holds the one foreground voxel; what lies outside of the image is zero; a 2d patch is one of its slice."""
    image = torch.zeros(1, 8, 9, 10)
    image[0, 6, 7, 2] = 5.0
    patches = foreground_patches(image, image[0] > 0, 3, size)
    assert [tuple(patch.shape) for patch in patches] == [(1, *size)] * 3
    assert all(patch.sum() == 5 for patch in patches)


def test_without_foreground_patches_are_spread_over_the_image():
    """The first begins near one end, the last near the other."""
    image = torch.arange(100.0).reshape(1, 100, 1, 1)
    patches = foreground_patches(image, torch.zeros(100, 1, 1, dtype=torch.bool), 2, (4, 1, 1))
    assert [patch.mean().item() for patch in patches] == [24.5, 74.5]


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(2, [[0, 10], [20, 1]]), (4, [[0, 10, 20, 1]]), (9, [[0, 10, 20, 1, 2]])]
)
def test_batches_are_whole_and_of_many_cases(batch_size, expected):
    """One patch of every case in turn; the rest is left out, unless it is all there is."""
    of_cases = [[torch.tensor([float(v)]) for v in values] for values in ([0, 1, 2], [10], [20])]
    batches = [batch.flatten().tolist() for batch in whole_batches(of_cases, batch_size, 2)]
    assert batches == expected
    assert not list(whole_batches([], batch_size, 2))


def test_what_is_not_there_is_null():
    """NaN and missing values, by name."""
    assert named(["a", "b"], [math.nan, 0.5]) == {"a": None, "b": 0.5}
    assert mismatch_as_dict(["a", "b"], TileMismatch((), None, 0.0, 0, "float32")) == {
        "per_class": {"a": None, "b": None},
        "max_dist": None,
        "verdict": "not measured",
        "max_logit": 0.0,
        "num_pairs": 0,
    }
