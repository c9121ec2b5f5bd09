"""Two real processes (gloo): none waits for the other for ever, buffers are shared, one writes, and both refuse together."""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_norm.errors import LaunchError
from nnunet_norm.training import distributed
from nnunet_norm.training.distributed import (
    LONGEST_WAIT,
    RefusedByAllError,
    agree,
    check_shared,
    ddp_on_any_device,
    only_first_process_writes,
    patient_barriers,
    refused_by_all,
    share_buffers,
)

sys.path.append(str(Path(__file__).parents[1]))
from two_processes import found_by_both, one_of_two

SECONDS = 60
"""After which a scenario that waits has failed."""

TOO_LONG = 1.0
"""Seconds that a forward pass waits for the other process, where it does."""

TILES = (2, 0)
"""Forward passes in eval mode of each process; the second has no case: fewer cases than processes."""

NNUNET = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))


def predict(network, rank):
    """What nnU-Net's final validation does to a network: other numbers of tiles, in eval mode, without gradients."""
    network.eval()
    with torch.no_grad():
        for _ in range(TILES[rank]):
            network(torch.ones(1, 1, 6, 6))


def stock_ddp(rank):
    """The error, if one is raised, of nnU-Net's wrapper."""
    group = dist.new_group(timeout=timedelta(seconds=TOO_LONG))
    network = DistributedDataParallel(small_network(), process_group=group)
    try:
        predict(network, rank)
    except RuntimeError as error:
        return str(error)
    return None


def our_ddp(rank):
    """The same with what nnU-Net's ``initialize`` makes inside of our patch, and the gradients of a step."""
    trainer = SimpleNamespace(device=torch.device("cpu"))
    with ddp_on_any_device(trainer):
        network = import_module(NNUNET).DDP(small_network(), device_ids=[rank])
    predict(network, rank)
    network.train()
    network(torch.full((2, 1, 6, 6), rank + 1.0) * torch.arange(36).view(6, 6)).square().sum().backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def shared(rank):
    """Buffers after sharing, and the number of collective calls."""
    network = nn.ModuleDict({"norm": nn.BatchNorm3d(3), "other": nn.InstanceNorm2d(2, track_running_stats=True)})
    network["alias"] = network["norm"]
    network["norm"].num_batches_tracked.fill_(2**40 + rank)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(rank)))
    pointers = [buffer.data_ptr() for buffer in network.buffers()]
    with patch.object(dist, "broadcast", side_effect=dist.broadcast) as calls:
        share_buffers(network)
    assert pointers == [buffer.data_ptr() for buffer in network.buffers()]
    return {"buffers": list(network.buffers()), "calls": calls.call_count}


def refusals(rank, folder):
    """What each process says when the other one, both, or none refuses."""
    said = {}

    def note(name, action):
        try:
            action()
        except RefusedByAllError as error:
            said[name] = str(error)

    @contextmanager
    def refusing(*ranks):
        with refused_by_all():
            if rank in ranks:
                raise LaunchError(f"GPU {rank} is missing")
            yield

    def enter(context):
        with context:
            pass

    def another_folder():
        with patch.object(distributed, "SECONDS_UNTIL_SEEN", 0.3):
            (folder / f"of_{rank}").mkdir()
            check_shared(folder / f"of_{rank}")

    note("second", lambda: enter(refusing(1)))
    note("both", lambda: enter(refusing(0, 1)))
    note("none", lambda: enter(refusing()))
    note("plans", lambda: agree({"dataset.json": {"a": 1}, "plans": {"batch_size": 2 + rank}}))
    note("alike", lambda: agree({"plans": {"a": 1, "b": [2]} if rank else {"b": [2], "a": 1}}))
    note("one folder", lambda: check_shared(folder))
    note("two folders", another_folder)
    return said


def written(rank, folder):
    """What nnU-Net's ``on_train_start`` leaves in the folder, by process."""
    nnunet = import_module(NNUNET)
    split = folder / "splits_final.json"

    def do_split():
        assert rank == 0, "the split is there when the second process looks"
        split.write_text("[]")

    def plot_network_architecture():
        raise AssertionError("a forward pass of one process alone")

    trainer = SimpleNamespace(
        is_ddp=True,
        local_rank=rank,
        preprocessed_dataset_folder_base=str(folder),
        do_split=do_split,
        plot_network_architecture=plot_network_architecture,
    )
    with only_first_process_writes(trainer):
        there = split.is_file()
        trainer.plot_network_architecture()
        nnunet.save_json({}, str(folder / f"plans_{rank}.json"))
        nnunet.shutil.copyfile(split, folder / f"fingerprint_{rank}.json")
        patient = dist.barrier.keywords["group"]
        timeout = patient._get_backend(torch.device("cpu")).options._timeout
    restored = trainer.plot_network_architecture is plot_network_architecture and not hasattr(dist.barrier, "keywords")
    return {"there": there, "timeout": timeout, "restored": restored}


