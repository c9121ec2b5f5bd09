"""A grid of real trainings on hippocampus: killed in the middle and continued, here and as jobs of a real SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from one_node_slurm import output_of, until

pytestmark = pytest.mark.integration

NAME, CASES = "Dataset004_Hippocampus", 6
PLANS = "nnUNetPlans_b2_p16x16x16_s3_f4_it1_vit1"

CPUS = 4
"""Of the node: more than the limit of the array, so that it is the limit that counts."""

GRID = """
dataset: 4
configuration: 3d_fullres
folds: [0, 1]
gpus: 0
npz: false
axes:
  norm: [InstanceNorm, BRN]
  batch: [2, 3]
  loss: [DiceCE, DiceFocal]
fixed: {epochs: 1, patch: [16, 16, 16], depth: 3, features: 4, iterations_per_epoch: 1, val_iterations_per_epoch: 1}
"""

HERE = ["-device", "cpu", "--disable_progress_bar"]
AS_JOBS = [*HERE, "--engine", "slurm", "--slurm_cpus", "1", "--slurm_array_limit", "2", "--slurm_wait"]


@pytest.fixture(scope="module")
def sweep(workspace):
    """A dataset with one validation case in each of two folds, and the grid; nothing is trained yet."""
    cases = [case[0] for case in workspace.add_hippocampus(NAME, CASES)]
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "1")
    split = [{"train": [c for c in cases if c != val], "val": [val]} for val in cases[:2]]
    (workspace.root / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps(split))
    (workspace.root / "grid.yaml").write_text(GRID)
    workspace.env |= {"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"}
    return workspace


@pytest.fixture
def begun(sweep):
    """Begin ``sweep run``; it is killed at the end of the test, if it still runs."""
    processes = []

    def begin(*options):
        processes.append(
            subprocess.Popen(
                ["nnunet-norm", "sweep", "run", "grid.yaml", *options],
                env=sweep.env,
                cwd=sweep.root,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def folder_of(sweep):
    return sweep.root / "results" / NAME / "sweeps" / "grid__3d_fullres"


def fold_folders(sweep, fold):
    return sorted((sweep.root / "results" / NAME).glob(f"nnUNetTrainer*/fold_{fold}"))


def attempts(sweep, name):
    """What was noted of a run's attempts."""
    file = folder_of(sweep) / "runs" / f"{name}.json"
    return json.loads(file.read_text())["attempts"] if file.exists() else []


def in_the_middle(sweep):
    """Runs that have begun and are not validated yet."""
    records = folder_of(sweep).glob("runs/*/fold_*.json")
    names = [f"{record.parent.name}/{record.stem}" for record in records]
    results = sweep.root / "results" / NAME
    return [
        name
        for name in names
        if attempts(sweep, name)[-1]["ended"] is None and not (results / name / "validation" / "summary.json").exists()
    ]


