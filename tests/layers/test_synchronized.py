"""Norms and the estimator in two real processes: what the batches of both give is what one process with all of them gets."""

import sys
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nnunet_norm.errors import StatisticsError
from nnunet_norm.layers import (
    BatchRenorm2d,
    FrozenBatchNorm,
    GhostBatchNorm2d,
    TrackedInstanceNorm2d,
    find_norms,
)
from nnunet_norm.statistics import estimate_population_statistics, norms_in_train_mode

sys.path.append(str(Path(__file__).parents[1]))
from two_processes import found_by_both, one_of_two

SPLITS = {"unequal": [2, 3], "one is empty": [5, 0]}
STEPS = 4
SECONDS = 400
"""A hang fails after these; the processes need about 25 on a machine of their own."""


def data(step=0, dtype=torch.float64):
    """The batch of both processes."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 3, 4, 6, generator=generator, dtype=torch.float64) * (2 + step) + 1 + step
    return x.to(dtype)


def own(x, split, rank):
    """A process's part of a batch; all of it for the one that is alone."""
    return x if rank is None else x.split(split)[rank]


def two_layers(norm):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 3, padding=1), norm(4)]
    return nn.Sequential(*layers).double()


def renorm(sync):
    """Limits: closed, half open, open, and clipping nothing any more."""
    return partial(BatchRenorm2d, warmup_steps=1, ramp_steps=1, momentum=0.3, sync=sync)


def buffers(network):
    return torch.cat([buffer.double().flatten() for buffer in network.buffers()])


def summed(network):
    """The parameters' gradients, added up over the processes if there are several."""
    for parameter in network.parameters():
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)
    return [parameter.grad.clone() for parameter in network.parameters()]


def train(network, split, rank, *, learn=False, dtype=torch.float64, steps=STEPS, spoil=()):
    """Training steps of gradients that are added up: outputs, input gradients, parameter gradients, buffers of each."""
    network = network.to(dtype).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-5)
    found = []
    for step in range(steps):
        x = own(data(step, dtype), split, rank).clone()
        if step in spoil and rank == 1:
            x[0, 0, 0, 0] = torch.nan
        x.requires_grad_()
        optimizer.zero_grad()
        y = network(x)
        (y.double() ** 3).sum().backward()
        found.append({"y": y.detach(), "x": x.grad, "parameters": summed(network), "buffers": buffers(network)})
        if learn:
            optimizer.step()
    return found


def trained(sync, split, rank, **options):
    return train(two_layers(renorm(sync)), split, rank, **options)


def under_autocast(sync, split, rank):
    network = two_layers(renorm(sync))
    with torch.autocast("cpu", torch.bfloat16):
        return train(network, split, rank, dtype=torch.float32)


def all_kinds():
    """Normalization over all processes, per sample, and with fixed statistics: no result depends on who has which sample."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        renorm("full")(4),
        nn.LeakyReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        GhostBatchNorm2d(4, normalization_batch_size=1),
        nn.LeakyReLU(),
        FrozenBatchNorm(4),
    )


def in_nnunets_order(split, rank):
    """nnUNetTrainer.initialize: compile, convert, wrap."""
    network = all_kinds()
    kinds = [type(module) for module in network]
    wrapped = torch.compile(network)
    if rank is not None:
        wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    found = []
    for step in range(2):
        network.zero_grad()
        (wrapped(own(data(step, torch.float32), split, rank)) ** 3).sum().backward()
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
        found.append({"parameters": gradients, "buffers": buffers(network)})
    return {"steps": found, "kinds kept": [type(module) for module in network] == kinds}


POPULATIONS = {"unequal": ([[2, 1], [4]], 7), "one is empty": ([[2, 3, 1], []], 6)}


def population(name, rank):
    """A process's batches; those of all, one process after the other, for the one that is alone."""
    shards, total = POPULATIONS[name]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(total, 3, 4, 6, generator=generator, dtype=torch.float64)
    batches = iter(x.mul_(torch.arange(1, total + 1).view(-1, 1, 1, 1)).split([*chain(*shards)]))
    dealt = [[next(batches) for _ in shard] for shard in shards]
    return [*chain(*dealt)] if rank is None else dealt[rank]


class WithUnusedNorm(nn.Module):
    """Its last norm is not part of the forward pass."""

    def __init__(self):
        super().__init__()
        self.used = two_layers(lambda channels: BatchRenorm2d(channels))
        self.unused = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.used(x)


def estimated(name, exact, rank):
    network = WithUnusedNorm()
    estimate_population_statistics(network, population(name, rank), exact=exact, progress=False)
    return buffers(network)


def refused(batches):
    """The messages of both estimators, and whether they left the network as it was."""
    network, messages = two_layers(nn.BatchNorm2d), []
    before = buffers(network)
    for exact in (False, True):
        try:
            estimate_population_statistics(network, batches, exact=exact, progress=False)
        except StatisticsError as error:
            messages.append(str(error))
    return {"messages": messages, "untouched": torch.equal(buffers(network), before)}