def main(rank, folder):
    with one_of_two(rank, folder, SECONDS):
        found = {"ours": our_ddp(rank), "shared": shared(rank), "said": refusals(rank, folder)}
        found["written"] = written(rank, folder)
        found["stock"] = stock_ddp(rank)
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
        os._exit(0)  # a group with a call that was given up cannot be taken down in good order


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def both(folder):
    """What each of two processes found."""
    return found_by_both(__file__, folder, 3 * SECONDS)


def test_torchs_default_hangs_when_processes_predict_unequal_numbers_of_tiles(both):
    """The fault that is to be impossible.

    Torch shares buffers in a forward that is the first, or follows one with gradients (``require_forward_param_sync``): a
    process that predicts anything waits for one that has nothing to predict.
    """
    assert "timeout" in both[0]["stock"].lower().replace("timed out", "timeout")
    assert both[1]["stock"] is None


def test_processes_may_predict_unequal_numbers_of_tiles(both):
    """The gradients of the step after that are those of one process with both batches, halved: the wrapper's mean.

    Its BatchNorm has become one that synchronizes on a CPU, too.
    """
    network = small_network()
    whole = torch.cat([torch.full((2, 1, 6, 6), rank + 1.0) * torch.arange(36).view(6, 6) for rank in range(2)])
    network(whole).square().sum().backward()
    for found in both:
        torch.testing.assert_close(found["ours"], [parameter.grad / 2 for parameter in network.parameters()])


def test_a_gpu_is_given_by_its_number_on_this_machine():
    """And buffers are not broadcast; nnU-Net's rank among all is no number of a GPU."""
    module = import_module(NNUNET)
    with patch.object(distributed, "DistributedDataParallel") as built:
        with ddp_on_any_device(SimpleNamespace(device=torch.device("cuda", 1))):
            module.DDP("network", device_ids=[9])
        built.assert_called_once_with("network", device_ids=[1])
        assert built.return_value.broadcast_buffers is False
    assert module.DDP is DistributedDataParallel


def test_buffers_become_those_of_the_first_process_in_one_call(both):
    """To the last bit, whole numbers too, in place, each tensor once."""
    first, second = (found["shared"] for found in both)
    assert first["calls"] == second["calls"] == 1
    assert all(torch.equal(a, b) for a, b in zip(first["buffers"], second["buffers"], strict=True))
    assert 2**40 in [int(buffer) for buffer in second["buffers"] if not buffer.is_floating_point()]


def test_the_first_process_alone_writes(both, folder):
    """It makes the split before the other looks for it; no forward pass draws the architecture; all is as before after."""
    assert [found["written"]["there"] for found in both] == [True, True]
    assert [found["written"]["restored"] for found in both] == [True, True]
    names = {path.name for path in folder.iterdir()}
    assert {"plans_0.json", "fingerprint_0.json"} <= names
    assert not {"plans_1.json", "fingerprint_1.json"} & names


def test_barriers_around_unequal_work_are_patient(both):
    assert [found["written"]["timeout"] for found in both] == [LONGEST_WAIT, LONGEST_WAIT]


def test_what_one_process_refuses_all_refuse(both):
    """All say which process it is, unless they say the same."""
    for found in both:
        assert found["said"]["second"].startswith("process 1 on ")
        assert found["said"]["second"].endswith(": GPU 1 is missing")
        assert found["said"]["both"] == "GPU 0 is missing"
        assert "none" not in found["said"]


def test_processes_with_other_plans_refuse(both):
    for found in both:
        assert found["said"]["plans"].startswith("plans: not the same for all processes; 1 on ")
        assert "alike" not in found["said"]


def test_a_results_folder_that_is_not_shared_is_refused(both, folder):
    """And nothing is left of the look for it."""
    for found in both:
        assert "process 1 on " in found["said"]["two folders"]
        assert "all nodes need one file system" in found["said"]["two folders"]
        assert "one folder" not in found["said"]
    assert not [path for path in folder.rglob("*") if "shared" in path.name]


def test_one_process_alone_waits_for_nobody(tmp_path):
    """Without a process group everything is as if it were not there."""
    with pytest.raises(LaunchError, match="GPU is missing") as refusal, refused_by_all():
        raise LaunchError("GPU is missing")
    assert type(refusal.value) is LaunchError
    agree({"plans": {}})
    check_shared(tmp_path / "nowhere")
    alone = SimpleNamespace(is_ddp=False)
    with only_first_process_writes(alone), patient_barriers(alone) as group:
        assert group is None


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
