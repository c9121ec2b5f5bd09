"""The README and the pages of docs/ are a contract: commands exist, flags parse, names resolve, links lead somewhere."""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import yaml
import zarr
from nnunetv2.inference import predict_from_raw_data

from nnunet_norm import cli
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.settings import BLOCK, NormSettings
from nnunet_norm.sweep.grid_file import parse_grid
from nnunet_norm.trainers import nnunet_norm_trainers
from nnunet_norm.volumes.ome import read_multiscale

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STOCK_PLANS = ROOT / "tests" / "stock_plans" / "nnUNetPlans.json"
HOW_TO = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *HOW_TO]
TOLD = README + "\n".join((ROOT / page).read_text(encoding="utf-8") for page in HOW_TO)
"""What people copy from, and hold true."""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TOLD, flags=re.MULTILINE | re.DOTALL)


def _verbs(text: str) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w-])nnunet-norm ([a-z][a-z-]*)", text)))


CODE_LINES = [line for block in _blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
CALLS = [call.strip() for line in CODE_LINES for call in re.findall(r"(?<![\w-])nnunet-norm ([^)&|;#]*)", line)]
JSON, YAML = _blocks("json"), _blocks("yaml")
VERBS = _verbs(TOLD)
# A model's folder is named trainer__plans__configuration.
TRAINERS = sorted({name.split("__")[0] for name in re.findall(r"\bnnUNetTrainer[A-Z_]\w*", TOLD)})


def _one_line_commands(last_word: str) -> list[str]:
    return [line for line in CODE_LINES if line.startswith("python3 -m venv ") and line.endswith(last_word)]


def _stock_parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that ``nnUNetv2_predict`` builds, caught at the moment it reads the command line."""
    caught: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser) -> None:
        caught.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(SystemExit):
        predict_from_raw_data.predict_entry_point()
    return caught[0]


def _flags(parser: argparse.ArgumentParser) -> dict[str, object]:
    """How many values each flag takes."""
    return {flag: action.nargs for action in parser._actions for flag in action.option_strings}


def test_two_commands_set_everything_up() -> None:
    """Enforces one line that ends in the demo and one that ends in the tests, each exactly once, nothing else needed."""
    assert [len(_one_line_commands(word)) for word in ("nnunet-norm demo", "/pytest")] == [1, 1]
    assert len(_one_line_commands("")) == 2


def test_ci_runs_the_test_command_word_for_word() -> None:
    """Enforces that .ci/run takes its command from the README."""
    script = ["bash", str(ROOT / ".ci" / "run"), "--show"]
    result = subprocess.run(script, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert [result.stdout.rstrip("\n")] == _one_line_commands("/pytest")


@pytest.mark.parametrize("lines", [0, 2])
def test_ci_refuses_a_readme_without_one_test_command(lines: int, tmp_path: Path) -> None:
    """Enforces that .ci/run fails, and says why, rather than passing on no test at all."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "README.md").write_text("# Title\n" + "python3 -m venv .venv && .venv/bin/pytest\n" * lines)
    script = ["bash", str(tmp_path / ".ci" / "run")]
    result = subprocess.run(script, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 1
    assert f"README.md has {lines} lines" in result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page: str) -> None:
    """Enforces that every linked file and picture of the repository exists."""
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r"""(?:src|href)=["']([^"'#]+)""", text)
    missing = [target for target in targets if "://" not in target and not (folder / target).exists()]
    assert not missing


def test_paths_of_the_map_exist() -> None:
    """Enforces that the map of the house in CONTRIBUTING.md names only files and folders that are there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:nnunet_norm|trainers|plans|tests|benchmarks)/[\w./]*)`", text))
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_exist(verb: str) -> None:
    """Enforces that every ``nnunet-norm <verb>`` that a page names is a command."""
    assert verb in cli.COMMANDS


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_every_command_is_in_the_readme(verb: str) -> None:
    """Enforces that no command is left out of the README."""
    assert verb in _verbs(README)


@pytest.mark.parametrize("call", sorted(set(CALLS)))
def test_calls_parse(call: str) -> None:
    """Enforces that each call of a code block is accepted as it stands: flags known, required ones given, types right."""
    argv = shlex.split(call)
    assert cli.build_parser(argv).parse_args(argv).command == argv[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_names_resolve(name: str) -> None:
    """Enforces that every trainer that a page names is an attribute of the module in which nnU-Net looks for it."""
    assert getattr(nnunet_norm_trainers, name).__name__ == name


def test_settings_block_is_valid_and_complete() -> None:
    """Enforces that the plans block of the pages is read without a refusal and shows every setting that there is."""
    block, _ = JSON
    configuration = json.loads(f"{{{block}}}")
    settings = NormSettings.from_configuration(configuration)
    assert configuration[BLOCK] == json.loads(json.dumps(dataclasses.asdict(settings)))


def test_experimental_batches_are_valid() -> None:
    """Enforces that the example of a file of experimental batches is read without a refusal."""
    _, file = JSON
    assert ExperimentalBatches.from_json(json.loads(file)).names == ("plate_1", "plate_2")


def test_the_grid_is_valid() -> None:
    """Enforces that the sweep that people copy is one."""
    grid, smallest = (parse_grid(yaml.safe_load(text), "sweeps.md", name="docs") for text in YAML)
    assert sorted(grid.axes) == ["batch_size", "loss", "norm", "patch_size"]
    assert len(grid.exclude) == 1
    assert smallest.axes == {"norm": ["InstanceNorm", "BRN"]}


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces that the Python of the pages can be copied, one example after the other; what needs a model is imported."""
    monkeypatch.chdir(tmp_path)
    image = SimpleITK.GetImageFromArray(np.ones((8, 40, 33), np.float32))
    image.SetSpacing((1, 2, 3))
    SimpleITK.WriteImage(image, "IMAGE.nii.gz")
    Path("PREPROCESSED_DATASET").mkdir()
    shutil.copy(STOCK_PLANS, "PREPROCESSED_DATASET/nnUNetPlans.json")
    names: dict[str, object] = {}
    for example in _blocks("python"):
        lines = [line for line in example.splitlines() if "MODEL_FOLDER" not in example or " import " in line]
        exec(compile("\n".join(lines), "example", "exec"), names)
    assert type(list(names["network"])[1]).__name__ == "BatchRenorm2d"
    assert names["halo"] == ((2, 2), (2, 2))
    volume = zarr.open_group("VOLUME.zarr", mode="r")
    assert volume["0"].shape == (8, 40, 33)
    level = read_multiscale(volume.attrs.asdict()).levels[0]
    assert level.spacing == (3.0, 2.0, 1.0)
    assert Path("PREPROCESSED_DATASET/nnUNetPlans_b8.json").is_file()


def test_programs_of_nnunet_exist() -> None:
    """Enforces that every ``nnUNetv2_...`` that a page names is a program of the installed nnU-Net."""
    programs = importlib.metadata.entry_points(group="console_scripts").names
    assert set(re.findall(r"nnUNetv2_\w+", TOLD)) <= set(programs)


def test_predict_takes_the_flags_of_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces what the README says about commands that nnU-Net prints: every flag but -step_size can stay."""
    parser = cli.build_parser(["predict"])
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    stock = _flags(_stock_parser(monkeypatch))
    del stock["-step_size"]
    assert stock.items() <= _flags(commands.choices["predict"]).items()
