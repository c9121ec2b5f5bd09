from dataclasses import replace

import pytest
import torch
from stage_networks import NORMS, Design, randomized
from torch import nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.receptive_field import trace
from nnunet_norm.stages import read_network, read_verified, verify
from nnunet_norm.stages.operators import Concatenation, Pointwise

D2 = ((1, 1), (2, 2), (2, 2))
DESIGN = Design(D2, blocks=2)


@pytest.mark.parametrize("norm", NORMS)
def test_stock_networks_are_accepted(norm):
    """Six stages of nnU-Net's two architectures, with every norm, as they are initialized, in single precision."""
    strides = ((1, 1), *[(2, 2)] * 5)
    for kind in ("plain", "residual encoder"):
        network = Design(strides, kind=kind, norm=norm).build().float()
        if norm not in ("none", "InstanceNorm without affine"):  # which nnU-Net's initialization does not expect
            network.apply(network.initialize)
        graph = read_verified(network, trace(network))
        assert graph.stride == (32, 32)


def test_verifying_leaves_the_network_as_it_was():
    """Training flags, weights, statistics and the random state are untouched."""
    network = replace(DESIGN, dropout=True).build().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    read_verified(network, trace(network))
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def other_weights(graph):
    return read_network(DESIGN.build(seed=1))


def other_depth(graph):
    return read_network(Design(((1, 1), (2, 2))).build())


def other_kernel(graph):
    return read_network(replace(DESIGN, kernels=5).build())


def other_order(graph):
    """The two maps of every concatenation exchanged: same channels, same reach."""
    nodes = [
        replace(node, inputs=node.inputs[::-1]) if isinstance(node.operator, Concatenation) else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def without_a_nonlinearity(graph):
    number = max(i for i, node in enumerate(graph.nodes) if isinstance(node.operator, Pointwise))
    nodes = list(graph.nodes)
    nodes[number] = replace(nodes[number], operator=Pointwise(lambda x: x))
    return replace(graph, nodes=tuple(nodes))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (other_weights, r"run stage by stage it gives another result \(difference [\d.]+\)"),
        (other_order, "run stage by stage it gives another result"),
        (without_a_nonlinearity, "run stage by stage it gives another result"),
        (other_depth, r"its stages have stride, reach and norms \(\(2, 2\), .* and it has \(\(4, 4\),"),
        (other_kernel, r"its stages have stride, reach and norms .*\(30, 27\).* and it has .*\(15, 12\)"),
    ],
)
def test_a_graph_that_is_not_the_network_is_refused(monkeypatch, changed, reason):
    """Other strides, reach, wiring, weights or nonlinearities than the module's are noticed, whatever read them."""
    network = DESIGN.build()
    field = trace(network)
    graph = changed(read_network(network))
    monkeypatch.setattr(verify, "read_network", lambda _: graph)
    with pytest.raises(ArchitectureError, match=reason) as caught:
        read_verified(network, field)
    assert "\n" not in str(caught.value)


class Doubled(nn.GroupNorm):
    """A GroupNorm with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Blurred(nn.BatchNorm2d):
    """A BatchNorm that looks at neighbours."""

    def forward(self, x):
        return nn.functional.avg_pool2d(super().forward(x), 3, 1, 1)


def untracked():
    """BatchNorm uses the statistics that it has whatever its flag says; in eval mode, that is."""
    norm = nn.BatchNorm2d(2)
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Doubled(1, 2), "1 has no rule for blocks: a norm of class Doubled"),
        (Blurred(2), "1 has no rule for blocks: a norm of class Blurred"),
        (untracked(), "reach and norms .* 1\\), and it has .* 0\\)"),
    ],
    ids=["GroupNorm", "BatchNorm", "statistics without a flag"],
)
def test_a_norm_that_is_not_what_its_class_says_is_refused(norm, reason):
    """A subclass with another forward, and buffers that contradict the flag, are not taken for what they are not."""
    network = randomized(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm))
    with pytest.raises(ArchitectureError, match=reason):
        read_verified(network, trace(network))


def test_a_forward_that_is_not_the_class_s_is_refused():
    """Hooks on the network itself, and forwards that were replaced on an instance, are noticed by the result."""
    network = DESIGN.build()
    handle = network.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ArchitectureError, match="gives another result"):
        read_verified(network, trace(network))
    handle.remove()
    convolution = network.encoder.stages[0][0].convs[0].conv
    plain = convolution.forward
    convolution.forward = lambda x: plain(x) * 2
    with pytest.raises(ArchitectureError, match="gives another result"):
        read_verified(network, trace(network))
    del convolution.forward
    read_verified(network, trace(network))


def test_what_sees_the_whole_image_is_refused_by_name():
    """An operator of unbounded reach is named as the tracer names it."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Upsample(scale_factor=1, mode="bilinear", align_corners=True)
    )
    with pytest.raises(ArchitectureError, match=r"1 \(Upsample: .*\) sees the whole image"):
        read_verified(network, trace(network))


def test_weights_that_are_not_finite_do_not_hide_the_graph():
    """A network that has gone wrong in training is run stage by stage all the same; the prediction tells what is wrong."""
    network = DESIGN.build()
    network.decoder.seg_layers[-1].bias.data[0] = torch.nan
    assert read_verified(network, trace(network)).stride == (4, 4)
