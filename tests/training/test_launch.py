"""One process of a training as torchrun starts it, here without torchrun: what it runs, goes on with, and refuses."""

import os
import socket

import pytest
import torch

from nnunet_norm.training import launch

NAME = "Dataset990_Abdomen"
TRAINER = "nnUNetTrainerGN_1epochs"
MODEL = f"results/{NAME}/{TRAINER}__tiny__3d_fullres/fold_0"


@pytest.fixture(autouse=True)
def not_of_torchrun(monkeypatch):
    """Nothing in the environment says that there are other processes; this one's children are pytest's."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "end_children_with_this_process", lambda: None)


def run(*options):
    launch.main([NAME, "3d_fullres", "0", "-tr", TRAINER, "-p", "tiny", "-device", "cpu", *options])


def refused(capsys, *options):
    """What stands on stderr after a refusal: one line."""
    with pytest.raises(SystemExit) as exit_:
        run(*options)
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.startswith("nnunet_norm.training.launch: ")
    assert said.count("\n") == 1
    return said


def test_one_process_trains_validates_and_goes_on(dataset, capsys):
    """As nnUNetv2_train does: training with validation, the validation alone, and a training that is finished already."""
    assert "--val: there is no checkpoint_final.pth in " in refused(capsys, "--val")
    run()
    folder = dataset.root / MODEL
    report = folder / "validation" / "norm_report.json"
    first = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert first["current_epoch"] == 1
    report.unlink()
    run("--val")
    assert report.is_file()
    report.unlink()
    run("--c")
    assert "The training goes on with epoch 1, from checkpoint_final.pth" in capsys.readouterr().out
    assert report.is_file()
    again = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    for name, value in first["network_weights"].items():
        assert torch.equal(value, again["network_weights"][name])
    assert not list(folder.glob(".nnunet_norm*"))


@pytest.mark.usefixtures("dataset")
def test_a_port_in_use_is_refused(capsys, monkeypatch):
    """And with it a training whose processes cannot meet; nothing is written."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        where = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        said = refused(capsys)
    assert f"processes cannot meet at 127.0.0.1:{port} (" in said
    assert "start them with torchrun, on a port that is free" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "nccl"), "--backend nccl is for GPUs: with -device cpu use --backend gloo"),
        (("-device", "cuda", "--backend", "nccl"), "--backend nccl: torch finds no GPU on "),
        (("-p", "none"), "plans none are not in "),
        (("-tr", "nnUNetTrainerNone"), "-tr nnUNetTrainerNone: there is no such trainer"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(dataset, capsys, monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert said in refused(capsys, *options)
    assert not (dataset.root / "results").exists()
