"""A training that was started again goes on with its own checkpoints, and with no other's."""

import json
import os

import pytest
import torch

from nnunet_norm.errors import LaunchError, OutputError
from nnunet_norm.training.restarting import MARKER, agent, begin_or_resume, newest_checkpoint

FINAL, LATEST, BEST = (f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))


def write(folder, name, seconds, content=0):
    """A checkpoint of an age, in place of the one before as the trainers write it."""
    beside = folder / "beside"
    torch.save({"content": torch.full((4,), content)}, beside)
    os.utime(beside, (seconds, seconds))
    beside.replace(folder / name)


def test_the_newest_whole_checkpoint_counts(tmp_path):
    """Not the final one of an older training, and not one that was cut off."""
    assert newest_checkpoint(tmp_path) is None
    write(tmp_path, BEST, 2000)
    write(tmp_path, LATEST, 3000)
    assert newest_checkpoint(tmp_path) == tmp_path / LATEST
    write(tmp_path, FINAL, 1000)
    assert newest_checkpoint(tmp_path) == tmp_path / LATEST
    (tmp_path / LATEST).write_bytes((tmp_path / LATEST).read_bytes()[:100])
    (tmp_path / FINAL).unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / BEST


def test_a_finished_training_is_finished(tmp_path):
    """Also in a copy whose best checkpoint got the later time."""
    write(tmp_path, FINAL, 1000)
    write(tmp_path, BEST, 2000)
    assert newest_checkpoint(tmp_path) == tmp_path / FINAL
    write(tmp_path, LATEST, 1500)  # another training has begun
    assert newest_checkpoint(tmp_path) == tmp_path / BEST


def test_a_run_goes_on_with_what_it_wrote_itself(tmp_path):
    """Whatever the clock says: its first checkpoint looks older than what an older training left."""
    write(tmp_path, FINAL, 5000)
    write(tmp_path, BEST, 4000)
    assert begin_or_resume(tmp_path, ["a", "b"]) is None
    assert begin_or_resume(tmp_path, ["a", "b"]) is None  # started again before it wrote any
    write(tmp_path, BEST, 3000, content=1)
    assert begin_or_resume(tmp_path, ["a", "b"]) == tmp_path / BEST
    write(tmp_path, LATEST, 3500)
    assert begin_or_resume(tmp_path, ["a", "b"]) == tmp_path / LATEST
    (tmp_path / LATEST).unlink()
    write(tmp_path, FINAL, 6000, content=2)
    assert begin_or_resume(tmp_path, ["b", "a"]) == tmp_path / FINAL


def test_another_run_starts_afresh(tmp_path):
    """Also with the same name of the meeting, which users keep: what counts is who runs."""
    begin_or_resume(tmp_path, ["a"])
    write(tmp_path, FINAL, 1000)
    assert begin_or_resume(tmp_path, ["a"]) == tmp_path / FINAL
    assert begin_or_resume(tmp_path, ["c"]) is None
    assert begin_or_resume(tmp_path, ["c"]) is None


def test_a_machine_that_is_replaced_does_not_make_another_run(tmp_path):
    """Each time one of the two stays."""
    begin_or_resume(tmp_path, ["a", "b"])
    write(tmp_path, LATEST, 1000)
    for agents in (["a", "c"], ["c", "d"], ["d", "e"]):
        assert begin_or_resume(tmp_path, agents) == tmp_path / LATEST


def test_two_runs_in_one_folder_are_refused(tmp_path, monkeypatch):
    """The second while the first goes on; and a restart of the first after a second one began all the same."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    begin_or_resume(tmp_path, [agent()])  # this process's parent: it runs
    with pytest.raises(LaunchError, match=rf"a training goes on in .* \(process {os.getppid()}\)"):
        begin_or_resume(tmp_path, ["host 1 2"])
    assert begin_or_resume(tmp_path, [agent()], started_again=True) is None
    (tmp_path / MARKER).write_text(json.dumps({"agents": ["host 1 2"], "before": {}}))
    with pytest.raises(LaunchError, match=r"another training began in .* after this one"):
        begin_or_resume(tmp_path, [agent()], started_again=True)


@pytest.mark.parametrize("content", ["", "[]", '{"agents": 3}', json.dumps({"agents": ["a"]})])
def test_a_marker_that_is_not_ours_counts_for_nothing(tmp_path, content):
    """The run begins, and the next start knows it."""
    write(tmp_path, LATEST, 1000)
    (tmp_path / MARKER).write_text(content)
    assert begin_or_resume(tmp_path, ["a"]) is None
    write(tmp_path, LATEST, 2000, content=1)
    assert begin_or_resume(tmp_path, ["a"]) == tmp_path / LATEST


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere/\.nnunet_norm_run\.json cannot be written"):
        begin_or_resume(tmp_path / "nowhere", ["a"])


def test_the_agent_is_the_process_that_started_this_one(monkeypatch):
    """Only under torchrun; the same at every call."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert agent() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert f" {os.getppid()} " in agent()
    assert agent() == agent()
