"""What pip installs: one top-level name with the trainers and plans inside it, in a wheel and in an editable install."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nnunet_norm import __version__

ROOT = Path(__file__).resolve().parent.parent

SOURCES = ("nnunet_norm", "trainers", "plans", "pyproject.toml", "README.md", "LICENSE")
"""All that the build reads."""

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _run(command: list[str], cwd: Path, **environment: str) -> str:
    """The stdout of a command that must end well, started in ``cwd`` with nothing but ``environment`` added."""
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy: setuptools leaves its ``build/`` beside the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    target = tmp_path_factory.mktemp("wheel")
    _run([*PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target)], cwd=copy)
    (built,) = target.glob("*.whl")
    return built


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_has_one_top_level_name(wheel: Path) -> None:
    """Enforces that neither ``trainers`` nor ``plans`` (nor ``tests``) becomes a global import name."""
    top = {name.split("/")[0] for name in _names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"nnunet_norm"}


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    """Enforces that no package is forgotten in pyproject.toml's list, and that the types' marker is shipped."""
    expected = {"nnunet_norm/py.typed"}
    for folder, prefix in {"nnunet_norm": "", "trainers": "nnunet_norm/", "plans": "nnunet_norm/"}.items():
        expected |= {prefix + path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in _names(wheel) if ".dist-info/" not in name} == expected


def test_installed_wheel_finds_its_trainers(wheel: Path, tmp_path: Path) -> None:
    """Enforces that an installed wheel has ``nnunet-norm``, and that trainers-dir names the installed folder."""
    site = tmp_path / "site"
    _run([*PIP, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], cwd=tmp_path)
    said = _run([str(site / "bin" / "nnunet-norm"), "trainers-dir"], cwd=tmp_path, PYTHONPATH=str(site))
    folder = Path(said.strip())
    assert folder == site / "nnunet_norm" / "trainers"
    assert (folder / "nnunet_norm_trainers.py").is_file()


@pytest.mark.parametrize("package", ["trainers", "plans"])
def test_installation_under_test_keeps_folders_inside(package: str, tmp_path: Path) -> None:
    """Enforces, however this package is installed here, that the folders are found inside it and not outside."""
    code = (
        "import importlib.util; from importlib.resources import files; "
        f"assert importlib.util.find_spec('{package}') is None; print(files('nnunet_norm.{package}'))"
    )
    folder = Path(_run([sys.executable, "-c", code], cwd=tmp_path).strip())
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in (ROOT / package).glob("*.py")}


def test_checkout_and_installation_are_the_same_version(wheel: Path) -> None:
    """Enforces that the version stands the same in pyproject.toml and in ``nnunet_norm.__version__``."""
    assert wheel.name.startswith(f"nnunet_norm-{__version__}-")
