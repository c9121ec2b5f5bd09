"""``nnunet-norm train``: what it tells torchrun, what it makes of failures, and what it refuses before anything starts."""

import json
import os
import signal
import socket
from importlib.resources import files
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from nnunet_norm import cli
from nnunet_norm.commands import train
from nnunet_norm.commands.network import interface_with

BASE = ("7", "3d_fullres", "0", "-tr", "nnUNetTrainerBRN", "-p", "mine", "-device", "cpu")
VARIABLES = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture
def dataset(tmp_path):
    """A preprocessed dataset of which only the plans matter, with a batch of 4."""
    folder = tmp_path / "preprocessed" / "Dataset007_Small"
    (folder / "mine_3d").mkdir(parents=True)
    configuration = {"batch_size": 4, "data_identifier": "mine_3d"}
    plans = {"plans_name": "mine", "configurations": {"3d_fullres": configuration}}
    (folder / "mine.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text("{}")
    with patch.dict(os.environ):  # the command sets variables for torchrun
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(tmp_path / name)
        for name in (*VARIABLES, "nnUNet_extTrainer", "SLURM_CPUS_PER_TASK"):
            os.environ.pop(name, None)
        yield folder


@pytest.fixture
def torchrun(monkeypatch):
    """In place of torchrun: keeps what it is told, and fails as told."""
    told = SimpleNamespace(arguments=None, error=None)

    def main(arguments):
        told.arguments = arguments
        if told.error is not None:
            raise told.error

    monkeypatch.setattr(train.torchrun, "main", main)
    return told


def run(*arguments):
    return cli.main(["train", *BASE, *arguments])


def between(arguments, first, last):
    return arguments[arguments.index(first) : arguments.index(last)]


@pytest.mark.usefixtures("dataset")
def test_one_machine_meets_by_itself(torchrun):
    """And every argument reaches nnU-Net's processes."""
    assert run("-num_gpus", "3", "--max-restarts", "2", "--c", "--npz", "--val_best", "--backend", "gloo") == 0
    arguments = torchrun.arguments
    assert arguments[: arguments.index("-m")] == [
        *("--standalone", "--nproc-per-node", "3", "--max-restarts", "2"),
        *("--signals-to-handle", ",".join(train.SIGNALS)),
    ]
    assert arguments[arguments.index("-m") :] == [
        *("-m", "nnunet_norm.training.launch", *BASE[:3], "-tr", "nnUNetTrainerBRN", "-p", "mine", "-device", "cpu"),
        *("--backend", "gloo", "--c", "--npz", "--val_best"),
    ]


@pytest.mark.usefixtures("dataset")
def test_processes_share_the_cores_and_find_the_trainers(torchrun, monkeypatch):
    """With the setting that ended torchrun's own failures; what a user has set stays."""
    monkeypatch.setattr(train, "cores", lambda: 7)
    assert run("-num_gpus", "2") == 0
    assert [os.environ.get(name) for name in VARIABLES] == ["1", "3", None, None]
    assert os.environ["nnUNet_extTrainer"] == str(files("nnunet_norm.trainers"))
    os.environ["OMP_NUM_THREADS"] = "5"
    assert run("-num_gpus", "1") == 0
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize("rank", [0, 1])
def test_several_machines_meet_at_the_first(torchrun, rank):
    """Which one that is is said, not guessed from names; the meeting has the same name on all."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    where = ("--nnodes", "2", "--node-rank", str(rank), "--rdzv-endpoint", f"localhost:{port}")
    assert run(*where, "--local-addr", "127.0.0.1") == 0
    assert between(torchrun.arguments, "--nnodes", "--nproc-per-node") == [
        *("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"),
        *("--rdzv-id", "7-3d_fullres-0-nnUNetTrainerBRN-mine", "--rdzv-conf", f"is_host={1 - rank}"),
        *("--local-addr", "127.0.0.1"),
    ]
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == interface_with("127.0.0.1")


def failure(exitcode):
    return ChildFailedError(
        "training", {1: ProcessFailure(local_rank=1, pid=77, exitcode=exitcode, error_file="<N/A>")}
    )


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (failure(-9), 1, "(SIGKILL)"),
        (failure(1), 1, "exitcode  : 1"),
        (failure(2), 2, ""),  # the process has said it
        (SignalException("stop", sigval=signal.SIGTERM), 143, ""),
    ],
)
def test_a_failure_is_told_without_a_traceback(torchrun, capsys, error, code, said):
    """Whose it was, and the code that a shell or a scheduler expects."""
    torchrun.error = error
    with pytest.raises(SystemExit) as exit_:
        run("-num_gpus", "2")
    assert exit_.value.code == code
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


@pytest.mark.usefixtures("dataset")
def test_machines_that_do_not_meet_are_told_how(torchrun, capsys):
    torchrun.error = RendezvousConnectionError("The connection to the C10d store has failed.")
    assert run("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "127.0.0.1") == 2
    assert capsys.readouterr().err == (
        "nnunet-norm train: --rdzv-endpoint 127.0.0.1: the machines did not meet (The connection to the C10d store has "
        "failed.): start the same command on all, and see that they reach machine 0 at this port\n"
    )


NODES = ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint")
REFUSALS = [
    (("-num_gpus", "0"), "-num_gpus 0: must be at least 1"),
    (("--nnodes", "0"), "--nnodes 0: must be at least 1"),
    (("--max-restarts", "-1"), "--max-restarts -1: must be at least 0"),
    (("--node-rank", "0"), "--node-rank is for several machines: give their number with --nnodes"),
    (("--nnodes", "2"), "--nnodes 2: --node-rank is missing; give 0 on the machine of --rdzv-endpoint"),
    (("--nnodes", "2", "--node-rank", "2"), "--nnodes 2: --node-rank 2 is out of range"),
    (NODES[:-1], "--nnodes 2: --rdzv-endpoint is missing; give HOST:PORT of machine 0"),
    ((*NODES, "localhost:x"), "--rdzv-endpoint localhost:x: the port must be a number from 1 to 65535"),
    ((*NODES, "nowhere.invalid:1"), "host 'nowhere.invalid' is not known here; give its address"),
    ((*NODES, "127.0.0.1:29987", "--local-addr", "203.0.113.9"), "--local-addr 203.0.113.9: this machine has no such"),
    (("--backend", "nccl"), "--backend nccl is for GPUs: with -device cpu use --backend gloo"),
    (("-device", "cuda", "--backend", "nccl"), "--backend nccl: torch finds no GPU on "),
    (("-device", "cuda"), "-device cuda: torch finds no GPU on "),
    (("-num_gpus", "5"), "configuration 3d_fullres: num_gpus is 5, more than the batch of 4 has samples"),
    (
        (*NODES, "127.0.0.1:29987", "-num_gpus", "3"),
        "configuration 3d_fullres: num_gpus is 6, more than the batch of 4 has samples",
    ),
    (("-p", "other"), "plans other are not in "),
    (("-tr", "nnUNetTrainerNone"), "-tr nnUNetTrainerNone: there is no such trainer; nnunet-norm trainers lists"),
    (
        ("-tr", "nnUNetTrainer", "-num_gpus", "2"),
        "-tr nnUNetTrainer is not of nnunet_norm: train it with nnUNetv2_train",
    ),
    (("-tr", "nnUNetTrainerBRN_manyepochs"), "-tr nnUNetTrainerBRN_manyepochs: "),
    (("-pretrained_weights", "none.pth"), "-pretrained_weights none.pth: there is no such file"),
    (("--c", "-pretrained_weights", "none.pth"), "leave one out"),
    (("--val_best", "--disable_checkpointing"), "--val_best needs a checkpoint"),
]


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("arguments", "said"), REFUSALS, ids=lambda value: " ".join(value) if type(value) is tuple else ""
)
def test_what_cannot_be_trained_is_refused_in_one_line(torchrun, capsys, monkeypatch, tmp_path, arguments, said):
    """Before a process is started, and with nothing written."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.startswith("nnunet-norm train: ")
    assert text.count("\n") == 1
    assert torchrun.arguments is None
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("dataset")
def test_a_port_in_use_is_refused_on_the_machine_that_needs_it(torchrun, capsys):
    """With one that is free; other machines connect to it."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        where = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{port}")
        assert run(*where, "--node-rank", "0") == 2
        assert f"port {port} of this machine cannot be used (Address already in use)" in capsys.readouterr().err
        assert torchrun.arguments is None
        assert run(*where, "--node-rank", "1") == 0


def test_more_processes_than_gpus_are_refused(dataset, torchrun, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run("-device", "cuda", "-num_gpus", "3") == 2
    assert "which has 2 GPU(s): start at most 2 there (-num_gpus)" in capsys.readouterr().err
    assert run("-device", "cuda", "-num_gpus", "2") == 0


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: os.environ.pop("nnUNet_results"), "nnUNet_results is not set; export it"),
        (lambda folder: (folder / "mine_3d").rmdir(), "run nnUNetv2_preprocess -c 3d_fullres first"),
        (lambda folder: folder.rename(folder.with_name("Dataset008_Other")), "dataset 7: Could not find"),
    ],
)
def test_what_is_not_there_is_refused(dataset, torchrun, capsys, break_it, said):
    """Folders of nnU-Net, the dataset, its preprocessed cases."""
    break_it(dataset)
    assert run() == 2
    assert said in capsys.readouterr().err
    assert torchrun.arguments is None
