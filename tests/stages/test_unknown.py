"""Networks that cannot be run in blocks, or not be followed, are refused in one line."""

import pytest
import torch
from other_networks import D2, Forward, with_encoder
from stage_networks import Design
from torch import nn
from torch.nn import functional
from whole_pass import difference_of

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.stages import read_network


def attended(network, x):
    tokens = x.flatten(2).permute(2, 0, 1)
    return network.attention(tokens, tokens, tokens)[0].permute(1, 2, 0).reshape(x.shape)


def asserting(network, x):
    if not isinstance(x, nn.Parameter):
        raise AssertionError
    return x


UNKNOWN = {
    "squeezed": (lambda n, x: x + n.squeeze(x), "squeeze has no rule for blocks: a module of class AdaptiveAvgPool2d"),
    "depends on data": (lambda n, x: x if x.mean() > 0 else -x, r"its forward cannot be followed \(.*control flow"),
    "unpacks the shape": (lambda n, x: x.reshape([*x.shape]), "its forward cannot be followed"),
    "asserts": (asserting, r"its forward cannot be followed \(AssertionError\)"),
    "looks up": (lambda n, x: {}["missing"], r"its forward cannot be followed \('missing'\)"),
    "aligned corners": (lambda n, x: n.pool(n.up(x)), "up has no rule for blocks: .* with aligned corners"),
    "reflects": (lambda n, x: n.reflecting(x), "reflecting has no rule for blocks: padding mode 'reflect'"),
    "layer norm": (
        lambda n, x: n.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        "permute has no rule for blocks: call_method permute",
    ),
    "attention": (attended, "flatten has no rule for blocks: call_method flatten"),
    "a method": (lambda n, x: x.softmax(1), "softmax has no rule for blocks: call_method softmax"),
    "a function": (lambda n, x: torch.softmax(x, 1), "softmax has no rule for blocks: the function softmax"),
    "scaled by a parameter": (lambda n, x: x + n.scale, "scale has no rule for blocks: get_attr scale"),
    "adds a constant": (lambda n, x: x + 1.0, "add has no rule for blocks: addition of a constant"),
    "multiplies": (lambda n, x: x * x, "mul has no rule for blocks: the function mul"),
    "joined along space": (lambda n, x: torch.cat([x, x], 2), "cat has no rule for blocks: concatenation along axis 2"),
    "interpolated to a size": (
        lambda n, x: functional.interpolate(x, size=(8, 8)),
        "interpolate has no rule for blocks: upsampling to a given size",
    ),
    "two resolutions": (lambda n, x: x + n.pool(x), "add joins maps of different resolution"),
    "finer than the image": (
        lambda n, x: functional.interpolate(x, scale_factor=2.0),
        "interpolate joins maps of different resolution, or is finer than the image",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown_is_refused_in_one_line(name):
    """A forward that cannot be followed, or an operator without a rule: an ArchitectureError that names it."""
    between, reason = UNKNOWN[name]
    with pytest.raises(ArchitectureError, match=reason) as caught:
        read_network(Forward(between).eval())
    assert "\n" not in str(caught.value)


def own_sum(network, x):
    y = x
    y += functional.relu(x)
    return y + x


def dropped(network, x):
    network.relu(x)
    return x


def dropped_of_a_branch(network, x):
    y = functional.relu(x)
    network.pool(network.relu(y))
    return x + y


IN_PLACE = {
    "a module": (lambda n, x: n.relu(x) + x, "relu changes in place what add uses afterwards"),
    "through another name": (lambda n, x: n.relu(n.dropout(x)) + x, "relu changes in place what add uses afterwards"),
    "a function": (lambda n, x: functional.leaky_relu(x, 0.2, True) + x, "leaky_relu.* changes in place what add uses"),
    "an addition": (own_sum, "iadd.* changes in place what add uses afterwards"),
    "a result that nobody takes": (dropped, "relu changes in place what last uses afterwards"),
    "a result that another output takes": (dropped_of_a_branch, "relu changes in place what add uses afterwards"),
    "a function whose result nobody takes": (lambda n, x: (functional.relu_(x), x)[1], "relu_.* last uses afterwards"),
    "a method whose result nobody takes": (lambda n, x: (x.mul_(2), x)[1], "mul_.* last uses afterwards"),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_change_in_place_of_what_is_used_afterwards_is_refused(name):
    """What works in place on a map that somebody reads later is refused, whether or not its own result is used."""
    between, reason = IN_PLACE[name]
    with pytest.raises(ArchitectureError, match=reason) as caught:
        read_network(Forward(between).eval())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["before", "after"])
def test_a_hook_is_refused(kind):
    """A hook on an operator would not be called for the whole map, so the network is not known; without it, it is."""
    network = Design(D2).build()
    convolution = network.encoder.stages[0][0].convs[0].conv
    register = convolution.register_forward_pre_hook if kind == "before" else convolution.register_forward_hook
    handle = register(lambda *_: None)
    with pytest.raises(
        ArchitectureError, match=r"encoder\.stages\.0\.0\.convs\.0\.conv has no rule for blocks: a hook"
    ):
        read_network(network)
    handle.remove()
    assert difference_of(network, (21, 18)) < 1e-12


def test_squeeze_and_excitation_is_refused():
    """It takes the mean of the whole map, which no block knows."""
    with pytest.raises(ArchitectureError, match="mean has no rule for blocks: call_method mean"):
        read_network(with_encoder(squeeze_excitation=True))


class Several(nn.Module):
    """Inputs and outputs that are not one map."""

    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.wanted = forward

    def forward(self, x, y=None):
        return self.wanted(self.conv, x, y)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda conv, x, y: conv(x) + conv(y), "its output depends on 2 inputs"),
        (lambda conv, x, y: {"logits": conv(x)}, "its output is {'logits': conv}"),
        (lambda conv, x, y: 3, "its output is 3"),
    ],
    ids=["two inputs", "a dictionary", "a number"],
)
def test_what_is_no_network_from_map_to_map_is_refused(forward, reason):
    """One image in, one map out (or several, of which the first is meant)."""
    with pytest.raises(ArchitectureError, match=reason):
        read_network(Several(forward))


def test_a_network_without_convolution_is_refused():
    """Channels and axes of the image are told by the first convolution."""
    with pytest.raises(ArchitectureError, match="it has no convolution"):
        read_network(nn.Sequential(nn.ReLU()))
