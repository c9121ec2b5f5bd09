"""sweep run and sweep status as commands: what is refused in one line, what is begun or submitted, and what is told."""

import json
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "sweep"))
from runs import SCRIPT

from nnunet_norm.cli import main
from nnunet_norm.commands import sweep_run
from nnunet_norm.sweep import locking
from nnunet_norm.sweep.task import Task

STOCK = Path(__file__).parent.parent / "stock_plans" / "nnUNetPlans.json"
DATASET = "Dataset004_X"
GRID = """
dataset: 4
configuration: 3d_fullres
folds: [0, 1]
gpus: 0
npz: false
axes: {norm: [InstanceNorm, BRN]}
fixed: {epochs: 5, batch: 3}
"""
MODELS = [f"nnUNetTrainer{norm}_5epochs__nnUNetPlans_b3__3d_fullres" for norm in ("InstanceNorm", "BRN")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """nnU-Net's folders with a preprocessed dataset of a few cases, a grid, and trainings that are pretended."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    plans = json.loads(STOCK.read_text()) | {"dataset_name": DATASET}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description | {"numTraining": 6}))
    cases = folder / plans["configurations"]["3d_fullres"]["data_identifier"]
    cases.mkdir()
    for number in range(6):
        (cases / f"case_{number}.b2nd").touch()
    (tmp_path / "grid.yaml").write_text(GRID)
    command = Task.command
    monkeypatch.setattr(Task, "command", lambda task: [sys.executable, str(SCRIPT), *command(task)[3:]])
    monkeypatch.setattr(locking, "MOMENT", 0.2)
    monkeypatch.setattr(sweep_run, "INTERVAL", 0.05)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results_of(place, model, fold):
    folder = place / "results" / DATASET / MODELS[model] / f"fold_{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def called(*words):
    return main(["sweep", *words])


def test_what_fails_is_told_and_the_same_command_goes_on(place, capsys):
    """Others are trained all the same; the code is 1; then what is finished is left out."""
    (results_of(place, 1, 0) / "fails").touch()
    with pytest.raises(SystemExit, match="1"):
        called("run", "grid.yaml", "--slots", "2", "--disable_progress_bar")
    said = capsys.readouterr()
    assert said.out.startswith(
        "grid: 2 points in 2 folds; 0 runs are finished already\n4 runs are to be trained, 2 at once;"
    )
    assert said.out.count("done: ") == 3
    assert "done: InstanceNorm, fold 0 (Dice 0.5000, after 00:" in said.out
    assert "failed: BRN, fold 0 (exit code 3, after 00:" in said.out
    assert said.err.splitlines()[-1].startswith("3 of 4 runs are finished; the same command again")
    assert "    all is lost" in said.err.splitlines()
    assert called("status", "grid.yaml") == 0
    assert "4 runs: 3 done, 1 failed" in capsys.readouterr().out
    # Before any training wants it, and as nnU-Net would have made it.
    split = json.loads((place / "preprocessed" / DATASET / "splits_final.json").read_text())
    assert [len(fold["val"]) for fold in split] == [2, 1, 1, 1, 1]

    (results_of(place, 1, 0) / "fails").unlink()
    assert called("run", "grid.yaml", "--disable_progress_bar") == 0
    said = capsys.readouterr().out
    assert "3 runs are finished already\n1 run is to be trained, 1 at once;" in said
    assert "all 4 runs of grid are finished" in said
    assert called("run", "grid.yaml") == 0
    assert "4 runs are finished already\nall 4" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(place, capsys):
    """It tells the points, their plans and what they cost."""
    assert called("run", "grid.yaml", "--dry-run", "--engine", "slurm") == 0
    said = capsys.readouterr().out
    assert "nnUNetTrainerBRN_5epochs" in said
    assert "nnUNetPlans_b3" in said
    assert "2 points x 2 folds = 4 trainings" in said
    assert not (place / "results").exists()
    assert not (place / "preprocessed" / DATASET / "nnUNetPlans_b3.json").exists()


def test_jobs_are_submitted_for_what_nobody_has(place, cluster, capsys):
    """Neither finished nor queued nor running ones; a job whose log is all that is left is submitted anew."""
    folder = results_of(place, 0, 0)
    with zipfile.ZipFile(folder / "checkpoint_final.pth", "w") as checkpoint:
        checkpoint.writestr("nothing", "")
    (folder / "validation").mkdir()
    (folder / "validation" / "summary.json").write_text('{"metric_per_case": []}')
    assert called("run", "grid.yaml", "--engine", "slurm", "--slurm_array_limit", "2", "--slurm_minutes", "60") == 0
    said = capsys.readouterr().out
    assert "1 run is finished already\n3 runs are to be trained, as jobs of SLURM;" in said
    assert "submitted 41_0 to 41_2\n" in said
    script = (cluster / "script_41").read_text()
    for line in ("array=0-2%2", "time=60", "cpus-per-task=8", "nodes=1"):
        assert f"#SBATCH --{line}\n" in script
    assert "gpus" not in script
    (cluster / "queue").write_text("41_0 PENDING (Resources)\n41_2 RUNNING None\n")
    assert called("run", "grid.yaml", "--engine", "slurm") == 0
    said = capsys.readouterr().out
    assert "1 run is to be trained, as jobs of SLURM;" in said
    assert "\n2 runs are queued or running already\n" in said
    assert "submitted 42\n" in said
    assert called("run", "grid.yaml") == 2
    assert "SLURM has 2 jobs of this sweep (41_0, ...): wait for them, or cancel them" in capsys.readouterr().err
    assert called("status", "grid.yaml") == 0
    said = capsys.readouterr().out
    assert "queued: 1 PENDING (Resources)" in said
    (cluster / "queue").unlink()
    (cluster / "why").write_text("Unable to contact slurm controller")
    assert called("run", "grid.yaml", "--engine", "slurm") == 2
    assert "SLURM does not say whether job 41_0 of this sweep is still there" in capsys.readouterr().err
    (cluster / "why").write_text("Invalid job id specified")
    with pytest.raises(SystemExit, match="1"):
        called("run", "grid.yaml", "--engine", "slurm", "--slurm_wait", "--disable_progress_bar")
    assert "1 of 4 runs are finished" in capsys.readouterr().err


def test_a_folder_of_another_sweep_is_refused_by_name(place, cluster, capsys):
    """By both engines; and a second command for the same grid, while the first one is at work."""
    with locking.locked(results_of(place, 1, 1), "other"):
        for engine in ("local", "slurm"):
            assert called("run", "grid.yaml", "--engine", engine) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{MODELS[1]}/fold_1 is being written to by sweep other (process " in line
    assert not (cluster / "count").exists()
    with locking.locked(place / "results" / DATASET / "sweeps" / "grid__3d_fullres", "grid"):
        assert called("run", "grid.yaml") == 2
        assert "sweeps/grid__3d_fullres is being written to by sweep grid (process " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--slots", "0"], "--slots 0: must be at least 1"),
        (["--slots", "2", "--engine", "slurm"], "--slots 2 is for --engine local"),
        (["--slurm_wait"], "--slurm_wait is for --engine slurm"),
        (["--engine", "slurm", "--slurm_minutes", "0"], "minutes 0 of a job must be 1 or more"),
        (["-device", "cuda"], "-device cuda: the grid has gpus: 0"),
        (["-f", "7"], "folds has 7"),
    ],
)
def test_flags_that_do_not_go_together(place, cluster, capsys, words, expected):
    """In one line; nothing is begun."""
    assert called("run", "grid.yaml", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nnunet-norm sweep: ")
    assert expected in line
    assert not (place / "results").exists()


def test_several_machines_need_slurm(place, capsys):
    """A grid's nodes are jobs' machines."""
    (place / "grid.yaml").write_text(GRID.replace("gpus: 0", "gpus: 1\nnodes: 2").replace("batch: 3", "batch: 4"))
    assert called("run", "grid.yaml") == 2
    assert "nodes 2 of the grid: several machines need --engine slurm" in capsys.readouterr().err


def test_debug_trains_in_this_process(place, monkeypatch):
    """With the arguments of nnU-Net's program; an error goes on to the caller, and what is finished is left out."""
    from nnunet_norm.training import launch

    calls = []

    def train(words):
        calls.append(words)
        raise KeyError("its own error")

    monkeypatch.setattr(launch, "main", train)
    with pytest.raises(KeyError, match="its own error"):
        called("run", "grid.yaml", "--engine", "debug")
    expected = f"{DATASET} 3d_fullres 0 -tr nnUNetTrainerInstanceNorm_5epochs -p nnUNetPlans_b3 --c -device cpu"
    assert [" ".join(words) for words in calls] == [expected]
