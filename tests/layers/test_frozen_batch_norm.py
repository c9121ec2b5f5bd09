"""FrozenBatchNorm: train mode is eval mode, in a network that is in the middle of its training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_norm.layers import FrozenBatchNorm, convert_norm, find_norms, plain_batch_statistics
from nnunet_norm.layers.plain import differs_from_batch_norm

SHAPES = [(3, 4, 7), (2, 4, 5, 6), (2, 4, 3, 4, 5)]


def drawn(affine=True):
    """Parameters and statistics other than ones and zeros."""
    torch.manual_seed(0)
    layer = FrozenBatchNorm(4, affine=affine)
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(4) + 0.5 if "var" in name else torch.randn(4))
    return layer


def trained_network():
    """A network, its optimizer with momentum, and a step that trains it."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def step(number):
        generator = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        network(torch.randn(4, 1, 8, 8, generator=generator) * 2 + 1).square().mean().backward()
        optimizer.step()

    return network.train(), optimizer, step


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_train_mode_is_eval_mode_to_the_last_bit(shape, affine):
    """Both are the closed form, forward and backward, and neither touches a buffer."""
    layer = drawn(affine)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(shape, requires_grad=True)
    wanted = [x, *layer.parameters()]
    out = torch.randn(shape)
    y = layer.train()(x)
    grads = torch.autograd.grad(y, wanted, out)
    evaluated = layer.eval()(x)
    assert torch.equal(y, evaluated)
    for mine, theirs in zip(grads, torch.autograd.grad(evaluated, wanted, out), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def along(vector):
        return vector.view(1, -1, *[1] * (x.dim() - 2))

    expected = (x - along(layer.running_mean)) / along(torch.sqrt(layer.running_var + layer.eps))
    expected = expected * along(layer.weight) + along(layer.bias) if affine else expected
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, out))


def test_state_dict_is_batch_norms_both_ways():
    for affine in (True, False):
        frozen, norm = FrozenBatchNorm(3, affine=affine), nn.BatchNorm2d(3, affine=affine)
        assert list(frozen.state_dict()) == list(norm.state_dict())
        frozen.load_state_dict(norm.state_dict())
        norm.load_state_dict(frozen.state_dict())


def test_it_is_no_batch_norm_that_ddp_would_convert():
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(FrozenBatchNorm(3)))[0]) is FrozenBatchNorm


def test_one_value_per_channel_is_enough():
    layer = drawn().train()
    assert torch.equal(layer(torch.ones(1, 4, 1, 1)), layer.eval()(torch.ones(1, 4, 1, 1)))


def test_freezing_in_the_middle_of_a_training_keeps_tensors_and_optimizer():
    """The very same parameters and buffers; the optimizer's momentum goes on as in a network that was frozen by hand."""
    (network, optimizer, step), (by_hand, other, step_by_hand) = trained_network(), trained_network()
    for number in range(3):
        step(number)
        step_by_hand(number)
    tensors = {name: value.data_ptr() for name, value in network.state_dict().items()}
    convert_norm(network, "frozen_batch_norm")
    assert {type(norm) for norm in find_norms(network).values()} == {FrozenBatchNorm}
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == tensors
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    network.train()
    for norm in find_norms(by_hand).values():
        norm.eval()
    for number in range(3, 6):
        step(number)
        step_by_hand(number)
    for mine, theirs in zip(network.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], other.state[theirs]["momentum_buffer"])
    assert all(torch.equal(value, buffers[name]) for name, value in network.named_buffers())


def test_plain_batch_statistics_are_batch_norms_for_a_while():
    """Inside, train mode normalizes by the batch, and eval mode does not; afterwards and after an error all is as before."""
    layer = drawn().train()
    x = torch.randn(3, 4, 5, 5) * 3 + 2
    frozen = layer(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    network = nn.Sequential(layer)
    assert differs_from_batch_norm(network)
    with plain_batch_statistics(network):
        assert torch.equal(network(x), F.batch_norm(x, None, None, layer.weight, layer.bias, True))
        network.eval()
        assert torch.equal(network(x), frozen)
        network.train()
    assert torch.equal(network(x), frozen)
    with pytest.raises(KeyError), plain_batch_statistics(network):
        raise KeyError
    assert torch.equal(network(x), frozen)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_train_mode_is_eval_mode_too(dtype):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), drawn())
    x = torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", dtype):
        y = network.train()(x)
        assert y.dtype == dtype
        assert torch.equal(y, network.eval()(x))
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()
    layer = drawn().train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    out = torch.randn(2, 4, 6, 5)
    wanted = [x, *layer.parameters()]
    mine, theirs = compiled(x), layer(x)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, wanted, out), torch.autograd.grad(theirs, wanted, out))
