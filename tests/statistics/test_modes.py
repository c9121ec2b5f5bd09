"""norms_in_train_mode: norms in train mode, all else as it was; afterwards no trace of it."""

import contextlib

import pytest
import torch
from torch import nn

from nnunet_norm.layers import (
    BatchRenorm2d,
    FrozenBatchNorm,
    GhostBatchNorm2d,
    GroupNorm,
    TrackedInstanceNorm2d,
    find_norms,
)
from nnunet_norm.statistics import norms_in_train_mode

KINDS = [nn.BatchNorm2d, BatchRenorm2d, GhostBatchNorm2d, FrozenBatchNorm, TrackedInstanceNorm2d]
KINDS += [nn.SyncBatchNorm, nn.InstanceNorm2d, GroupNorm]


def network():
    """One norm of every kind, with statistics of its own, in mixed modes; dropout beside."""
    torch.manual_seed(0)
    net = nn.Sequential(*(kind(4) for kind in KINDS), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).eval()
    for norm in find_norms(net).values():
        for name, buffer in norm.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(4) + (0.5 if "var" in name else 0))
    net[1].train()
    return net


def traces(net):
    """Everything that may be left behind."""
    flags = [module.training for module in net.modules()]
    forwards = [dict(vars(module)).get("forward") for module in net.modules()]
    syncs = [getattr(module, "sync", None) for module in net.modules()]
    return (flags, forwards, syncs), {
        name: (value.data_ptr(), value.clone()) for name, value in net.state_dict().items()
    }


def assert_no_trace(net, before):
    after = traces(net)
    assert after[0] == before[0]
    for name, (pointer, value) in after[1].items():
        assert pointer == before[1][name][0]
        assert torch.equal(value, before[1][name][1])


def test_only_norms_are_in_train_mode_inside():
    net = network()
    with norms_in_train_mode(net):
        assert all(norm.training for norm in find_norms(net).values())
        assert not net.training
        assert not any(module.training for module in net[len(KINDS) :])


@pytest.mark.parametrize("across_processes", [True, False])
@pytest.mark.parametrize("ending", ["done", "an error"])
def test_no_trace_is_left(ending, across_processes):
    """Flags, buffers (their tensors too), forward methods and synchronization."""
    net = network()
    before = traces(net)
    kinds = [module for module in net if across_processes is False or not isinstance(module, nn.SyncBatchNorm)]
    with contextlib.suppress(KeyError), norms_in_train_mode(net, across_processes=across_processes):
        nn.Sequential(*kinds)(torch.randn(3, 4, 6, 6))
        assert not torch.equal(net[0].running_mean, before[1]["0.running_mean"][1])
        if ending == "an error":
            raise KeyError
    assert_no_trace(net, before)


def test_batch_norm_normalizes_by_the_batch_inside():
    norm = nn.BatchNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4) * 3 + 1
    with norms_in_train_mode(nn.Sequential(norm)):
        assert torch.equal(norm(x), nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True))
    assert torch.equal(norm(x), nn.BatchNorm2d(3).eval()(x))


@pytest.fixture
def group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_norm_is_as_if_alone_without_other_processes(group_of_one):
    """No norm is told to synchronize, and SyncBatchNorm, which the CPU does not have, is BatchNorm."""
    net, x = network(), torch.randn(3, 4, 6, 6)
    with norms_in_train_mode(net, across_processes=False):
        assert {str(norm.sync) for norm in find_norms(net).values() if hasattr(norm, "sync")} == {"none", "False"}
        synchronized = net[KINDS.index(nn.SyncBatchNorm)]
        expected = nn.functional.batch_norm(x, None, None, synchronized.weight, synchronized.bias, True)
        assert torch.equal(synchronized(x), expected)
    with norms_in_train_mode(net), pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        synchronized(x)
