"""Running statistics without their initial values: the average of the batches alone."""

from functools import partial

import pytest
import torch
from torch import nn

from nnunet_norm.layers import BatchRenorm2d, TrackedInstanceNorm2d
from nnunet_norm.training.initial_statistics import InitialStatistics


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, TrackedInstanceNorm2d, partial(BatchRenorm2d, momentum=0.1, r_max=1, d_max=0)]
)
def test_what_is_left_is_the_weighted_mean_of_the_batches(norm, steps):
    torch.manual_seed(0)
    layer = norm(2)
    layer.running_mean.fill_(50)
    layer.running_var.fill_(9)
    initial = InitialStatistics.of(layer)
    batches = [torch.randn(4, 2, 6, 6) * 2 + i for i in range(steps)]
    for batch in batches:
        layer(batch)
    initial.forget(steps)
    weights = torch.tensor([0.1 * 0.9 ** (steps - 1 - i) for i in range(steps)])
    means = torch.stack([b.mean((0, 2, 3)) for b in batches])
    torch.testing.assert_close(layer.running_mean, (weights / weights.sum()) @ means, rtol=1e-4, atol=1e-4)


def test_batch_renorm_and_norms_without_running_statistics_are_left_alone():
    layers = nn.Sequential(BatchRenorm2d(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.BatchNorm2d(2, momentum=None))
    assert InitialStatistics.of(layers).norms == ()


def test_a_shared_norm_is_corrected_once():
    norm = nn.BatchNorm2d(1)
    network = nn.Sequential(norm, nn.Sequential(norm))
    initial = InitialStatistics.of(network)
    norm(torch.ones(1, 1, 2, 2) * 4)
    initial.forget(1)
    assert norm.running_mean.item() == pytest.approx(4)


def test_a_variance_stays_a_variance():
    """Rounding is enlarged by 1 / (share of the batches): a constant channel must not come out negative."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(32, momentum=5e-4)
    initial = InitialStatistics.of(layer)
    for _ in range(2):
        layer(torch.randn(2, 32, 4, 4) * 1e-4)
    initial.forget(2)
    assert (layer.running_var >= 0).all()
    assert layer.eval()(torch.randn(2, 32, 4, 4)).isfinite().all()


def test_a_norm_with_two_names_is_corrected_once_after_its_conversion():
    """SyncBatchNorm has a module of its own for each name of a norm; the buffers are the same."""
    norm = nn.BatchNorm2d(1)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm, nn.Sequential(norm)))
    assert network[0] is not network[1][0]
    initial = InitialStatistics.of(network)
    network[0].running_mean.copy_(0.1 * torch.tensor([4.0]))  # one step with momentum 0.1
    initial.forget(1)
    assert network[0].running_mean.item() == pytest.approx(4)