def measured_alone(rank):
    """One process runs more batches than the other; a collective would wait for ever."""
    network = nn.Sequential(
        renorm("full")(3), GhostBatchNorm2d(3), TrackedInstanceNorm2d(3), nn.SyncBatchNorm(3)
    ).double()
    network.eval()
    before = buffers(network)
    with norms_in_train_mode(network, across_processes=False):
        outputs = [network(data(step)) for step in range(3 if rank == 0 else 1)]
    kept = torch.equal(buffers(network), before) and not any(norm.training for norm in find_norms(network).values())
    return {"outputs": outputs, "kept": kept}


def scenarios(rank):
    """Everything, in the same order in both processes."""
    found = {}
    for name, split in SPLITS.items():
        found["full", name] = trained("full", split, rank, learn=True)
        found["running", name] = trained("running", split, rank)
        found["ghost", name] = train(
            two_layers(partial(GhostBatchNorm2d, normalization_batch_size=2, momentum=0.3)), split, rank
        )
        found["instance", name] = train(two_layers(TrackedInstanceNorm2d), split, rank)
    unequal = SPLITS["unequal"]
    found["none"] = trained("none", unequal, rank)
    found["momentum none"] = train(two_layers(partial(GhostBatchNorm2d, momentum=None)), unequal, rank)
    found["closed"] = train(two_layers(partial(BatchRenorm2d, r_max=1, d_max=0)), unequal, rank)
    found["single"] = trained("full", unequal, rank, dtype=torch.float32)
    for sync in ("running", "full"):
        found["autocast", sync] = under_autocast(sync, unequal, rank)
        found["spoiled", sync] = trained(sync, unequal, rank, spoil=(1,))
    found["spoiled", "ghost"] = train(two_layers(GhostBatchNorm2d), unequal, rank, spoil=(1,))
    for name in POPULATIONS:
        for exact in (False, True):
            found["estimate", name, exact] = estimated(name, exact, rank)
    found["empty"] = refused([])
    found["not finite"] = refused([data() * (torch.nan if rank == 1 else 1)])
    found["alone"] = measured_alone(rank)
    found["compiled"] = in_nnunets_order(unequal, rank)
    return found


