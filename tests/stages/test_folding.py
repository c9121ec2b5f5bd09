"""Norms folded into convolutions: the same result, only where the wiring allows it, and nothing left of the norm."""

import copy

import pytest
import torch
from stage_networks import FIXED, Design, randomized
from torch import nn
from whole_pass import difference, difference_of, one_pass

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.layers import BatchRenorm2d, FrozenBatchNorm, GhostBatchNorm2d, TrackedInstanceNorm2d, find_norms
from nnunet_norm.receptive_field import trace
from nnunet_norm.stages import read_verified
from nnunet_norm.stages.folding import Pair, find_foldable, fold_norms

D2, D3 = ((1, 1), (2, 2), (1, 2)), ((1, 1, 1), (1, 2, 2), (2, 2, 2))

DESIGNS = {
    "plain": Design(D2, blocks=2, decoder=2),
    "plain, 3d": Design(D3, blocks=2, norm="BatchRenorm"),
    "tracked InstanceNorm": Design(D2, norm="tracked InstanceNorm"),
    "deep supervision": Design(D2, deep_supervision=True),
    "dropout between the two": Design(D2, dropout=True),
    "residual encoder": Design(D2, blocks=2, kind="residual encoder", norm="BatchRenorm"),
    "residual encoder, 3d": Design(D3, kind="residual encoder"),
    "bottleneck": Design(D2, kind="bottleneck"),
    "residual decoder": Design(D2, kind="residual"),
}


def noise(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def folded(network):
    made = copy.deepcopy(network)
    return made, fold_norms(made)


class Wired(nn.Module):
    """A network whose forward is a function of itself and the image."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)
        randomized(self)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs=2, outputs=2, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_folded_network_gives_what_it_gave_and_has_no_norms(name):
    """In float64 and float32; with blocks, too, and its graph is verified as any other's."""
    network = DESIGNS[name].build()
    made, pairs = folded(network)
    shape = tuple(2 * s for s in DESIGNS[name].stride)
    image = noise(1, 1, *shape)
    if name == "dropout between the two":  # which in eval mode is nothing; but it is an operator of the graph
        assert pairs == ()
        return
    assert len(pairs) == len(find_norms(network)) > 3
    assert find_norms(made) == {}
    assert difference(one_pass(made, image), one_pass(network, image)) < 1e-12
    assert difference(one_pass(made.float(), image.float()), one_pass(network.float(), image.float())) < 1e-5
    read_verified(made.double(), trace(made))
    assert difference_of(made, shape, edge=5) < 1e-12


def test_every_name_of_a_norm_is_exchanged():
    """nnU-Net's blocks name a norm twice, and the decoder holds the encoder again; all are the same nn.Identity."""
    network = DESIGNS["plain"].build()
    norm = network.encoder.stages[0][0].convs[0].norm
    names = [name for name, module in network.named_modules(remove_duplicate=False) if module is norm]
    fold_norms(network)
    assert len(names) == 4
    identities = {network.get_submodule(name) for name in names}
    assert len(identities) == 1
    assert type(identities.pop()) is nn.Identity
    assert not [key for key in network.state_dict() if "norm" in key or "running" in key]


def test_what_was_found_in_one_network_folds_another_of_its_kind():
    """So that every fold of a model is folded alike; a state dict moves between the two."""
    first, second = DESIGNS["plain"].build(seed=0), DESIGNS["plain"].build(seed=1)
    pairs = find_foldable(first)
    expected = one_pass(second, noise(1, 1, 8, 8))
    assert fold_norms(second, pairs) == pairs
    assert fold_norms(first) == pairs
    first.load_state_dict(second.state_dict())
    assert difference(one_pass(first, noise(1, 1, 8, 8)), expected) < 1e-12


NORMS = {
    "BatchNorm": nn.BatchNorm2d,
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False, eps=0.3),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "BatchRenorm": BatchRenorm2d,
    "FrozenBatchNorm": FrozenBatchNorm,
    "GhostBatchNorm": GhostBatchNorm2d,
    "tracked InstanceNorm": TrackedInstanceNorm2d,
}

