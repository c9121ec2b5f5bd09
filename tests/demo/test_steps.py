import errno
import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest

from nnunet_norm.demo.process import run_logged
from nnunet_norm.demo.run import run_demo
from nnunet_norm.demo.steps import Programs, Step, continue_flag, is_trained, run_steps, segmentation, steps
from nnunet_norm.demo.tilings import HALO
from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.errors import NnunetNormError, OutputError, SetupError


@pytest.fixture
def space(tmp_path):
    space = Workspace(tmp_path / "demo", DemoSettings(epochs=2, seed=3))
    space.prepare()
    return space


def write_checkpoint(path, whole=True):
    """What torch writes, a zip archive, or its first half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"x" * 1000)
    if not whole:
        path.write_bytes(path.read_bytes()[:500])


def counting_step(tmp_path, name, calls):
    result = tmp_path / name
    return Step(name, result.exists, lambda: (calls.append(name), result.touch()))


# --- resuming ---


def test_a_second_run_repeats_nothing(tmp_path, capsys):
    """A step whose result is there is not run again; one whose result is gone is."""
    calls = []
    todo = [counting_step(tmp_path, name, calls) for name in ("one", "two")]
    run_steps(todo)
    (tmp_path / "two").unlink()
    run_steps(todo)
    assert calls == ["one", "two", "two"]
    assert "[1/2] one: done before" in capsys.readouterr().out


def test_a_step_that_fails_is_not_taken_for_done(tmp_path):
    """What follows a failed step does not run, and a step without result is an error of its own."""
    calls = []
    todo = [Step("broken", (tmp_path / "none").exists, lambda: None), counting_step(tmp_path, "next", calls)]
    with pytest.raises(NnunetNormError, match="'broken' ended without its result"):
        run_steps(todo)
    assert calls == []


def test_a_full_disk_is_one_line():
    """What the system says is passed on with the step that met it."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"step 'big' could not write its result: .*No space left on device"):
        run_steps([Step("big", lambda: False, full)])


def test_every_step_begins_undone(space):
    """An empty folder counts for nothing."""
    assert not any(step.done() for step in steps(space))


def test_training_is_done_only_with_its_validation(space):
    """The final checkpoint alone is not the result: table and figure need the validation's report."""
    fold = space.fold("BatchRenorm")
    assert fold.parent.name == "nnUNetTrainerBRN_2epochs__demo__2d"
    write_checkpoint(fold / "checkpoint_final.pth")
    assert not is_trained(fold)
    (fold / "validation").mkdir()
    for name in ("summary.json", "norm_report.json"):
        (fold / "validation" / name).touch()
    assert is_trained(fold)
    write_checkpoint(fold / "checkpoint_final.pth", whole=False)
    assert not is_trained(fold)


@pytest.mark.parametrize(
    ("whole", "broken", "flag"),
    [
        ([], [], []),
        (["checkpoint_best.pth"], [], ["--c"]),
        (["checkpoint_latest.pth", "checkpoint_best.pth"], [], ["--c"]),
        (["checkpoint_final.pth"], [], ["--val"]),
        (["checkpoint_best.pth"], ["checkpoint_final.pth"], ["--c"]),
        ([], ["checkpoint_latest.pth"], []),
    ],
)
def test_training_goes_on_from_the_best_that_is_whole(tmp_path, whole, broken, flag):
    """nnU-Net takes the final, latest or best checkpoint in this order; a half-written one must be out of its way."""
    for name in whole:
        write_checkpoint(tmp_path / name)
    for name in broken:
        write_checkpoint(tmp_path / name, whole=False)
    assert continue_flag(tmp_path) == flag
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(whole)


# --- the folder ---


def test_a_folder_with_other_settings_is_refused(space):
    """Results of two settings never meet in one table; the line names both and the remedy."""
    other = Workspace(space.folder, DemoSettings(epochs=5, seed=3))
    with pytest.raises(
        OutputError, match=r"epochs 2, seed 3, and recipe 1, epochs 5, seed 3 was asked for: choose another folder"
    ):
        other.prepare()


def test_a_folder_with_other_files_is_refused(tmp_path):
    """The demo writes into nobody's folder."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match=f"-o {tmp_path} holds other files and no demo"):
        Workspace(tmp_path, DemoSettings()).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    """One line with the system's reason."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"-o .*file/demo cannot be written: Not a directory"):
        Workspace(tmp_path / "file" / "demo", DemoSettings()).prepare()


