"""Activation checkpointing: same outputs and gradients, less kept, nothing else different."""

import copy
import gc

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from torch import nn

from nnunet_norm.errors import ArchitectureError, LayerError
from nnunet_norm.layers import checkpoint_stages, convert_norm, fit_for_steps, one_step, tracking_norms
from nnunet_norm.receptive_field.trace import trace
from nnunet_norm.stages.graph import read_network

KINDS = {PlainConvUNet: "n_conv_per_stage", ResidualEncoderUNet: "n_blocks_per_stage"}
SEGMENTS = {PlainConvUNet: 3 + 2 * 2, ResidualEncoderUNet: 1 + 3 + 2}
every_kind = pytest.mark.parametrize("kind", KINDS)


def unet(kind=PlainConvUNet, dropout=0.0):
    torch.manual_seed(0)
    return kind(
        *(1, 3, (4, 6, 8), nn.Conv2d, 3, (1, 2, 2)),
        **{KINDS[kind]: 2},
        num_classes=3,
        n_conv_per_stage_decoder=2 if kind is PlainConvUNet else 1,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True},
        dropout_op=nn.Dropout2d if dropout else None,
        dropout_op_kwargs={"p": dropout},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    ).double()


def image(samples=3, extent=16):
    return torch.randn(samples, 1, extent, extent, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(network, x):
    network.zero_grad()
    sum((output**3).mean() for output in network(x)).backward()
    return [p.grad for p in network.parameters()]


def kept_by(forward):
    """Bytes that the graph of what ``forward`` returns holds, parameters included."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        returned = forward()
    del returned
    return sum(seen.values())


@every_kind
def test_gradients_are_the_same_and_less_is_kept(kind):
    """To the last bit, dropout included, and after a retained graph has been used twice."""
    network, x = unet(kind, dropout=0.3), image()
    network.train()
    torch.manual_seed(7)
    expected = [g.clone() for g in gradients(network, x)]
    before = kept_by(lambda: network(x))
    assert checkpoint_stages(network) == SEGMENTS[kind]
    assert checkpoint_stages(network) == SEGMENTS[kind]
    torch.manual_seed(7)
    for mine, theirs in zip(gradients(network, x), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert kept_by(lambda: network(x)) < 0.65 * before
    network.zero_grad()
    torch.manual_seed(7)
    loss = sum((output**3).mean() for output in network(x))
    loss.backward(retain_graph=True)
    loss.backward()
    for parameter, theirs in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * theirs, rtol=1e-12, atol=1e-12)


@every_kind
def test_the_network_is_otherwise_what_it_was(kind):
    """State dict, modules, receptive field, graph of operators, outputs in eval mode and without gradients."""
    plain, network, x = unet(kind), unet(kind), image()
    checkpoint_stages(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert repr(network) == repr(plain)
    for mine, theirs in zip(network.eval()(x), plain.eval()(x), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert torch.equal(network.train()(x)[0], plain.train()(x)[0])
    for module in (network, plain):
        module.decoder.deep_supervision = False
    assert trace(network) == trace(plain)
    assert [(node.name, node.inputs) for node in read_network(network).nodes] == [
        (node.name, node.inputs) for node in read_network(plain).nodes
    ]


def test_a_copy_runs_itself():
    """Not the stages of the network that it was copied from, which is free to go."""
    network = unet().train()
    checkpoint_stages(network)
    other, x = copy.deepcopy(network), image()
    expected = [g.clone() for g in gradients(network, x)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    del network
    gc.collect()
    for mine, theirs in zip(gradients(other, x), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("norm", ["batch_renorm", "batch_norm", "ghost_batch_norm", "instance_norm_tracked"])
def test_running_statistics_advance_once_though_the_forward_runs_twice(norm):
    """And gradients are those without checkpointing, while BatchRenorm's limits open; so they are under autocast."""
    options = {"warmup_steps": 0, "ramp_steps": 2, "momentum": 0.3} if norm == "batch_renorm" else {}
    plain, network = (fit_for_steps(convert_norm(unet(), norm, **options)).train() for _ in range(2))
    checkpoint_stages(network)
    for step in range(3):
        x = image() * (step + 1) + step
        found = []
        for module in (plain, network):
            with one_step(module), torch.autocast("cpu", torch.bfloat16, enabled=step == 2):
                found.append([g.clone() for g in gradients(module, x)])
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(tracking_norms(network), tracking_norms(plain), strict=True):
            for name, buffer in mine.named_buffers():
                assert torch.equal(buffer, getattr(theirs, name))
            assert mine.num_batches_tracked == (0 if norm == "instance_norm_tracked" else step + 1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: fit_for_steps(convert_norm(unet(), "batch_norm")), r"run the step inside one_step\(network\)"),
        (lambda: convert_norm(unet(), "batch_norm"), r"torch's BatchNorm2d\) updates .* call fit_for_steps\(network\)"),
    ],
)
def test_a_backward_pass_that_would_count_twice_is_refused(network, message):
    network = network().train()
    checkpoint_stages(network)
    loss = network(image())[0].sum()
    with pytest.raises(LayerError, match=message):
        loss.backward()


def test_networks_without_stages_are_refused():
    encoder = PlainConvEncoder(1, 2, (4, 6), nn.Conv2d, 3, (1, 2), 1)
    for network in (nn.Sequential(nn.Conv2d(1, 2, 3)), encoder):
        message = rf"encoder.stages and decoder.stages, which {type(network).__name__} does not have: leave it out, or"
        with pytest.raises(ArchitectureError, match=message):
            checkpoint_stages(network)
        assert all("forward" not in module.__dict__ for module in network.modules())
