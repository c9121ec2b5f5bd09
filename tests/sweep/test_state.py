"""How far a run is, by what it left, its lock, its record and SLURM's queue."""

import os
from pathlib import Path

import pytest

from nnunet_norm.commands.sweep_status import cell, failures, table
from nnunet_norm.sweep.cluster import Queued
from nnunet_norm.sweep.finished import missing_of
from nnunet_norm.sweep.locking import locked, this_owner
from nnunet_norm.sweep.records import note_begin, note_end
from nnunet_norm.sweep.state import state_of
from nnunet_norm.sweep.task import record_of

TEXT = """
dataset: 4
configuration: 3d_fullres
folds: [0, 1]
npz: false
axes: {norm: [InstanceNorm, BRN]}
fixed: {epochs: 10}
"""


@pytest.fixture
def sweep(pretended):
    return pretended(TEXT)


def test_every_state_has_its_words(sweep):
    """From nothing to done; a lock says running, a code failed, a signal interrupted; SLURM's reason comes through."""
    grid = sweep.grid()
    run = grid.runs[0]
    record, owner = record_of(grid.folder, run.name), this_owner("tried")

    def told(queue=None):
        state = state_of(grid, run, queue)
        return state.kind, cell(run, state)

    waiting = {run.name: Queued("41_0", Path("none"), "PENDING (Priority)")}
    assert told() == ("pending", "pending")
    assert told(waiting) == ("queued", "queued")
    assert state_of(grid, run, waiting).detail == "job 41_0: PENDING (Priority)"
    note_begin(record, owner)
    assert told() == ("interrupted", "interrupted")
    with locked(grid.fold_folder(run), "tried"):
        assert told(waiting) == ("running", "0/10")
        sweep.train(run, epochs=4, moved=0, seconds=90)
        state = state_of(grid, run)
        assert (state.epochs_done, state.seconds_left, state.owner) == (4, 540, owner)
        assert cell(run, state) == f"4/10 {state.dice:.2f} 09:00"
        sweep.train(run, epochs=10, moved=0)
        assert told() == ("running", "10/10 validates")
    assert told({run.name: Queued("41_0", Path("none"), "RUNNING")}) == ("running", "10/10 validates")
    assert told(waiting) == ("queued", "queued 10/10")
    note_end(record, -15, [])
    assert told() == ("interrupted", "interrupted 10/10")
    note_begin(record, owner)
    note_end(record, 3, ["all is lost"])
    assert told() == ("failed", "failed 10/10")
    states = {one.name: state_of(grid, one) for one in grid.runs}
    lines = list(failures(grid, states))
    assert lines[0].startswith(f"failed: {run.point.label}, fold 0 (exit code 3); its log is {grid.folder}")
    assert lines[1:] == ["    all is lost"]
    sweep.finish(run, moved=0)
    assert told() == ("done", "done")
    assert table(grid, {one.name: state_of(grid, one) for one in grid.runs}) == [
        "point         fold 0   fold 1",
        "InstanceNorm  done     pending",
        "BRN           pending  pending",
    ]


def test_a_job_that_never_began_has_failed(sweep, tmp_path):
    """As one whose --slurm_setup fails: there is no record, and SLURM has forgotten it."""
    grid = sweep.grid()
    queue = {grid.runs[0].name: Queued("41_0", tmp_path / "log", "")}
    assert state_of(grid, grid.runs[0], queue).kind == "pending"  # cancelled while it waited: there is no log
    (tmp_path / "log").touch()
    assert state_of(grid, grid.runs[0], queue).kind == "failed"
    (tmp_path / "log").write_text("module: command not found\n")
    state = state_of(grid, grid.runs[0], queue)
    assert (state.kind, state.lines, state.log) == ("failed", ("module: command not found",), tmp_path / "log")


def test_what_a_training_lacks(sweep):
    """A whole final checkpoint, no later beginning, a validation with it, and probabilities where they are wanted."""
    run = sweep.grid().runs[0]
    folder = sweep.train(run, epochs=1, moved=0)
    final = folder / "checkpoint_final.pth"
    final.write_bytes(b"half")
    assert missing_of(folder) == "checkpoint_final.pth"
    sweep.finish(run, moved=0)
    assert missing_of(folder) is None
    assert missing_of(folder, npz=True) == "validation/*.npz"
    for case in sweep.cases(0):
        (folder / "validation" / f"{case}.npz").touch()
    assert missing_of(folder, npz=True) is None
    latest, later = folder / "checkpoint_latest.pth", final.stat().st_mtime + 100
    latest.touch()
    os.utime(latest, (later, later))
    assert "training that began since" in missing_of(folder)
    latest.unlink()
    os.utime(final, (later, later))
    assert missing_of(folder) == "validation/summary.json"
    (folder / "validation" / "summary.json").write_text("{")
    assert missing_of(folder) == "validation/summary.json"
