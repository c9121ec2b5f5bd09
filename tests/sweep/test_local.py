"""The local engine: as many at once as there are slots, a failure stops nothing, and nothing is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from runs import SCRIPT, lives, task, trains, until

from nnunet_norm.errors import SweepError
from nnunet_norm.sweep.local import gpu_slots, run_local
from nnunet_norm.sweep.records import read_attempts

SWEEP = f"""
import sys
from pathlib import Path
sys.path.append({str(SCRIPT.parent)!r})
from runs import task
from nnunet_norm.sweep.local import run_local
run_local([task(Path(sys.argv[1]), name) for name in "abc"], [dict()] * 2)
"""


def test_a_failure_does_not_stop_the_others(tmp_path):
    """Each is told of when it ends, with its code and its last lines; no more at once than there are slots."""
    tasks = [task(tmp_path, name) for name in "abcd"]
    (tasks[1].results / "fails").touch()
    begun, codes, most = [], {}, []

    def ended(end):
        codes[end.task.results.parent.name] = end.code
        begun.remove(end.task)
        if end.code:
            assert end.output.endswith("all is lost\n")

    def began(one):
        begun.append(one)
        most.append(len(begun))

    run_local(tasks, [{}, {}], began=began, ended=ended)
    assert codes == {"a": 0, "b": 3, "c": 0, "d": 0}
    assert max(most) <= 3  # the next one may begin before the last one was told of


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_ends_takes_its_trainings_with_it(tmp_path, number):
    """In order after Ctrl-C, which is noted; killed after a kill. What had not begun does not begin."""
    tasks = [task(tmp_path, name) for name in "abc"]
    for one in tasks:
        (one.results / "waits").touch()
    with subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)], stderr=subprocess.PIPE, text=True) as sweep:
        trainings = [trains(one) for one in tasks[:2]]
        sweep.send_signal(number)
        said = sweep.communicate(timeout=60)[1]
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    until(lambda: not any(map(lives, trainings)))
    codes = [[attempt.code for attempt in read_attempts(one.record)] for one in tasks]
    assert codes == ([[-2], [-2], []] if number == signal.SIGINT else [[None], [None], []])


@pytest.mark.parametrize(
    ("visible", "available", "gpus", "wanted", "expected"),
    [
        (None, 4, 1, None, ["0", "1", "2", "3"]),
        (None, 5, 2, None, ["0,1", "2,3"]),
        ("3,1", 2, 1, None, ["3", "1"]),
        ("GPU-a,GPU-b", 2, 2, None, ["GPU-a,GPU-b"]),
        (None, 4, 1, 2, ["0", "1"]),
    ],
)
def test_slots_are_gpus(monkeypatch, visible, available, gpus, wanted, expected):
    """Those that CUDA_VISIBLE_DEVICES leaves, as many to each as a run takes."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(available, gpus, wanted)] == expected


def test_too_few_gpus_are_refused(monkeypatch):
    """With the number that is there."""
    with pytest.raises(SweepError, match="gpus 4: this machine has 2"):
        gpu_slots(2, 4)
    with pytest.raises(SweepError, match="--slots 3: 2 GPUs are enough for 2 runs of 1 at once"):
        gpu_slots(2, 1, 3)


def test_a_slot_is_seen_by_its_run_alone(tmp_path):
    """As its environment."""
    one = task(tmp_path)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = []
    run_local(
        [one], [{"CUDA_VISIBLE_DEVICES": "7", "PYTHONVERBOSE": ""}], began=lambda started: seen.append(environment(one))
    )
    assert "CUDA_VISIBLE_DEVICES=7" in seen[0]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def environment(one):
    return Path(f"/proc/{trains(one)}/environ").read_text(encoding="utf-8").split("\0")
