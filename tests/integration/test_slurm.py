"""Parts of a prediction as jobs of a real SLURM on this machine: killed, requeued, verified, and made up for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
sys.path.append(str(Path(__file__).parent))
from one_node_slurm import until
from tiny_models import write_model

from nnunet_norm.submission import Resources, last_lines, submit_commands, wait_for

pytestmark = pytest.mark.integration

COUNT = """
import sys, time
from pathlib import Path
file = Path(sys.argv[1])
reached = int(file.read_text()) if file.exists() else 0
print("begins at", reached, flush=True)
while reached < int(sys.argv[2]):
    time.sleep(0.2)
    reached += 1
    file.write_text(str(reached))
"""
"""A command that goes on where it was."""


def process_of(out, part):
    """The process that predicts a part."""
    wanted = {f"-o\0{out}\0".encode(), f"-part_id\0{part}\0".encode()}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if all(words in file.read_bytes() for words in wanted):
                return int(file.parent.name)
        except OSError:
            continue
    return None


def labels_of(path):
    zarr = pytest.importorskip("zarr")
    return zarr.open_group(str(path), mode="r")["0"][:]


def submitted(tmp_path, count):
    commands = [[sys.executable, "-c", COUNT, str(tmp_path / f"count_{i}"), str(count)] for i in range(2)]
    then = ["bash", "-c", f"echo reached $(cat {tmp_path}/count_0)"]
    return submit_commands(commands, name="count", folder=tmp_path / "logs", resources=Resources(minutes=30), then=then)


def waited(jobs):
    return wait_for(jobs, lambda *_: None, 1)


@pytest.mark.parametrize("name", ["USR2", "TERM"], ids=["its time is over", "preempted"])
def test_a_job_that_is_told_to_end_is_requeued_and_goes_on(slurm, tmp_path, name):
    """Its process is ended before another begins; what comes after the array waits for that one too."""
    jobs = submitted(tmp_path, 40)
    until(lambda: (tmp_path / "count_0").exists())
    subprocess.run(["scancel", f"--signal={name}", jobs.ids[0]], check=True)
    assert waited(jobs) == []
    log = jobs.log_of(jobs.jobs[0]).read_text()
    begun = [int(line.split()[-1]) for line in log.splitlines() if line.startswith("begins at")]
    assert begun[0] == 0
    assert 0 < begun[1] < 40
    assert len(begun) == 2
    assert "\nreached 40\n" in jobs.log_of(jobs.last).read_text()


def test_a_job_of_a_partition_that_goes_first_preempts(slurm, tmp_path):
    """SLURM itself takes the cores away, and gives them back: nothing is lost."""
    jobs = submitted(tmp_path, 30)
    until(lambda: (tmp_path / "count_0").exists() and (tmp_path / "count_1").exists())
    subprocess.run(["sbatch", "--partition=urgent", "--wrap=sleep 2", "-o", os.devnull], check=True)
    assert waited(jobs) == []
    assert any(jobs.log_of(job).read_text().count("begins at") == 2 for job in jobs.jobs)


def test_a_cancelled_job_has_failed_and_is_not_requeued(slurm, tmp_path):
    """Without accounting SLURM does not tell; it is not in the queue any more, and that tells."""
    jobs = submitted(tmp_path, 25)
    until(lambda: (tmp_path / "count_0").exists())
    subprocess.run(["scancel", jobs.ids[0]], check=True)
    assert waited(jobs) == [0]
    assert "CANCELLED" in "".join(last_lines(jobs.log_of(jobs.jobs[0])))


def test_parts_of_a_volume_one_of_them_killed(slurm, tmp_path):
    """The job that verifies names the part; the same command again predicts it alone, and all is as if undivided."""
    zarr = pytest.importorskip("zarr")
    write_model(tmp_path / "model")
    array = np.random.default_rng(0).normal(size=(70, 130, 40)).astype(np.float32)
    zarr.create_array(str(tmp_path / "x.zarr"), data=array, chunks=(32, 32, 32))
    predict = [sys.executable, "-m", "nnunet_norm.cli", "predict", "-i", str(tmp_path / "x.zarr"), "-f", "0"]
    predict += ["-m", str(tmp_path / "model"), "-device", "cpu", "--disable_tta", "--disable_progress_bar"]
    # Small tiles: there is time to kill a process between two of them.
    predict += ["--execution", "tiles", "--tile-size", "24", "--halo", "9"]
    out = tmp_path / "out"
    parts = [*predict, "-o", str(out), "--slurm", "-num_parts", "3", "--slurm_cpus", "1", "--slurm_wait"]
    with subprocess.Popen(parts, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        try:
            until(lambda: list(out.glob(".x.zarr.part_1-*/segmentation")) or first.poll() is not None, 180)
            assert first.poll() is None, first.communicate()
            os.kill(process_of(out, 1), signal.SIGKILL)
            said, refused = first.communicate(timeout=180)
        finally:
            first.kill()
    assert first.returncode == 2, said + refused
    assert "submitted part 0 to 2 of 3 as jobs " in said
    assert (
        "was killed by SIGKILL"
        in (out / "slurm_logs" / f"{said.split('jobs ')[1].split('_')[0]}_1_0_log.out").read_text()
    )
    assert "part 1 of 3 failed" in refused.splitlines()[-1]
    verification = Path(next(line for line in said.splitlines() if "verifies them" in line).split(": ")[1])
    assert "part 1 of 3 is not finished" in verification.read_text()
    assert not (out / "x.zarr").exists()

    again = subprocess.run(parts, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 of 3 parts" in again.stdout
    assert "submitted part 1 of 3 as job " in again.stdout
    assert "all parts are finished and verified" in again.stdout
    subprocess.run([*predict, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    assert (labels_of(out / "x.zarr") == labels_of(tmp_path / "whole" / "x.zarr")).mean() > 0.9999
    assert json.loads((out / "halo_prediction_part_1.json").read_text())["x"]["plan"] == "tiles"
    assert [path.name for path in out.glob(".*")] == []
