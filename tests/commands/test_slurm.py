"""predict --slurm: which parts are submitted, as which commands, what is refused before that, and what is told."""

import functools
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
from tiny_models import write_image, write_model

from nnunet_norm.cli import build_parser, main
from nnunet_norm.commands import predict, slurm
from nnunet_norm.commands.machine import device_named
from nnunet_norm.submission import wait_for

HERE = ["-f", "0", "-npp", "0", "-nps", "0", "-device", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Threads as before, volumes of several shards, and no pause between two looks at the queue."""
    from nnunet_norm.volumes import layout

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(layout, "CHUNK_VOXELS", 8**3)
    monkeypatch.setattr(layout, "SHARD_VOXELS", 16**3)
    monkeypatch.setattr(slurm, "wait_for", functools.partial(wait_for, seconds=0.01))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model, three cases, one case, and a volume."""
    zarr = pytest.importorskip("zarr")
    write_model(tmp_path / "model")
    write_model(tmp_path / "instance", norm="torch.nn.InstanceNorm3d")
    for number in range(3):
        write_image(tmp_path / "cases", f"c{number}_0000", seed=number, shape=(16, 16, 16))
    write_image(tmp_path / "one", "c_0000", shape=(16, 16, 16))
    array = np.random.default_rng(0).normal(size=(32, 40, 33)).astype(np.float32)
    zarr.create_array(str(tmp_path / "x.zarr"), data=array, chunks=(16, 16, 16))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(*words):
    return main(["predict", "-m", "model", "-o", "out", *HERE, *words])


def submitted(place):
    """The commands that were submitted, in order, and the last one."""
    from submitit.core.utils import DelayedSubmission

    files = sorted((place / "out" / "slurm_logs").glob("*_submitted.pkl"), key=lambda file: file.name)
    *others, last = [DelayedSubmission.load(file).function.command for file in files]
    return others, last


def part_of(command):
    return int(command[command.index("-part_id") + 1]) if "-part_id" in command else 0


def test_the_command_of_a_part_is_the_one_that_was_called():
    """Every flag of predict comes through; those of SLURM do not, and what tells the parts apart is added."""
    words = [
        "predict",
        "-i",
        "a b",
        "-o",
        "o",
        "-d",
        "4",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "all",
        "--halo",
        "4",
        "5",
        "6",
    ]
    words += [
        "--tile-size",
        "auto",
        "--disable_tta",
        "-npp",
        "7",
        "--population",
        "image",
        "--slurm",
        "--slurm_gpus",
        "2",
    ]
    words += ["--slurm_setup", "x", "--level", "1", "-chk", "c.pth", "--max-memory", "2G", "--slurm_wait"]
    args = build_parser(words).parse_args(words)
    line = slurm.command_line(args, predict.add_arguments, part_id=2, num_parts=3, continue_prediction=True)
    again = build_parser(line).parse_args(line)
    expected = vars(args) | {"part_id": 2, "num_parts": 3, "continue_prediction": True}
    expected |= {"slurm": False, "slurm_gpus": None, "slurm_setup": None, "slurm_wait": False}
    assert vars(again) == expected


def test_parts_of_a_volume(place, cluster, capsys):
    """All of them, by commands that continue; the same again submits those that are not finished or were damaged since."""
    assert called("-i", "x.zarr", "--slurm", "-num_parts", "3", "--slurm_minutes", "60") == 0
    said = capsys.readouterr().out
    assert "submitted part 0 to 2 of 3 as jobs 41_0 to 41_2\njob 42 verifies them when all have ended: " in said
    commands, last = submitted(place)
    assert [command[:4] for command in commands] == [[sys.executable, "-m", "nnunet_norm.cli", "predict"]] * 3
    assert [part_of(command) for command in commands] == [0, 1, 2]
    verification = next(line for line in said.splitlines() if line.startswith("verify: "))
    assert shlex.split(verification)[1:] == ["nnunet-norm", *last[3:]]
    for command in commands:
        assert {"--continue_prediction", "--disable_progress_bar"} <= {*command}
        assert command[command.index("-num_parts") + 1] == "3"
        assert "--slurm" not in " ".join(command)
    assert main(commands[0][3:]) == main(commands[2][3:]) == 0
    assert main(last[3:]) == 2
    assert "part 1 of 3 is not finished" in capsys.readouterr().err

    shard = sorted(path for path in (place / "out" / ".x.zarr.unfinished" / "0").rglob("*") if path.parent.name != "0")
    file = [path for path in shard if path.is_file() and path.name != "zarr.json"][-1]
    file.write_bytes(file.read_bytes()[:-1])
    assert called("-i", "x.zarr", "--slurm", "-num_parts", "3") == 0
    said = capsys.readouterr().out
    assert "1 of 3 parts in out are finished, and left as they are" in said
    assert "submitted part 1, 2 of 3 as jobs 43_0 to 43_1" in said
    assert main(commands[2][3:]) == main(commands[1][3:]) == 0
    assert main(last[3:]) == 0
    capsys.readouterr()
    assert called("-i", "x.zarr", "--slurm", "-num_parts", "3") == 0
    said = capsys.readouterr().out
    assert "3 of 3 parts" in said
    assert "submitted" not in said


def test_cases_and_whole_volumes(place, cluster, capsys):
    """Each is a part unless parts are asked for; those that are there are left out; verification names what is missing."""
    assert called("-i", "cases", "-num_parts", "3", "-part_id", "1") == 0
    capsys.readouterr()
    assert called("-i", "cases", "--slurm") == 0
    assert "submitted part 0, 2 of 3 as jobs 41_0 to 41_1" in capsys.readouterr().out
    commands, last = submitted(place)
    assert [part_of(command) for command in commands] == [0, 2]
    assert main(commands[0][3:]) == 0
    assert main(last[3:]) == 2
    assert "lacks 1 of 3 cases (c2): predict part 2 of 3 again (-num_parts 3 -part_id 2" in capsys.readouterr().err
    assert main(commands[1][3:]) == main(last[3:]) == 0
    assert called("-i", "cases", "--slurm", "-num_parts", "2", "--save_probabilities") == 0
    assert "submitted part 0 to 1 of 2 as jobs" in capsys.readouterr().out  # there are no probabilities yet


def test_volumes_that_are_not_divided_are_all_verified(place, cluster, capsys):
    """Two volumes in two parts: whole ones, of which the verification sees both."""
    import zarr

    for name in "ab":
        array = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
        zarr.create_array(str(place / "volumes" / f"{name}.zarr"), data=array, chunks=(16, 16, 16))
    assert called("-i", "volumes", "--slurm") == 0
    commands, last = submitted(place)
    assert [part_of(command) for command in commands] == [0, 1]
    assert main(commands[0][3:]) == 0
    assert main(last[3:]) == 2
    assert "b.zarr: part 0 of 1 is not finished" in capsys.readouterr().err
    assert main(commands[1][3:]) == main(last[3:]) == 0


def test_outputs_are_begun_for_the_machine_that_computes(place, cluster, capsys):
    """Neither who submits nor who verifies needs the GPU, and none of them takes the output for that of another device."""
    assert called("-i", "x.zarr", "--slurm", "-num_parts", "2", "-device", "cuda") == 0
    assert '"device": "cuda"' in (place / "out" / ".x.zarr.unfinished" / "zarr.json").read_text()
    script = (cluster / "script_41").read_text()
    assert "#SBATCH --gpus-per-node=1\n" in script
    assert "gpus-per-node" not in (cluster / "script_42").read_text()
    _, last = submitted(place)
    capsys.readouterr()
    assert main(last[3:]) == 2
    assert "part 0, 1 of 2 is not finished" in capsys.readouterr().err


def test_flags_become_resources(place, cluster):
    """Each in SLURM's words."""
    flags = ["--slurm_partition", "p", "--slurm_gpus", "2", "--slurm_cpus", "3", "--slurm_memory", "1.5G"]
    flags += ["--slurm_minutes", "30", "--slurm_array_limit", "2", "--slurm_setup", "one", "--slurm_setup", "two"]
    assert called("-i", "cases", "--slurm", *flags) == 0
    script = (cluster / "script_41").read_text()
    for line in ("partition=p", "gpus-per-node=2", "cpus-per-task=3", "mem=1536MB", "time=30", "array=0-2%2"):
        assert f"#SBATCH --{line}\n" in script
    assert "\none\ntwo\n" in script


def test_waiting_tells_of_the_first_part_that_failed(place, cluster, capsys):
    """Exit code 2, its last lines, and where all of them are."""
    logs = place / "out" / "slurm_logs"
    logs.mkdir(parents=True)
    (logs / "41_0_0_log.out").write_text(
        "submitit INFO\nx.SubmissionError: it ended with 2:\nall is lost\nsrun: error\n"
    )
    assert called("-i", "cases", "--slurm", "--slurm_wait", "--disable_progress_bar") == 2
    first, line = capsys.readouterr().err.splitlines()
    assert first == "all is lost"
    assert "part 0 of 3 failed, and 2 more: its last lines are above, all of them in " in line
    assert line.endswith("41_0_0_log.out; the same command again submits what is not finished")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-i", "cases", "--slurm_gpus", "1"], "--slurm_gpus is for --slurm: add that, or leave it out"),
        (
            ["-i", "cases", "--slurm", "-num_parts", "3", "-part_id", "1"],
            "-part_id 1 and --slurm: all parts are submitted",
        ),
        (
            ["-i", "cases", "--slurm", "--verify_parts"],
            "--verify_parts and --slurm: a job that verifies is submitted anyway",
        ),
        (["-i", "cases", "--slurm", "--slurm_minutes", "0"], "minutes 0 of a job must be 1 or more"),
        (["-i", "cases", "--slurm", "--slurm_memory", "much"], "--slurm_memory 'much' is no size"),
        (
            ["-i", "cases", "--slurm", "--slurm_gpus", "0", "-device", "cuda"],
            "--slurm_gpus 0 and -device cuda: ask for a GPU",
        ),
        (
            ["-i", "one", "--slurm", "-num_parts", "4"],
            "-i one holds one case, which cannot be divided: leave --slurm out",
        ),
        (["-i", "x.zarr", "--slurm"], "-i x.zarr is one volume: say into how many parts (-num_parts)"),
        (["-i", "x.zarr", "--slurm", "-num_parts", "2", "-m", "instance"], "takes the statistics of all of it"),
        (["-i", "x.zarr", "--slurm", "-num_parts", "2", "--population", "image"], "statistics"),
        (["-i", "x.zarr", "--slurm", "-num_parts", "999"], "a shard has one writer: choose 1 to"),
        (["-i", "cases", "--slurm", "-m", "none"], "model folder 'none' does not exist"),
        (["-i", "cases", "--slurm", "--level", "1"], "--level is for volumes on disk"),
        (
            ["-i", "cases", "--slurm", "--slurm_partition", "none"],
            "the jobs were refused: sbatch: error: invalid partition",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_submitted(place, cluster, capsys, words, expected):
    """In one line."""
    assert called(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("nnunet-norm predict: ")
    assert expected in line
    assert "none" in words or not (cluster / "count").exists()


def test_without_slurm_there_is_one_line(place, capsys, monkeypatch):
    """Before nnU-Net is imported, which takes seconds."""
    monkeypatch.setenv("PATH", str(place))
    assert called("-i", "cases", "--slurm") == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(("granted", "expected"), [("1", 1), ("9999", None), (None, None), ("x", None)])
def test_threads_are_those_that_slurm_gave(monkeypatch, granted, expected):
    """A node has more cores than a job; where nothing was given, all that the process may run on."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if granted is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", granted)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    device_named("cpu")
    assert asked == [expected or len(os.sched_getaffinity(0))]
