"""The console script: what it answers, what it refuses, and how."""

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunet_norm import __version__, cli
from nnunet_norm.errors import PlansError

HEAVY_ONES_LOADED = "sys.exit(' '.join({'torch', 'nnunetv2', 'numpy', 'scipy'} & set(sys.modules)) or None)"
"""Ends a `python -c` with code 0, or with code 1 and the names of what was loaded."""

REFUSAL = "-p: no plans file 'nnUNetPlans_x.json' in '/data'; derive it with `nnunet-norm plan`"


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def _replace_plan(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Puts a command in the place of ``plan`` that takes no arguments and raises ``error``."""

    def run(args: argparse.Namespace) -> None:
        raise error

    module = SimpleNamespace(__doc__="Fail.", add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "nnunet_norm.commands.plan", module)


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces exit code 2 and the usage on stderr when no command is named."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    assert "the following arguments are required: COMMAND" in capsys.readouterr().err


def test_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that a command that does not exist is named in the refusal, beside every one that does."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["trian"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "'trian'" in said
    assert all(command in said for command in cli.COMMANDS)


def test_a_command_is_not_abbreviated() -> None:
    """Enforces that flags are written out: an abbreviation would change its meaning when a flag is added."""
    with pytest.raises(SystemExit):
        cli.main(["trainers-dir", "--deb"])


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that --version prints what the package's metadata says."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == __version__ == importlib.metadata.version("nnunet_norm")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_module(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that each command of the list can be imported and describes itself under -h."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "-h"])
    assert exit_.value.code == 0
    module = importlib.import_module("nnunet_norm.commands." + command.replace("-", "_"))
    assert module.__doc__.strip().splitlines()[0] in capsys.readouterr().out


def test_trainers_dir_answers_without_torch(tmp_path: Path) -> None:
    """Enforces that the command of the export line, run in every shell, loads neither torch nor nnU-Net."""
    code = f"import sys; from nnunet_norm import cli; cli.main(['trainers-dir']); {HEAVY_ONES_LOADED}"
    result = _python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (Path(result.stdout.strip()) / "nnunet_norm_trainers.py").is_file()


def test_package_runs_no_code_on_import(tmp_path: Path) -> None:
    """Enforces that `import nnunet_norm` loads nothing heavy."""
    result = _python("-c", f"import sys, nnunet_norm; {HEAVY_ONES_LOADED}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_refusal_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces that an error of nnunet_norm.errors reaches the user as one line on stderr, without a traceback."""
    _replace_plan(monkeypatch, PlansError(REFUSAL))
    assert cli.main(["plan"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"nnunet-norm plan: {REFUSAL}\n")


@pytest.mark.parametrize("argv", [["--debug", "plan"], ["plan", "--debug"]], ids=["before", "after"])
def test_debug_shows_the_traceback(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces that --debug, before or after the command, lets the error through for Python to show."""
    _replace_plan(monkeypatch, PlansError(REFUSAL))
    with pytest.raises(PlansError, match=r"no plans file 'nnUNetPlans_x\.json' in '/data'"):
        cli.main(argv)


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces the shell's exit code for Ctrl-C, 128 + 2, and no traceback."""
    _replace_plan(monkeypatch, KeyboardInterrupt())
    assert cli.main(["plan"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_errors_of_programming_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces that anything but a refusal keeps its traceback: no broad except hides a bug."""
    _replace_plan(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["plan"])