def trainings(sweep):
    """Processes that train in the workspace."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"nnunet_norm.training.launch" in file.read_bytes() and str(sweep.root).encode() in (
                file.with_name("environ").read_bytes()
            ):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_sweep_goes_on(sweep, begun):
    """One fold of every point, two at once: no training outlives the sweep, and what is finished is not touched again."""
    first = begun("-f", "0", "--slots", "2", *HERE)
    assert "0 runs are finished already" in first.stdout.readline()
    assert "8 runs are to be trained, 2 at once" in first.stdout.readline()
    until(lambda: len(trainings(sweep)) == 2)
    assert sweep.run("nnunet-norm", "sweep", "run", "grid.yaml", *HERE, fails=True).stderr.count("\n") == 1
    assert first.stdout.readline().startswith("done: InstanceNorm, b")
    until(lambda: in_the_middle(sweep))  # the next one, or the one beside it
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: not trainings(sweep))
    before = {path: path.stat().st_mtime_ns for path in sweep.root.glob("results/*/*/fold_0/validation/summary.json")}
    done = len(before)
    assert 1 <= done < 8
    status = sweep.run("nnunet-norm", "sweep", "status", "grid.yaml").stdout
    assert re.search(rf"16 runs: .*\b{done} done\b", status)
    assert re.search(r"\b[12] interrupted\b", status)

    again = sweep.run("nnunet-norm", "sweep", "run", "grid.yaml", "-f", "0", "--slots", "2", *HERE).stdout
    assert re.search(rf"\b{done} runs? (is|are) finished already", again)
    assert again.count("done: ") == 8 - done
    assert "all 8 runs of grid are finished" in again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for folder in fold_folders(sweep, 0):
        model, fold = folder.parts[-2:]
        log = (folder_of(sweep) / "logs" / model / f"{fold}.log").read_text()
        assert log.count("Mean Validation Dice") == 1
        assert len(json.loads((folder / "validation" / "summary.json").read_text())["metric_per_case"]) == 1
    # Every command of nnU-Net finds the models where it looks for them.
    assert (sweep.model(NAME, "nnUNetTrainerBRN_DiceFocal_1epochs", PLANS, "3d_fullres") / "fold_0").is_dir()


def test_the_same_grid_as_jobs(sweep, begun, slurm):
    """The array's limit holds; one job is requeued, one cancelled, one fails; the same command again makes up for them."""
    sweep.env |= {name: os.environ[name] for name in ("PATH", "SLURM_CONF")}
    broken = sweep.model(NAME, "nnUNetTrainerInstanceNorm_1epochs", PLANS, "3d_fullres") / "fold_1"
    broken.mkdir(parents=True)
    with zipfile.ZipFile(broken / "checkpoint_latest.pth", "w") as checkpoint:
        checkpoint.writestr("something", "else")
    process = begun(*AS_JOBS)
    until(lambda: (folder_of(sweep) / "jobs.json").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    jobs = {name: job["job"] for name, job in json.loads((folder_of(sweep) / "jobs.json").read_text()).items()}
    assert len(jobs) == 8
    left_alone = f"{broken.parent.name}/{broken.name}"
    most, told = 0, []
    while process.poll() is None:
        now = output_of("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
        most = max(most, len(now))
        for name, job in jobs.items():
            if len(told) < 2 and job in now and attempts(sweep, name) and name not in [left_alone, *told]:
                subprocess.run([["scontrol", "requeue", job], ["scancel", job]][len(told)], check=True)
                told.append(name)
        time.sleep(0.5)
    requeued, cancelled = told
    said, failed = process.communicate()
    assert "8 runs are to be trained, as jobs of SLURM" in said
    assert most == 2
    assert process.returncode == 1, said + failed
    assert "failed: InstanceNorm, b2, DiceCE, fold 1 (exit code 1)" in failed
    assert "14 of 16 runs are finished" in failed
    assert [attempt["code"] for attempt in attempts(sweep, requeued)][-1] == 0
    assert len(attempts(sweep, requeued)) == 2
    assert {attempt["job"] for attempt in attempts(sweep, requeued)} == {jobs[requeued]}
    status = sweep.run("nnunet-norm", "sweep", "status", "grid.yaml").stdout
    assert "16 runs: 14 done" in status
    assert "1 failed" in status
    assert "1 interrupted" in status
    assert [attempt["code"] for attempt in attempts(sweep, cancelled)] in ([-15], [None])

    (broken / "checkpoint_latest.pth").unlink()
    again = sweep.run("nnunet-norm", "sweep", "run", "grid.yaml", *AS_JOBS).stdout
    assert "14 runs are finished already" in again
    assert "2 runs are to be trained, as jobs of SLURM" in again
    assert "all 16 runs of grid are finished" in again
    assert sweep.run("nnunet-norm", "sweep", "run", "grid.yaml", *AS_JOBS).stdout.count("\n") == 2
