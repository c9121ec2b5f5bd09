"""Disparity of a network on a batch: right, and without a trace in the network."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

from nnunet_norm.layers import BatchRenorm2d, TrackedInstanceNorm2d
from nnunet_norm.metrics import train_eval_disparity
from nnunet_norm.statistics.modes import norms_in_train_mode
from nnunet_norm.training.disparity import Disparity, DisparityCounts, default_disparity_batches, measure_disparity


def network(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.Dropout(0.5), nn.LeakyReLU(), nn.Conv2d(8, 3, 1)]
    net = nn.Sequential(*layers)
    for _ in range(3):
        net(torch.randn(4, 1, 8, 8))
    return net.eval()


def traces(net):
    """Everything that a measurement could leave behind."""
    flags = [m.training for m in net.modules()]
    return flags, {k: (v.data_ptr(), v.clone()) for k, v in net.state_dict().items()}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, TrackedInstanceNorm2d, BatchRenorm2d, nn.InstanceNorm2d])
def test_a_measurement_leaves_the_network_as_it_was_to_the_last_bit(norm):
    net = network(norm)
    flags, state = traces(net)
    measure_disparity(net, torch.randn(4, 1, 8, 8) * 5 + 3, regions=False)
    after_flags, after = traces(net)
    assert after_flags == flags
    for key, (pointer, value) in state.items():
        assert after[key][0] == pointer
        assert torch.equal(after[key][1], value)


def test_the_modes_are_restored_after_an_error():
    net = network(nn.BatchNorm2d)
    flags, state = traces(net)
    with contextlib.suppress(KeyError), norms_in_train_mode(net):
        net(torch.randn(2, 1, 8, 8))
        raise KeyError
    assert traces(net)[0] == flags
    assert torch.equal(net.state_dict()["1.running_mean"], state["1.running_mean"][1])


def test_disparity_compares_norms_in_train_and_eval_mode_and_never_switches_dropout_on():
    net = network(nn.BatchNorm2d)
    x = torch.randn(4, 1, 8, 8) * 5 + 3
    evaluated = net(x)
    other = copy.deepcopy(net)
    other[1].train()
    expected = train_eval_disparity(other(x), evaluated)
    torch.testing.assert_close(
        torch.tensor(Disparity.of(measure_disparity(net, x, regions=False)).per_class, dtype=torch.double), expected
    )
    assert expected.max() > 0.05


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, lambda c: nn.GroupNorm(2, c), lambda c: nn.Identity()])
def test_norms_without_modes_have_no_disparity(norm):
    disparity = Disparity.of(measure_disparity(network(norm), torch.randn(4, 1, 8, 8), regions=False))
    assert disparity.per_class == [0, 0]
    assert disparity.batch_statistics == []
    assert math.isnan(disparity.clipped)


def test_an_open_brn_has_no_disparity_and_its_plain_batch_statistics_do():
    net = network(lambda c: BatchRenorm2d(c, r_max=1e6, d_max=1e6, warmup_steps=0, ramp_steps=0))
    disparity = Disparity.of(measure_disparity(net, torch.randn(4, 1, 8, 8) * 5 + 3, regions=False))
    assert max(disparity.per_class) == 0
    assert max(disparity.batch_statistics) > 0.05
    assert disparity.clipped == 0
    assert disparity.abs_log_r > 1


def test_clipped_channels_are_counted():
    net = network(lambda c: BatchRenorm2d(c, r_max=1.5, d_max=0.5, warmup_steps=0, ramp_steps=0))
    disparity = Disparity.of(measure_disparity(net, torch.randn(4, 1, 8, 8) * 5 + 3, regions=False))
    assert disparity.clipped == 1


def test_counts_of_batches_and_processes_add_up():
    net = network(nn.BatchNorm2d)
    batches = torch.randn(3, 2, 1, 8, 8) * 3
    counts = [measure_disparity(net, batch, regions=False) for batch in batches]
    total = sum(counts, DisparityCounts())
    assert total.num_batches == 3
    assert torch.equal(total.train, sum(c.train for c in counts))


def test_a_deep_supervision_network_is_measured_at_full_resolution():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(nn.BatchNorm2d)

        def forward(self, x):
            y = self.net(x)
            return [y, y[..., ::2, ::2]]

    two = Two().eval()
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(
        measure_disparity(two, x, regions=False).train, measure_disparity(two.net, x, regions=False).train
    )


@pytest.mark.parametrize(("iterations", "validation", "batches"), [(250, 50, 5), (100, 20, 4), (20, 5, 1), (1, 1, 1)])
def test_the_default_keeps_within_its_share_of_an_epoch(iterations, validation, batches):
    assert default_disparity_batches(iterations, validation) == batches
    if batches > 1:
        assert 4 * batches <= 0.05 * (3 * iterations + validation)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sync_batch_norm_need_not_wait_for_other_processes(process_group):
    """Ranks validate different numbers of cases: a collective in the measurement would hang. On the CPU it raises."""
    x = torch.randn(4, 1, 8, 8)
    expected = measure_disparity(network(nn.BatchNorm2d), x, regions=False)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network(nn.BatchNorm2d)).eval()
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        measure_disparity(net, x, regions=False)
    flags, state = traces(net)
    assert torch.equal(measure_disparity(net, x, regions=False, across_processes=False).train, expected.train)
    assert traces(net)[0] == flags
    assert all(torch.equal(value, state[key][1]) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        measure_disparity(net, x, regions=False)


def test_sync_batch_norm_beside_batch_renorm_need_not_wait_either(process_group):
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.SyncBatchNorm(4), BatchRenorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    measure_disparity(net, torch.randn(2, 1, 4, 4), regions=False, across_processes=False)
