"""The README is a contract: its commands exist, its flags parse, its names resolve, its links lead somewhere."""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from nnunetv2.inference import predict_from_raw_data

from nnunet_norm import cli
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.settings import BLOCK, NormSettings
from nnunet_norm.sweep.grid_file import parse_grid
from nnunet_norm.trainers import nnunet_norm_trainers

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]

BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
CODE_LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
CALLS = [call.strip() for line in CODE_LINES for call in re.findall(r"(?<![\w-])nnunet-norm ([^)&|;#]*)", line)]
JSON = re.findall(r"^```json\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
VERBS = sorted(set(re.findall(r"(?<![\w-])nnunet-norm ([a-z][a-z-]*)", README)))
# A model's folder is named trainer__plans__configuration.
TRAINERS = sorted({name.split("__")[0] for name in re.findall(r"\bnnUNetTrainer[A-Z_]\w*", README)})
YAML = re.findall(r"^```yaml\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


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
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r"""(?:src|href)=["']([^"'#]+)""", text)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_paths_of_the_map_exist() -> None:
    """Enforces that the map of the house in CONTRIBUTING.md names only files and folders that are there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:nnunet_norm|trainers|plans|tests|benchmarks)/[\w./]*)`", text))
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_exist(verb: str) -> None:
    """Enforces that every ``nnunet-norm <verb>`` that the README names is a command."""
    assert verb in cli.COMMANDS


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_every_command_is_in_the_readme(verb: str) -> None:
    """Enforces that no command is left out of the README."""
    assert verb in VERBS


@pytest.mark.parametrize("call", CALLS)
def test_calls_parse(call: str) -> None:
    """Enforces that each call of a code block is accepted as it stands: flags known, required ones given, types right."""
    argv = shlex.split(call)
    assert cli.build_parser(argv).parse_args(argv).command == argv[0]


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_names_resolve(name: str) -> None:
    """Enforces that every trainer of the README is an attribute of the module in which nnU-Net looks for it."""
    assert getattr(nnunet_norm_trainers, name).__name__ == name


def test_settings_block_is_valid_and_complete() -> None:
    """Enforces that the README's plans block is read without a refusal and shows every setting that there is."""
    block, _ = JSON
    configuration = json.loads(f"{{{block}}}")
    settings = NormSettings.from_configuration(configuration)
    assert configuration[BLOCK] == json.loads(json.dumps(dataclasses.asdict(settings)))


def test_experimental_batches_are_valid() -> None:
    """Enforces that the README's file of experimental batches is read without a refusal."""
    _, file = JSON
    assert ExperimentalBatches.from_json(json.loads(file)).names == ("plate_1", "plate_2")


def test_the_grid_is_valid() -> None:
    """Enforces that the sweep that people copy is one."""
    (text,) = YAML
    grid = parse_grid(yaml.safe_load(text), "README.md", name="readme")
    assert sorted(grid.axes) == ["batch_size", "loss", "norm", "patch_size"]
    assert len(grid.exclude) == 1


def test_programs_of_nnunet_exist() -> None:
    """Enforces that every ``nnUNetv2_...`` that the README names is a program of the installed nnU-Net."""
    programs = importlib.metadata.entry_points(group="console_scripts").names
    assert set(re.findall(r"nnUNetv2_\w+", README)) <= set(programs)


def test_predict_takes_the_flags_of_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces what the README says about commands that nnU-Net prints: every flag but -step_size can stay."""
    parser = cli.build_parser(["predict"])
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    stock = _flags(_stock_parser(monkeypatch))
    del stock["-step_size"]
    assert stock.items() <= _flags(commands.choices["predict"]).items()
