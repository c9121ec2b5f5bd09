"""Micro-batches, checkpoints and steps in two real processes: gradients of DDP, running statistics of both."""

import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_norm.layers import checkpoint_stages, convert_norm, fit_for_steps, one_step, tracking_norms
from nnunet_norm.training.micro_batches import MicroBatches

sys.path.append(str(Path(__file__).parents[1]))
from two_processes import found_by_both, one_of_two

SIZE = 2
EQUAL = (3, 3)
"""For nnU-Net's batch Dice, which takes no other shares."""
UNEQUAL = (3, 2)
"""Samples of each process: two micro-batches in one, and a whole batch in the other."""
EQUALLY_OFTEN = (3, 4)
"""Two micro-batches in both, for norms that wait for each other."""
SECONDS = 400


class Stages(nn.Module):
    """Has stages as a U-Net has them, and two outputs."""

    def __init__(self, channels):
        super().__init__()
        self.stages = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))]
        )
        self.heads = nn.ModuleList([nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stages(1), Stages(4)

    def forward(self, x):
        y = nn.functional.leaky_relu(self.encoder.stages[0](x))
        y = nn.functional.leaky_relu(self.decoder.stages[0](y))
        return [head(y) for head in self.decoder.heads]


def build(norm, **options):
    torch.manual_seed(1)
    network = Network()
    del network.encoder.heads
    return fit_for_steps(convert_norm(network, norm, **options)).double().train()


def data(step, shares, rank):
    """Images and labels of a process; of both for the one that is alone."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(shares), 1, 6, 4, generator=generator, dtype=torch.float64) * (2 + step) + step
    labels = torch.randint(0, 3, (sum(shares), 1, 6, 4), generator=generator)
    return (x, labels) if rank is None else (x.split(shares)[rank], labels.split(shares)[rank])


def nnunets_loss(outputs, labels):
    """Batch Dice over both processes, and cross-entropy; an output without a loss is not there."""
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": True}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, (0.7, 0.3))(outputs, [labels, labels])


def summed_loss(outputs, labels):
    """What no process needs another one for."""
    return sum((output**3 * (labels + 1)).sum() for output in outputs)


def first_output_alone(outputs, labels):
    return (outputs[0] ** 3 * (labels + 1)).sum()


LOSSES = {
    "nnU-Net's": (nnunets_loss, EQUAL),
    "sum": (summed_loss, UNEQUAL),
    "unused output": (first_output_alone, EQUALLY_OFTEN),
}


def gradients(network):
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def statistics(network):
    return [torch.cat([b.double().flatten() for b in norm.buffers()]) for norm in tracking_norms(network)]


def trained(network, run, shares, rank, loss, size=None):
    """Gradients and running statistics of each of three steps of an optimizer, and what the first norm got."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    found = []
    for step in range(3):
        x, labels = data(step, shares, rank)
        optimizer.zero_grad()
        with one_step(network):
            value = loss((run if size is None else MicroBatches(run, size))(x), labels)
            value.backward()
        found.append({"loss": value.detach(), "gradients": gradients(network), "statistics": statistics(network)})
        optimizer.step()
    return found


def scenarios(rank):
    """Everything, in the same order in both processes."""
    found = {}
    for name, (loss, shares) in LOSSES.items():
        whole, parts = build("group_norm"), build("group_norm")
        run = DistributedDataParallel(whole, find_unused_parameters=name == "unused output")
        found[name, "whole"] = trained(whole, run, shares, rank, loss)
        if name != "unused output":
            checkpoint_stages(parts)
        found[name, "parts"] = trained(parts, DistributedDataParallel(parts), shares, rank, loss, SIZE)
    for norm, options in NORMS.items():
        network = build(norm, **options)
        checkpoint_stages(network)
        found[norm] = trained(network, DistributedDataParallel(network), UNEQUAL, rank, summed_loss, SIZE)
    network = build("batch_norm")
    found["together"] = trained(network, DistributedDataParallel(network), EQUALLY_OFTEN, rank, summed_loss, SIZE)
    network = build("batch_renorm", sync="none")
    with one_step(network):
        if rank == 0:  # no collective call
            network(data(0, UNEQUAL, rank)[0])
    found["none"] = statistics(network)
    network = build("batch_renorm")
    with one_step(network):
        if rank == 0:
            network(data(0, UNEQUAL, rank)[0])
    found["one saw nothing"] = statistics(network)
    return found


NORMS = {
    "batch_renorm": {"warmup_steps": 0, "ramp_steps": 2, "momentum": 0.3},
    "ghost_batch_norm": {"momentum": 0.3},
    "instance_norm_tracked": {"momentum": 0.3},
}


def main(rank, folder):
    with one_of_two(rank, folder, SECONDS):
        torch.save(scenarios(rank), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return found_by_both(__file__, tmp_path_factory.mktemp("processes"), SECONDS)


def close(mine, expected):
    torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_ddp_without_micro_batches(both, name):
    """Batch Dice over both processes; unequal shares, of which one is a single micro-batch; an output without a loss."""
    for found in both:
        for mine, expected in zip(found[name, "parts"], found[name, "whole"], strict=True):
            close(mine["loss"], expected["loss"])
            # Micro-batches give a gradient of zero where DDP, told to look for unused parameters, gives none.
            pairs = zip(mine["gradients"], expected["gradients"], strict=True)
            close(*zip(*((one, one * 0 if other is None else other) for one, other in pairs), strict=True))
    for first, second in zip(*(found[name, "parts"] for found in both), strict=True):
        assert all(map(torch.equal, first["gradients"], second["gradients"]))


@pytest.mark.parametrize("norm", [*NORMS, "together"])
def test_running_statistics_are_the_same_on_both_to_the_last_bit(both, norm):
    """After every step, counted once, and they move."""
    for first, second in zip(*(found[norm] for found in both), strict=True):
        assert all(map(torch.equal, first["statistics"], second["statistics"]))
    count = 0 if norm == "instance_norm_tracked" else 1
    for step, found in enumerate(both[0][norm]):
        assert [norm[-1].item() for norm in found["statistics"]] == [count * (step + 1)] * 2
    assert not torch.equal(both[0][norm][1]["statistics"][0], both[0][norm][0]["statistics"][0])


def in_one_process(norm, **options):
    """The first norm's statistics after a step of one process with all samples."""
    network = build(norm, **options)
    x, _ = data(0, UNEQUAL, None)
    network(x)
    return statistics(network)[0]


@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_are_those_of_one_process_with_all_samples(both, norm):
    """Of the first norm: what the second one gets was normalized in parts."""
    for found in both:
        close(found[norm][0]["statistics"][0], in_one_process(norm, **NORMS[norm]))


def test_norms_that_wait_normalize_micro_batches_of_both_processes(both):
    """As one process whose micro-batches are those of both one_of_two: gradients, and statistics of all norms."""
    network = build("batch_norm")
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(3):
        of_each = [data(step, EQUALLY_OFTEN, rank) for rank in range(2)]
        optimizer.zero_grad()
        with one_step(network):
            pairs = zip(*(zip(x.split(SIZE), labels.split(SIZE), strict=True) for x, labels in of_each), strict=True)
            for pair in pairs:
                x, labels = (torch.cat(tensors) for tensors in zip(*pair, strict=True))
                (summed_loss(network(x), labels) / 2).backward()  # DDP takes the mean over the processes
        for found in both:
            close(found["together"][step]["gradients"], gradients(network))
            close(found["together"][step]["statistics"], statistics(network))
        optimizer.step()


def test_without_synchronization_a_process_takes_in_what_it_saw(both):
    network = build("batch_renorm")
    untouched = statistics(network)
    network(data(0, UNEQUAL, 0)[0])
    close(both[0]["none"], statistics(network))
    close(both[1]["none"], untouched)


def test_a_process_that_saw_nothing_takes_in_what_the_other_one_did(both):
    network = build("batch_renorm")
    network(data(0, UNEQUAL, 0)[0])
    for found in both:
        close(found["one saw nothing"], statistics(network))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
