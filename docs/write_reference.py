"""Writes ``docs/reference.md`` from the package itself: trainers, keys of plans and grids, commands with their flags.

python docs/write_reference.py

``tests/test_docs.py`` holds that the page says what this writes.
"""

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_norm import cli, settings
from nnunet_norm.settings import BLOCK, NESTED, NormSettings
from nnunet_norm.sweep.grid_file import ALIASES, GridFile
from nnunet_norm.trainers import nnunet_norm_trainers
from nnunet_norm.training import trainer_names
from nnunet_norm.training.naming import options_line

PAGE = Path(__file__).with_name("reference.md")

HEAD = """# Reference

Every name that this package adds to nnU-Net: trainers, keys of the plans, keys of a sweep's grid, commands and their flags.
It says what `nnunet-norm COMMAND -h` says: `python docs/write_reference.py` writes the page from the package itself."""

TRAINERS = """## Trainers

[Choosing a norm](norms.md) says which one is good for what. Names are permanent: they name results folders and stand in
checkpoints."""

PLANS = """## Keys of the plans

They stand in a configuration of the plans, in the block `"nnunet_norm"`, which stock nnU-Net ignores; `nnunet-norm plan`
[writes them](large_batches.md#derive-plans). All are optional: one that is absent (None, in the tables) leaves nnU-Net's own
value or this package's default."""

GRID = """## Keys of a sweep's grid

A [grid](sweeps.md) is a YAML file."""

COMMANDS = """## Commands

`nnunet-norm --version` tells the version, and `--debug`, before or behind a command, shows the traceback of an error. A
refusal is one line on stderr with exit code 2; Ctrl-C ends a command with 130, and what is finished is kept."""


def reference() -> str:
    """The page."""
    parts = [HEAD, TRAINERS, *_trainers(), PLANS, *_settings()]
    aliases = ", ".join(f"`{short}` for `{name}`" for short, name in ALIASES.items())
    parts += [GRID, _table(("key", "default", "meaning"), _keys(GridFile)), f"Axes have shorter names: {aliases}."]
    parts += [COMMANDS, *(part for command in cli.COMMANDS for part in _command(command))]
    return "\n\n".join(parts) + "\n"


def _trainers() -> list[str]:
    names = trainer_names(vars(nnunet_norm_trainers)).items()
    rows = [(f"`{name}`", _prose(line)) for name, line in names]
    return [_table(("trainer", "what it is"), rows), _prose(f"Each also with {_quoted(options_line())}.")]


def _quoted(text: str) -> str:
    """Endings of names between backticks."""
    return re.sub(r"(?<![\w`])(_[\w<>]+\w>?)", r"`\1`", text)


def _settings() -> Iterator[str]:
    """The block as a table, then the entries that are settings themselves."""
    for key, cls in [(BLOCK, NormSettings), *((f"{BLOCK}.{nested.key}", nested) for nested in NESTED)]:
        yield f"### `{key}`"
        yield _table(("key", "default", "meaning"), _keys(cls))


def _keys(cls: Any) -> list[tuple[str, ...]]:
    meanings = _attributes(cls)
    return [(f"`{item.name}`", _default(item), meanings[item.name]) for item in dataclasses.fields(cls)]


def _default(item: "dataclasses.Field[Any]") -> str:
    if item.default not in (None, dataclasses.MISSING, ()):
        return f"`{json.dumps(item.default)}`"
    return ""


def _attributes(cls: type) -> dict[str, str]:
    """What the docstring's list of attributes says."""
    section = re.split(r"^(?:Attributes|Raises|References):\n", inspect.getdoc(cls) or "", flags=re.MULTILINE)[1]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: _prose(" ".join(text.split())) for name, text in entries}


def _command(command: str) -> Iterator[str]:
    parser = cli.build_parser([command])
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield from _parser(f"nnunet-norm {command}", commands.choices[command], cli.COMMANDS[command])


def _parser(name: str, parser: argparse.ArgumentParser, summary: str) -> Iterator[str]:
    yield f"### `{name}`"
    yield _prose(f"{summary[0].upper()}{summary[1:]}.")
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if argparse.SUPPRESS not in (action.help, action.dest)]
        nested = [action for action in shown if isinstance(action, argparse._SubParsersAction)]
        rows = [_row(parser, action) for action in shown if action not in nested and action.dest != "help"]
        if group not in parser._action_groups[:2] and rows:
            yield f"**{group.title}**" + (f": {_prose(group.description)}" if group.description else "")
        if rows:
            yield _table(("argument", "meaning"), rows)
    if parser._subparsers is not None:
        for action in parser._subparsers._group_actions:
            lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for child, subparser in action.choices.items():
                yield from _parser(f"{name} {child}", subparser, lines[child])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    """An argument with its values, and its help."""
    formatter = parser._get_formatter()
    values = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    needed = " (required)" if action.required and action.option_strings else ""
    shown = f"`{values}`" if values else ""
    return f"{flags} {shown}".strip() + needed, _prose(formatter._expand_help(action))


def _prose(text: str) -> str:
    """Text of a docstring or a help as Markdown."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda found: _value(found[1]), text)
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(re.sub(r"`+", "`", part) if part[:1] == "`" else _escaped(part) for part in parts)


def _value(name: str) -> str:
    value = getattr(settings, name, None)
    return f"`{name}`" if value is None else f"{value}"


def _escaped(text: str) -> str:
    return re.sub(r"([<>*])", r"\\\1", text)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
