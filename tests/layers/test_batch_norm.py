"""BatchNorm of this package: torch's, in one process to the last bit, but for what is not finite."""

import pytest
import torch
from torch import nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import BatchNorm2d, BatchNorm3d, BatchRenorm2d, BatchRenorm3d, differs_from_batch_norm
from nnunet_norm.stages.graph import operator_of
from nnunet_norm.stages.operators import Pointwise

CLASSES = {2: (BatchNorm2d, nn.BatchNorm2d), 3: (BatchNorm3d, nn.BatchNorm3d)}


def pair(ndim, **options):
    mine, theirs = (kind(3, **options) for kind in CLASSES[ndim])
    if mine.affine:
        nn.init.uniform_(theirs.weight, 0.5, 2)
        nn.init.uniform_(theirs.bias, -1, 1)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
@pytest.mark.parametrize("ndim", CLASSES)
def test_it_is_torchs(ndim, momentum, affine):
    """Outputs, gradients and buffers in train mode, then eval mode; the plain mean of all batches to rounding."""
    torch.manual_seed(0)
    mine, theirs = pair(ndim, momentum=momentum, affine=affine)
    tolerance = {"rtol": 0, "atol": 0} if momentum is not None else {"rtol": 1e-5, "atol": 1e-5}
    for step in range(3):
        x = torch.randn(4, 3, *[5, 4, 3][:ndim]) * (step + 1) + step
        found = []
        for norm in (mine, theirs):
            own = x.clone().requires_grad_()
            y = norm(own)
            gradients = torch.autograd.grad((y**3).sum(), [own, *norm.parameters()])
            found.append([y, *gradients, *norm.buffers()])
        torch.testing.assert_close(found[0], found[1], **tolerance)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), **tolerance)


def test_state_dicts_go_both_ways():
    for mine, theirs in (pair(2), pair(3, affine=False)):
        assert list(mine.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(mine.state_dict())


def test_it_is_no_batch_renorm_and_none_that_ddp_would_convert():
    """And it normalizes by the batch alone."""
    norm = BatchNorm3d(3)
    assert not isinstance(norm, (BatchRenorm2d, BatchRenorm3d))
    assert not differs_from_batch_norm(norm)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))[0]) is BatchNorm3d
    assert repr(norm).startswith("BatchNorm3d(3, eps=1e-05, momentum=0.1, affine=True")
    assert repr(norm).endswith("sync='full')")
    assert "r_max" not in repr(norm)


def test_networks_with_it_are_run_block_by_block():
    """Prediction by stages knows it as a norm with stored statistics."""
    assert isinstance(operator_of(BatchNorm2d(3), 2), Pointwise)


def test_a_batch_that_is_not_finite_is_not_taken_in():
    norm = BatchNorm2d(3)
    norm(torch.full((2, 3, 4, 4), torch.nan))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(3))


def test_refusals_name_what_they_got():
    with pytest.raises(LayerError, match="sync='all': choose from running, full, none"):
        BatchNorm2d(3, sync="all")
    with pytest.raises(LayerError, match=r"expected 4D input \(N, C, \*spatial\), got 5D"):
        BatchNorm2d(3)(torch.zeros(2, 3, 4, 4, 4))
    with pytest.raises(LayerError, match=r"more than 1 value per channel when training, got input size \(1, 3, 1, 1\)"):
        BatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
