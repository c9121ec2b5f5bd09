"""Runs as an array of jobs: what reaches sbatch, and which job has which run. SLURM is pretended."""

import json
import sys
from pathlib import Path

from nnunet_norm.submission import Resources
from nnunet_norm.sweep.cluster import queue_of, submit

sys.path.append(str(Path(__file__).parent))
from runs import task


def test_runs_become_an_array(cluster, tmp_path):
    """One task on each machine; a later submission takes the place of an earlier one of the same run."""
    assert queue_of(tmp_path / "sweep") == {}
    tasks = [task(tmp_path, name) for name in "ab"]
    submit(tasks, Resources(gpus=2, cpus=8, array_limit=1, nodes=2))
    script = (cluster / "script_41").read_text()
    for line in (
        "array=0-1%1",
        "gpus-per-node=2",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=8",
        "job-name=sweep-tried",
    ):
        assert f"#SBATCH --{line}\n" in script
    submit(tasks[1:], Resources())
    assert {name: job["job"] for name, job in json.loads((tmp_path / "sweep" / "jobs.json").read_text()).items()} == {
        "a/fold_0": "41_0",
        "b/fold_0": "42",
    }
    (cluster / "queue").write_text("41_0 PENDING (Priority)\n")
    queue = queue_of(tmp_path / "sweep")
    assert [queue[name].state for name in ("a/fold_0", "b/fold_0")] == ["PENDING (Priority)", ""]
    assert queue["b/fold_0"].log == tmp_path / "sweep" / "slurm_logs" / "42_0_log.out"
    (cluster / "queue").unlink()
    (cluster / "why").write_text("Unable to contact slurm controller")
    assert {queued.state for queued in queue_of(tmp_path / "sweep").values()} == {"UNKNOWN"}


def test_without_slurm_nothing_is_known_of_jobs(cluster, tmp_path, monkeypatch):
    """On a machine that only sees the files."""
    submit([task(tmp_path)], Resources())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [queued.state for queued in queue_of(tmp_path / "sweep").values()] == ["UNKNOWN"]