CONVOLUTIONS = {
    "without bias": lambda: nn.Conv2d(2, 4, 3, padding=1, bias=False),
    "grouped, dilated": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 2, stride=2),
    "transposed without bias": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, bias=False),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_every_norm_with_stored_statistics_is_folded(convolution, norm):
    """Into convolutions with bias or without, transposed ones too; what comes before and after the two is left."""
    network = Wired(
        lambda self, x: self.last(torch.relu(self.norm(self.middle(torch.relu(self.first(x)))))),
        first=nn.Conv2d(1, 2, 3, padding=1, stride=2), middle=CONVOLUTIONS[convolution](),
        norm=NORMS[norm](4), last=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    made, pairs = folded(network)
    assert pairs == (Pair("middle", "norm"),)
    assert difference(one_pass(made, noise(1, 1, 8, 10)), one_pass(network, noise(1, 1, 8, 10))) < 1e-12
    assert torch.equal(made.first.weight, network.first.weight)
    assert torch.equal(made.last.weight, network.last.weight)


def test_a_norm_may_go_to_two():
    """What is made of the norm's output does not matter."""
    network = Wired(
        lambda self, x: self.b(y := self.norm(self.a(x))) + y,
        a=conv(1), norm=nn.BatchNorm2d(2), b=conv(),
    )  # fmt: skip
    made, pairs = folded(network)
    assert pairs == (Pair("a", "norm"),)
    assert difference(one_pass(made, noise(1, 1, 6, 6)), one_pass(network, noise(1, 1, 6, 6))) < 1e-12


UNFOLDABLE = {
    "the convolution goes to two": Wired(
        lambda self, x: self.norm(y := self.a(x)) + y, a=conv(1), norm=nn.BatchNorm2d(2)
    ),
    "the convolution is called twice": Wired(
        lambda self, x: self.a(torch.relu(self.norm(self.a(x)))), a=conv(1, 1), norm=nn.BatchNorm2d(1)
    ),
    "the norm is called twice": Wired(
        lambda self, x: self.norm(torch.relu(self.norm(self.a(x)))), a=conv(1), norm=nn.BatchNorm2d(2)
    ),
    "under two names, too": Wired(
        lambda self, x: self.norm(self.a(torch.relu(self.b(x)))), a=(shared := conv(1, 1)), b=shared,
        norm=nn.BatchNorm2d(1),
    ),
    "no convolution before it": Wired(
        lambda self, x: self.b(self.norm(torch.relu(self.a(x)))), a=conv(1), norm=nn.BatchNorm2d(2), b=conv()
    ),
    "the image before it": Wired(lambda self, x: self.a(self.norm(x)), norm=nn.BatchNorm2d(1), a=conv(1)),
    "InstanceNorm": Wired(lambda self, x: self.norm(self.a(x)), a=conv(1), norm=nn.InstanceNorm2d(2, affine=True)),
    "GroupNorm": Wired(lambda self, x: self.norm(self.a(x)), a=conv(1), norm=nn.GroupNorm(1, 2)),
    "statistics of the batch": Wired(
        lambda self, x: self.norm(self.a(x)), a=conv(1), norm=nn.BatchNorm2d(2, track_running_stats=False)
    ),
    "grouped transposed convolution": Wired(
        lambda self, x: self.norm(self.b(torch.relu(self.a(x)))),
        a=nn.Conv2d(1, 2, 1, stride=2), b=nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2), norm=nn.BatchNorm2d(2),
    ),
    "a weight that is computed": Wired(
        lambda self, x: self.norm(self.a(x)),
        a=nn.utils.parametrizations.weight_norm(conv(1)), norm=nn.BatchNorm2d(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFOLDABLE)
def test_what_cannot_be_folded_stays(name):
    """The network is left bit for bit as it was."""
    network = UNFOLDABLE[name]
    try:
        made, pairs = folded(network)
    except ArchitectureError:
        assert name == "a weight that is computed"  # which is not followed at all
        return
    assert pairs == ()
    assert list(made.state_dict()) == list(network.state_dict())
    channels = network.a.in_channels
    assert torch.equal(one_pass(made, noise(1, channels, 6, 6)), one_pass(network, noise(1, channels, 6, 6)))


def test_what_can_be_folded_is_beside_what_cannot():
    """Norms of both kinds in one network: those with stored statistics go, the others stay."""
    network = Wired(
        lambda self, x: self.last(torch.relu(self.second(self.b(torch.relu(self.first(self.a(x))))))),
        a=conv(1), first=nn.BatchNorm2d(2), b=conv(), second=nn.InstanceNorm2d(2, affine=True), last=conv(),
    )  # fmt: skip
    made, pairs = folded(network)
    assert pairs == (Pair("a", "first"),)
    assert list(find_norms(made)) == ["second"]
    assert difference(one_pass(made, noise(1, 1, 8, 8)), one_pass(network, noise(1, 1, 8, 8))) < 1e-12
    assert difference_of(made, (9, 8), edge=4) < 1e-9


def test_a_forward_that_cannot_be_followed_is_refused_and_left():
    """It is never guessed how a network is wired."""
    network = Wired(
        lambda self, x: self.norm(self.a(x)) if x.mean() > 0 else self.a(x), a=conv(1), norm=nn.BatchNorm2d(2)
    )
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ArchitectureError, match="its forward cannot be followed"):
        fold_norms(network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("norm", [name for name in FIXED if name != "none"])
def test_training_flag_and_need_of_gradients_are_kept(norm):
    """A network in train mode is folded by what it does in eval mode, and its flags stay."""
    network = Design(D2, norm=norm).build().train()
    network.encoder.requires_grad_(False)
    fold_norms(network)
    assert all(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.encoder.parameters())
    assert all(p.requires_grad for p in network.decoder.seg_layers.parameters())