@pytest.mark.parametrize(
    ("options", "line"),
    [({"epochs": 0, "seed": 0}, "--epochs 0: a training needs"), ({"epochs": 1, "seed": -1}, "--seed -1: it must be")],
)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, options, line):
    """The folder is not made for a demo that cannot be."""
    with pytest.raises(SetupError, match=line):
        run_demo(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()


def test_the_environment_is_ours_and_only_the_programs_have_it(space, monkeypatch):
    """The user's nnU-Net folders and settings do not reach the programs, and this process's environment stays."""
    monkeypatch.setenv("nnUNet_results", "/elsewhere")
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    environment = space.environment(nnUNet_n_proc_DA="1")
    assert environment["nnUNet_results"] == str(space.folder / "nnUNet_results")
    assert "nnUNet_wandb_enabled" not in environment
    assert environment["nnUNet_n_proc_DA"] == "1"
    assert os.environ["nnUNet_results"] == "/elsewhere"
    assert os.path.exists(os.path.join(environment["nnUNet_extTrainer"], "nnunet_norm_trainers.py"))


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_program_left_behind_keeps_the_folder(space):
    """Two trainings never write into one results folder: a program that inherited the lock holds it until it ends."""
    with space.locked() as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with pytest.raises(SetupError, match="in use by another demo"), space.locked():
        pass
    left.communicate(b"\n")
    with space.locked():
        pass


# --- programs ---


def test_a_failing_program_is_named_with_its_log(space):
    """The output is in the log, the line names program, exit code and log."""
    log = space.logs / "step.log"
    with pytest.raises(NnunetNormError, match=rf"failed \(exit code 3\): its output is in {log}"):
        run_logged([sys.executable, "-c", "print('why'); raise SystemExit(3)"], log, space.environment())
    assert log.read_text().splitlines()[-1] == "why"


def test_a_missing_program_is_named(space):
    """No traceback about files, but what to install."""
    with pytest.raises(SetupError, match="nnUNetv2_nothing is not on the PATH"):
        run_logged(["nnUNetv2_nothing"], space.logs / "step.log", space.environment())


def test_every_line_is_handed_on_once(space):
    """Carriage returns of progress bars end lines too, and a first run's lines are not those of the second."""
    log, lines = space.logs / "step.log", []
    code = "import sys; sys.stdout.write('a\\rb\\nc\\n')"
    for _ in range(2):
        lines.clear()
        run_logged([sys.executable, "-c", code], log, space.environment(), lines.append)
    assert lines == ["a", "b", "c"]


def test_an_interrupted_demo_ends_its_program(space):
    """No training goes on in the background after Ctrl-C."""
    pids = []

    def interrupt(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code], space.logs / "step.log", space.environment(), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIGCONT)


def test_settings_are_kept_in_the_folder(space):
    """What a folder was made with can be read by people too."""
    assert json.loads((space.folder / "demo.json").read_text()) == {"recipe": 1, "epochs": 2, "seed": 3}


def test_the_comparison_runs_what_is_installed_wherever_the_demo_is_started(space, tmp_path, monkeypatch):
    """In a checkout, ``python -m`` would take the folder nnunet_norm in front of what pip has installed."""
    commands = []
    monkeypatch.setattr(Programs, "_run", lambda self, name, command, *_, **__: commands.append(command))
    Programs(space, None).compare_tilings("BatchRenorm")
    (command,) = commands
    (tmp_path / "nnunet_norm").mkdir()
    (tmp_path / "nnunet_norm" / "__init__.py").write_text("raise SystemExit('the checkout')")
    program = command[: command.index("--model")]
    done = subprocess.run([*program, "--help"], cwd=tmp_path, env=space.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchRenorm"])
def test_tiles_are_asked_for_with_statistics_that_they_can_have(space, monkeypatch, norm):
    """``nnunet-norm predict`` refuses tiles with an InstanceNorm network unless their own statistics are asked for."""
    commands = []

    def run(programs, name, command):
        commands.append(command)
        (segmentation(space, norm, HALO).parent.with_name(f".partial_{name.removeprefix('predict_')}")).mkdir(
            parents=True
        )

    monkeypatch.setattr(Programs, "_run", run)
    Programs(space).predict(norm, HALO)
    (command,) = commands
    assert "--tile-size" in command
    assert command[-2:] == (["--population", "tile"] if norm == "InstanceNorm" else ["--halo", "20"])
