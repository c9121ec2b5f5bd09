"""Micro-batches: the loss and the gradients of the whole batch, with the activations of a part of it."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn.utils import clip_grad_norm_

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import (
    checkpoint_stages,
    convert_norm,
    find_norms,
    fit_for_steps,
    one_step,
    tracking_norms,
)
from nnunet_norm.training.micro_batches import MicroBatches

SAMPLES, CLASSES, IGNORED = 4, 3, 3

# torch says so of nnU-Net's TopK.
pytestmark = pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")


def unet(norm=None, dropout=0.0, **options):
    torch.manual_seed(0)
    network = PlainConvUNet(
        *(1, 3, (4, 6, 8), nn.Conv2d, 3, (1, 2, 2), 2, CLASSES, 1, True, nn.InstanceNorm2d, {"affine": True}),
        *(nn.Dropout2d if dropout else None, {"p": dropout}, nn.LeakyReLU, {"inplace": True}),
        deep_supervision=True,
    )
    if norm is not None:
        convert_norm(network, norm, **options)
    for module in find_norms(network).values():
        nn.init.uniform_(module.weight, 0.5, 2)
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.double().train()


def image(step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 1, 16, 12, generator=generator, dtype=torch.float64)
    return x * torch.arange(1, SAMPLES + 1).view(-1, 1, 1, 1) + step


def targets(ignored=False):
    """Labels of both outputs; a sample without one of the classes, and with ``ignored`` some voxels without a label."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, CLASSES, (SAMPLES, 1, 16, 12), generator=generator)
    labels[1][labels[1] == 2] = 0
    if ignored:
        labels[:, :, 3:9] = IGNORED
    return [labels, labels[..., ::2, ::2]]


def dice_and_cross_entropy(batch_dice, ignored):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    ignore_label = IGNORED if ignored else None
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


def dice_and_top_k():
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_topk_loss(dice, {"k": 10, "label_smoothing": 0}, ignore_label=IGNORED)


LOSSES = {
    "sample Dice": (lambda: dice_and_cross_entropy(False, False), False),
    "batch Dice, ignore label": (lambda: dice_and_cross_entropy(True, True), True),
    "batch Dice, TopK, ignore label": (dice_and_top_k, True),
}
WAYS = {
    "parts of 2": (2, False),
    "parts of 3 and 1": (3, False),
    "checkpoints": (SAMPLES, True),
    "parts of 3 and 1, checkpoints": (3, True),
}


def loss_of(kind):
    """nnU-Net's loss under deep supervision, of the logits alone."""
    make, ignored = LOSSES[kind]
    wrapped = DeepSupervisionWrapper(make(), (2 / 3, 1 / 3))
    return lambda outputs: wrapped(outputs, targets(ignored))


def trained(network, x, loss, size=None, checkpoints=False):
    """Loss and gradients of one step."""
    network.zero_grad()
    if checkpoints:
        checkpoint_stages(network)
    with one_step(network):
        value = loss((network if size is None else MicroBatches(network, size))(x))
        value.backward()
    return [value.detach(), *(p.grad for p in network.parameters())]


def close(mine, expected):
    """Whatever the scale of a gradient, to 1e-10 of the largest."""
    scale = max(e.abs().max() for e in expected[1:])
    torch.testing.assert_close(mine[0], expected[0], rtol=1e-10, atol=1e-10)
    for one, other in zip(mine[1:], expected[1:], strict=True):
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("norm", ["group_norm", "instance_norm", "none", "frozen_batch_norm"])
def test_loss_and_gradients_are_those_of_the_whole_batch(norm, kind):
    """With nnU-Net's losses and deep supervision, in parts, with checkpoints, and both; to 1e-10 in double precision."""
    loss = loss_of(kind)
    expected = trained(unet(norm), image(), loss)
    assert sum(gradient.abs().max() > 1e-4 for gradient in expected[1:]) > 10
    for size, checkpoints in WAYS.values():
        close(trained(unet(norm), image(), loss, size, checkpoints), expected)


@pytest.mark.parametrize("norm", ["instance_norm_tracked", "ghost_batch_norm"])
def test_norms_that_normalize_each_sample_are_exact_too(norm):
    """And so are their running statistics, over steps."""
    loss = loss_of("sample Dice")
    whole, parts = unet(norm), unet(norm)
    for step in range(3):
        close(trained(parts, image(step), loss, 3, True), trained(whole, image(step), loss))
        for mine, expected in zip(tracking_norms(parts), tracking_norms(whole), strict=True):
            for name, buffer in mine.named_buffers():
                torch.testing.assert_close(buffer, getattr(expected, name), rtol=1e-10, atol=1e-10)


class Observed:
    """What the norms of a network get in the forwards that collect: all samples of a step, by norm."""

    def __init__(self, network):
        self.inputs = {name: [] for name, norm in find_norms(network).items()}
        for name, norm in find_norms(network).items():
            norm.register_forward_pre_hook(lambda norm, x, name=name: self.note(name, norm, x[0]))

    def note(self, name, norm, x):
        if not norm.repeating:
            self.inputs[name].append(x.detach().clone())

    def statistics(self, name):
        every = torch.cat(self.inputs[name])
        return every.mean((0, 2, 3)), every.var((0, 2, 3))