def main(rank, folder):
    with one_of_two(rank, folder, SECONDS):
        torch.save(scenarios(rank), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    return found_by_both(__file__, tmp_path_factory.mktemp("processes"), SECONDS, TORCHINDUCTOR_COMPILE_THREADS="1")


def close(mine, expected, tolerance=1e-10):
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


def joined(both, scenario, step, what):
    return torch.cat([found[scenario][step][what] for found in both])


EVERYWHERE = [
    *((kind, name) for kind in ("full", "running", "ghost", "instance") for name in SPLITS),
    *(("autocast", sync) for sync in ("running", "full")),
    "momentum none",
    "closed",
    "single",
]


@pytest.mark.parametrize("scenario", EVERYWHERE, ids=str)
def test_running_statistics_are_the_same_on_all_processes_to_the_last_bit(both, scenario):
    """After every step, and they are finite and move."""
    first, second = (torch.stack([step["buffers"] for step in found[scenario]]) for found in both)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert (first[1:] != first[:-1]).any(1).all()


@pytest.mark.parametrize("name", SPLITS)
def test_fully_synchronized_training_is_that_of_one_process(both, name):
    """Outputs, gradients of inputs, summed gradients of parameters, running statistics, while the limits open."""
    alone = trained("full", None, None, learn=True)
    for step, expected in enumerate(alone):
        for what in ("y", "x"):
            close(joined(both, ("full", name), step, what), expected[what])
        for found in both:
            close(found["full", name][step]["parameters"], expected["parameters"])
            close(found["full", name][step]["buffers"], expected["buffers"])
    assert (alone[1]["buffers"] - alone[0]["buffers"]).abs().max() > 0.1


def test_full_synchronization_holds_in_single_precision(both):
    for step, expected in enumerate(trained("full", None, None, dtype=torch.float32)):
        close(joined(both, "single", step, "y"), expected["y"], 1e-4)
        assert joined(both, "single", step, "x").dtype == torch.float32
        scale = expected["x"].abs().max()
        close(joined(both, "single", step, "x") / scale, expected["x"] / scale, 1e-4)


@pytest.mark.parametrize("name", SPLITS)
def test_merged_running_statistics_are_those_of_the_whole_batch(both, name):
    """Of the first norm: what the second one gets was normalized by each process for itself."""
    expected = trained("none", None, None)
    length = 2 * 4 + 1
    for found in both:
        for step, alone in zip(found["running", name], expected, strict=True):
            close(step["buffers"][:length], alone["buffers"][:length])


def test_without_synchronization_each_process_is_alone(both):
    for rank, found in enumerate(both):
        for step, here in enumerate(found["none"]):
            network = two_layers(renorm("none"))
            for earlier in range(step + 1):
                y = network(data(earlier).split(SPLITS["unequal"])[rank])
            close(here["y"], y.detach())
            close(here["buffers"], buffers(network))


def test_closed_limits_normalize_by_the_own_batch_and_keep_batch_norms_average_of_all(both):
    """The running statistics are torch's for the whole batch (first norm), the output torch's for the part."""
    whole, parts = two_layers(partial(nn.BatchNorm2d, momentum=0.01)), two_layers(nn.BatchNorm2d)
    for step in range(STEPS):
        whole(data(step))
        for rank, found in enumerate(both):
            close(found["closed"][step]["buffers"][:9], buffers(whole)[:9])
            close(found["closed"][step]["y"], parts(data(step).split(SPLITS["unequal"])[rank]).detach())


@pytest.mark.parametrize("sync", ["running", "full"])
def test_autocast_keeps_statistics_and_gradients_close_to_single_precision(both, sync):
    """bfloat16 has 8 bits: a few per cent of the largest value."""
    for step in range(STEPS):
        y, x = (joined(both, ("autocast", sync), step, what) for what in ("y", "x"))
        assert y.isfinite().all()
        assert x.isfinite().all()
        if sync == "full":
            expected = trained("full", None, None, dtype=torch.float32)[step]["y"]
            assert (y.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", ["running", "full", "ghost"])
def test_a_batch_that_is_not_finite_on_one_process_is_taken_in_by_none(both, kind):
    """Neither by the other one, nor counted."""
    for found in both:
        steps = found["spoiled", kind]
        assert torch.equal(steps[1]["buffers"][:9], steps[0]["buffers"][:9])
        assert steps[2]["buffers"].isfinite().all()
        assert not torch.equal(steps[2]["buffers"][:9], steps[1]["buffers"][:9])


@pytest.mark.parametrize("name", SPLITS)
def test_ghost_batch_norm_merges_the_statistics_of_all_batches(both, name):
    """Those of the first norm are torch's BatchNorm's for the whole batch."""
    norm = two_layers(partial(nn.BatchNorm2d, momentum=0.3))
    for step in range(STEPS):
        norm(data(step))
        for found in both:
            close(found["ghost", name][step]["buffers"][:9], buffers(norm)[:9])


def test_ghost_batch_norm_averages_all_steps_without_momentum(both):
    norm = two_layers(partial(nn.BatchNorm2d, momentum=None))
    for step in range(STEPS):
        norm(data(step))
        close(both[1]["momentum none"][step]["buffers"][:9], buffers(norm)[:9])


@pytest.mark.parametrize("name", SPLITS)
def test_tracked_instance_norm_averages_over_the_samples_of_all(both, name):
    for step, expected in enumerate(train(two_layers(TrackedInstanceNorm2d), None, None)):
        close(joined(both, ("instance", name), step, "y"), expected["y"])
        for found in both:
            close(found["instance", name][step]["buffers"], expected["buffers"])


def test_nnunets_order_of_compiling_converting_and_wrapping_works(both):
    """DDP averages: gradients are those of one process over the number of processes. No norm becomes a SyncBatchNorm."""
    network = all_kinds()
    for step in range(2):
        network.zero_grad()
        (network(data(step, torch.float32)) ** 3).sum().backward()
        for found in both:
            assert found["compiled"]["kinds kept"]
            here = found["compiled"]["steps"][step]
            for mine, parameter in zip(here["parameters"], network.parameters(), strict=True):
                scale = parameter.grad.abs().max().clamp_min(1e-3 * 700)
                close(mine * 2 / scale, parameter.grad / scale, 1e-4)
            close(here["buffers"], buffers(network), 1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", POPULATIONS)
def test_the_estimator_over_shards_is_that_of_one_process(both, name, exact):
    """Shards of any sizes, also none; a norm that no process uses keeps its statistics."""
    expected = estimated(name, exact, None)
    for found in both:
        close(found["estimate", name, exact], expected, 1e-12)
    assert torch.equal(both[0]["estimate", name, exact], both[1]["estimate", name, exact])


@pytest.mark.parametrize(("scenario", "message"), [("empty", "is empty"), ("not finite", "is not finite")])
def test_all_processes_refuse_a_population_together(both, scenario, message):
    """Also those whose own shard is in order."""
    for found in both:
        assert len(found[scenario]["messages"]) == 2
        assert all(message in text for text in found[scenario]["messages"])
        assert found[scenario]["untouched"]


def test_measurements_may_run_without_the_other_processes(both):
    """norms_in_train_mode(across_processes=False): different numbers of batches, each normalized as if alone."""
    assert [len(found["alone"]["outputs"]) for found in both] == [3, 1]
    assert all(found["alone"]["kept"] for found in both)
    assert torch.equal(both[0]["alone"]["outputs"][0], both[1]["alone"]["outputs"][0])


@pytest.mark.parametrize("norm", [renorm("full"), renorm("running"), GhostBatchNorm2d, TrackedInstanceNorm2d])
def test_one_process_alone_waits_for_nobody(norm, tmp_path):
    """In a group of one, as without a group, to the last bit."""
    expected = train(two_layers(norm), None, None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = train(two_layers(norm), None, None)
    finally:
        dist.destroy_process_group()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
