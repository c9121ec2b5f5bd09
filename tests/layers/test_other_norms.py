"""GroupNorm by group size, and InstanceNorm with running statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import GroupNorm, TrackedInstanceNorm2d, TrackedInstanceNorm3d, group_count


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(128, 8), (256, 16), (320, 20), (32, 2), (16, 1), (8, 1), (1, 1), (40, 2), (17, 1), (36, 2)],
)
def test_group_count_of_the_rule_half_or_16(channels, groups):
    assert group_count(channels, 16) == groups


@given(channels=st.integers(1, 600), size=st.integers(1, 64))
def test_groups_divide_the_channels_and_none_is_smaller_than_asked(channels, size):
    groups = group_count(channels, size)
    assert channels % groups == 0
    assert channels // groups >= min(size, channels)
    smaller = [d for d in range(min(size, channels), channels // groups) if channels % d == 0]
    assert not smaller


def test_group_norm_is_torchs_with_the_channels_first():
    x = torch.randn(2, 32, 4, 4, 4)
    assert torch.equal(GroupNorm(32, eps=1e-3)(x), nn.GroupNorm(2, 32, eps=1e-3)(x))
    assert list(GroupNorm(32).state_dict()) == ["weight", "bias"]
    assert list(GroupNorm(32, affine=False).state_dict()) == []


def test_channels_below_one_are_refused():
    with pytest.raises(LayerError, match="num_channels=0"):
        GroupNorm(0)
    with pytest.raises(LayerError, match="group_size=-4"):
        GroupNorm(8, -4)


@pytest.mark.parametrize(
    ("layer", "shape", "batch_norm"),
    [
        (TrackedInstanceNorm2d, (3, 4, 5, 6), nn.functional.batch_norm),
        (TrackedInstanceNorm3d, (3, 4, 5, 6, 2), nn.functional.batch_norm),
    ],
)
def test_tracked_instance_norm_trains_per_sample_and_predicts_with_running_statistics(layer, shape, batch_norm):
    norm = layer(shape[1])
    x = torch.randn(shape) * 3 + 2
    torch.testing.assert_close(norm(x), nn.functional.instance_norm(x))
    expected = batch_norm(x, norm.running_mean, norm.running_var)
    torch.testing.assert_close(norm.eval()(x), expected)
    assert list(norm.state_dict()) == list(nn.BatchNorm3d(4).state_dict())
