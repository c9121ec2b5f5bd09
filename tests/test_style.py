"""The same three checks that pre-commit and CI run, so that `pytest` alone tells whether the house is in order."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check"], id="ruff check"),
        pytest.param(["ruff", "format", "--check", "--diff"], id="ruff format"),
        # The cache lies in the checkout (.mypy_cache), where the next run finds it.
        pytest.param(["mypy"], id="mypy"),
    ],
)
def test_tool_has_nothing_to_say(command: list[str]) -> None:
    """Enforces ruff's rules, ruff's format and mypy --strict, as pyproject.toml sets them, on the whole checkout."""
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