@pytest.mark.parametrize("way", ["parts of 3 and 1", "parts of 3 and 1, checkpoints"])
@pytest.mark.parametrize("norm", ["batch_renorm", "batch_norm", "ghost_batch_norm"])
def test_running_statistics_take_in_the_raw_moments_of_the_whole_batch_once(norm, way):
    """Of every norm, from what it got in one pass over all parts; with momentum 1 they are what is left."""
    network = fit_for_steps(unet(norm, momentum=1.0))
    size, checkpoints = WAYS[way]
    for step in range(3):
        observed = Observed(network)
        trained(network, image(step), loss_of("batch Dice, ignore label"), size, checkpoints)
        for name, module in find_norms(network).items():
            assert sum(map(len, observed.inputs[name])) == SAMPLES
            mean, var = observed.statistics(name)
            torch.testing.assert_close(module.running_mean, mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(module.running_var, var, rtol=1e-10, atol=1e-10)
            assert module.num_batches_tracked == step + 1
            module._forward_pre_hooks.clear()


@pytest.mark.parametrize("norm", ["batch_renorm", "batch_norm"])
def test_batch_norms_normalize_a_micro_batch_at_a_time(norm):
    """Gradients are those of the parts, joined before the loss, with the statistics that the step began with."""
    options = {"warmup_steps": 0, "ramp_steps": 2, "momentum": 0.3} if norm == "batch_renorm" else {}
    joined, parts = (fit_for_steps(unet(norm, **options)) for _ in range(2))
    loss = loss_of("batch Dice, ignore label")

    def in_parts(x):
        return [torch.cat(outputs) for outputs in zip(*(joined(part) for part in x.split(3)), strict=True)]

    for step in range(3):
        joined.zero_grad()
        with one_step(joined):
            value = loss(in_parts(image(step)))
            value.backward()
        expected = [value.detach(), *(p.grad for p in joined.parameters())]
        close(trained(parts, image(step), loss, 3, step == 2), expected)


@pytest.mark.parametrize("inside", [False, True])
def test_dropout_and_autocast_are_the_same_in_both_passes(inside):
    """To the last bit those of the parts run with gradients at once; with a backward pass inside of autocast and outside."""
    loss, found = loss_of("sample Dice"), []
    for way in ("joined", "micro"):
        network = unet(dropout=0.4).float()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            if way == "micro":
                outputs = MicroBatches(network, 3)(image().float())
            else:
                each = [network(part) for part in image().float().split(3)]
                outputs = [torch.cat(output) for output in zip(*each, strict=True)]
            assert outputs[0].dtype == torch.bfloat16
            value = loss([output.float() for output in outputs])
            if inside:
                value.backward()
        if not inside:
            value.backward()
        found.append([value.detach(), torch.rand(1), *(p.grad for p in network.parameters())])
    for mine, expected in zip(found[1][:2], found[0][:2], strict=True):
        assert torch.equal(mine, expected)
    for mine, expected in zip(found[1][2:], found[0][2:], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_an_output_without_a_loss_has_no_gradient():
    """The parameters that it has alone get none, as without micro-batches; the others theirs."""
    expected = trained(unet(), image(), lambda outputs: outputs[0].square().mean())
    mine = trained(unet(), image(), lambda outputs: outputs[0].square().mean(), 3)
    assert [gradient is None for gradient in mine] == [gradient is None for gradient in expected]
    assert sum(gradient is None for gradient in mine) == 2
    close(*([gradient for gradient in found if gradient is not None] for found in (mine, expected)))


def test_one_tensor_or_several_come_back_as_from_the_network():
    """With and without gradients, in the order of the samples; a small batch goes through as if nothing were there."""
    network, x = unet(), image()
    several = MicroBatches(network, 3)(x)
    assert isinstance(several, list)
    for mine, expected in zip(several, network(x), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for mine, expected in zip(MicroBatches(network, 3)(x), several, strict=True):
            assert torch.equal(mine, expected)
            assert not mine.requires_grad
    network.decoder.deep_supervision = False
    one = MicroBatches(network, 3)(x)
    assert torch.equal(one, several[0])
    assert one.requires_grad
    assert type(MicroBatches(network, SAMPLES)(x).grad_fn) is type(network(x).grad_fn)


def test_no_more_samples_than_asked_are_in_the_network_at_once():
    """Twice each: first without gradients, then with; and no activation is kept meanwhile."""
    network, seen, kept = unet(), [], []
    network.encoder.register_forward_pre_hook(lambda _, x: seen.append((len(x[0]), torch.is_grad_enabled())))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = MicroBatches(network, 3)(image())
    assert not kept
    sum(output.mean() for output in outputs).backward()
    assert seen == [(3, False), (1, False), (3, True), (1, True)]


def test_parameters_are_the_networks():
    """For nnU-Net's clipping of gradients."""
    network = unet()
    stand_in = MicroBatches(network, 2)
    assert all(mine is its for mine, its in zip(stand_in.parameters(), network.parameters(), strict=True))
    (100 * stand_in(image())[0]).square().sum().backward()
    assert clip_grad_norm_(stand_in.parameters(), 12) > 12
    total = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    assert total.item() == pytest.approx(12, rel=1e-4)


def test_norms_that_would_count_every_forward_are_refused():
    """Before the network is run: norms of torch, and ours outside of a step."""
    with pytest.raises(LayerError, match=r"torch's BatchNorm2d\) updates .* call fit_for_steps\(network\) first"):
        MicroBatches(unet("batch_norm"), 2)(image())
    network = unet("batch_renorm")
    with pytest.raises(LayerError, match=r"run the step inside one_step\(network\)"):
        MicroBatches(network, 2)(image())
    assert all(norm.num_batches_tracked == 0 for norm in tracking_norms(network))
