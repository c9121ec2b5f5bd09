"""One run as a process: it goes on, does nothing twice, leaves nothing behind, and notes how it ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from runs import begun, lives, task, trains, until

from nnunet_norm.errors import SweepError
from nnunet_norm.sweep import locking, training
from nnunet_norm.sweep.locking import locked, owner_of
from nnunet_norm.sweep.records import ending, read_attempts
from nnunet_norm.sweep.task import Task, parse

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="ends with its parent by a service of Linux"
)


def ended(process):
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_it_trains_once(tmp_path):
    """A finished training is left as it is; one that ended well and left nothing has failed, and says what is missing."""
    one = task(tmp_path)
    assert ended(begun(one))[0] == 0
    assert ended(begun(one)) == (0, "model/fold_0 is finished already\n")
    (attempt,) = read_attempts(one.record)
    assert (attempt.code, attempt.failed, attempt.ended is not None) == (0, False, True)
    assert one.log.read_text().splitlines()[1] == "begins at 0"
    other = task(tmp_path, "other")
    (other.results / "leaves nothing").touch()
    code, output = ended(begun(other))
    assert code == 1
    assert output.endswith("the training ended well, but left no checkpoint_final.pth\n")


def test_a_failure_is_noted_with_its_last_lines(tmp_path):
    """Of this attempt alone; the code is the training's."""
    one = task(tmp_path)
    one.log.parent.mkdir(parents=True)
    one.log.write_text("of an attempt before\n")
    (one.results / "fails").touch()
    code, output = ended(begun(one))
    assert code == 3
    assert output.splitlines()[1:] == ["begins at 0", "all is lost"]
    (attempt,) = read_attempts(one.record)
    assert attempt.failed
    assert list(attempt.lines) == output.splitlines()


def test_a_training_that_the_system_kills_has_failed_and_says_so(tmp_path):
    """As where memory runs out: the run's process dies alike, without words of its own."""
    one = task(tmp_path)
    (one.results / "waits").touch()
    process = begun(one)
    os.kill(trains(one), signal.SIGKILL)
    code, output = ended(process)
    assert code == -signal.SIGKILL
    assert "Traceback" not in output
    (attempt,) = read_attempts(one.record)
    assert attempt.failed
    assert ending(attempt.code) == "killed by SIGKILL, as the system does where memory runs out"
    assert ending(1) == "exit code 1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_it_ends_the_training_and_the_same_command_goes_on(tmp_path, number):
    """It dies of the signal itself, which tells a job of SLURM that it did not fail; after a kill nothing is noted."""
    one = task(tmp_path)
    (one.results / "waits").touch()
    process = begun(one)
    number_of_training = trains(one)
    assert owner_of(one.results).process == process.pid
    process.send_signal(number)
    assert ended(process)[0] == -number
    until(lambda: not lives(number_of_training))
    until(lambda: owner_of(one.results) is None)
    (attempt,) = read_attempts(one.record)
    assert (attempt.code, attempt.failed) == (None if number == signal.SIGKILL else -number, False)
    reached = int((one.results / "count").read_text())
    (one.results / "waits").unlink()
    half = one.results / ".1-checkpoint_latest.pth"
    half.touch()
    assert ended(begun(one))[0] == 0
    assert not half.exists()  # of the attempt that was killed
    assert f"begins at {reached}" in one.log.read_text()
    assert [attempt.code for attempt in read_attempts(one.record)][1:] == [0]


def test_a_folder_that_is_written_to_is_refused_by_name(tmp_path, monkeypatch):
    """In one line, without a word in the record; also while no more than the training lives."""
    monkeypatch.setattr(locking, "MOMENT", 0.2)
    one = task(tmp_path)
    with locked(one.results, "another"):
        code, output = ended(begun(one, SLURM_JOB_ID="7"))
        assert code == 2
        assert output.startswith(
            f"nnunet_norm.sweep.training: {one.results} is being written to by sweep another (process "
        )
        assert output.count("\n") == 1
        assert not one.record.exists()
        with (
            pytest.raises(SweepError, match=f"by sweep another .process {os.getpid()} on "),
            locked(one.results, "third"),
        ):
            pass
    with locked(one.results, "another") as descriptors:
        held = subprocess.Popen(["sleep", "600"], pass_fds=descriptors)
    try:
        assert owner_of(one.results) is not None
    finally:
        held.kill()
        held.wait()
    assert owner_of(one.results) is None


def test_a_requeued_job_waits_for_what_it_was(tmp_path, monkeypatch):
    """SLURM begins it again while its former self may still be ending."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    one = task(tmp_path)
    with locked(one.results, "tried"):
        assert owner_of(one.results).job == "40_3"
        process = begun(one)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)  # longer than another sweep would wait
    assert ended(process)[0] == 0


def test_a_task_survives_its_command_line(tmp_path):
    """Every field, and the flags of nnU-Net's own program, always with --c."""
    one = Task(**vars(task(tmp_path, fold="all", npz=True, processes=2, cores=6)))
    assert parse([*one.command()[3:], "--parent", "5"]) == (one, 5)
    words = ["Dataset004_X", "2d", "all", "-tr", "nnUNetTrainerGN", "-p", "p", "--c", "-device", "cpu", "--npz"]
    assert one.training_arguments() == words


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cores": 8}, {"OMP_NUM_THREADS": "8", "nnUNet_n_proc_DA": "8"}),
        ({"cores": 8, "device": "cuda", "processes": 4}, {"nnUNet_n_proc_DA": "2"}),
        ({"cores": 32, "device": "cuda"}, {}),
        ({}, {}),
    ],
)
def test_a_training_has_its_share_of_the_cores(tmp_path, monkeypatch, changes, expected):
    """Unless the user has said otherwise; on a GPU nnU-Net's processes that augment alone count."""
    names = ("OMP_NUM_THREADS", "nnUNet_n_proc_DA")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    found = training._environment(task(tmp_path, **changes))
    assert {name: found[name] for name in names if name in found} == expected
    monkeypatch.setenv("nnUNet_n_proc_DA", "3")
    assert training._environment(task(tmp_path, **changes))["nnUNet_n_proc_DA"] == "3"


SCONTROL = """#!/bin/sh
if [ "$2" = hostnames ]; then printf 'a1\\na2\\n'; else echo "NodeName=$3 NodeAddr=10.0.0.${{3#a}} Port=1"; fi
"""


def test_machines_meet_where_slurm_says(tmp_path, monkeypatch):
    """At the address of the first one, at a port of the job's own; a job of another size is refused."""
    (tmp_path / "scontrol").write_text(SCONTROL.replace("{{", "{").replace("}}", "}"))
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    told = {"JOB_ID": "123456", "JOB_NODELIST": "a[1-2]", "NODEID": "1", "JOB_NUM_NODES": "2"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "a2")
    words = training._command(task(tmp_path, processes=2, nodes=2))
    assert words[1:4] == ["-m", "nnunet_norm.cli", "train"]
    rest = words[words.index("-num_gpus") :]
    expected = (
        "-num_gpus 2 --nnodes 2 --node-rank 1 --rdzv-endpoint 10.0.0.1:23456 --rdzv-id 123456-0 --local-addr 10.0.0.2"
    )
    assert " ".join(rest) == expected
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    with pytest.raises(SweepError, match="nodes 2: this job has 3"):
        training._command(task(tmp_path, processes=2, nodes=2))
