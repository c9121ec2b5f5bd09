"""The pages of docs/: they build as a site without a warning, say what the package says, and quote it word for word."""

import ast
import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunet_norm import cli
from nnunet_norm.settings import NESTED, NormSettings
from nnunet_norm.trainers import nnunet_norm_trainers
from nnunet_norm.training import trainer_names
from nnunet_norm.training.losses import LOSSES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
BLANK = "…"
"""In a quoted line, what stands for a name or a number; in a template, what is formatted into it."""


def _build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", "-c", str(source / "docs")]
    run = [*command, "-d", str(out / "trees"), str(source), str(out / "site")]
    return subprocess.run(run, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Enforces that every page is in a table of contents, and that links between pages and their anchors lead somewhere."""
    built = _build(ROOT, tmp_path)
    assert (built.returncode, built.stderr) == (0, "")
    pages = {f"{page.stem}.html" for page in DOCS.glob("*.md")}
    assert pages <= {page.name for page in (tmp_path / "site" / "docs").glob("*.html")}
    assert 'href="docs/index.html"' in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path) -> None:
    """Enforces that the build is a check of links at all, with the settings of this site: headings, pages, other files."""
    targets = ["norms.md#no-such-heading", "no_such_page.md", "../nnunet_norm/no_such_module.py"]
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    shutil.copytree(DOCS / "templates", docs / "templates")
    (docs / "norms.md").write_text("---\norphan: true\n---\n# Norms\n", encoding="utf-8")
    links = " ".join(f"[a link]({target})" for target in targets)
    (docs / "index.md").write_text(f"# Pages\n\n{links}\n", encoding="utf-8")
    built = _build(tmp_path, tmp_path)
    assert built.returncode == 1
    assert [target for target in targets if target.rpartition("#")[2] not in built.stderr] == []
    assert built.stderr.count("WARNING") == len(targets)


def test_the_reference_is_what_the_package_says() -> None:
    """Enforces that docs/reference.md was written anew since a trainer, key, command or flag changed."""
    written = runpy.run_path(str(DOCS / "write_reference.py"))["reference"]()
    assert written == REFERENCE, "python docs/write_reference.py writes it"


def test_the_reference_is_complete() -> None:
    """Enforces every trainer, loss, key of the plans and command, each by its name, whatever wrote the page."""
    names = [*trainer_names(vars(nnunet_norm_trainers)), *(f"_{loss}" for loss in LOSSES)]
    names += [item.name for cls in (NormSettings, *NESTED) for item in dataclasses.fields(cls)]
    names += [f"nnunet-norm {command}" for command in cli.COMMANDS]
    assert [name for name in names if f"`{name}`" not in REFERENCE] == []


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("plan", "--features-per-stage"),
        ("train", "--max-restarts"),
        ("predict", "--tile-size"),
        ("predict", "-step_size"),
        ("sweep run", "--slots"),
    ],
)
def test_the_reference_has_the_flags_of_each_command(command: str, flag: str) -> None:
    """Enforces that flags stand under their own command; ``-step_size`` is taken only to be refused, and is not shown."""
    (section,) = re.findall(rf"^### `nnunet-norm {command}`\n(.*?)(?=^###|\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert (f"`{flag}`" in section) == (flag != "-step_size")


def _template(node: ast.AST) -> str | None:
    """A string of the source, with a blank for each value that is formatted into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[srdgf]", BLANK, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else BLANK for part in node.values)
    return None


def _templates() -> Iterator[str]:
    for file in (ROOT / "nnunet_norm").rglob("*.py"):
        yield from filter(None, map(_template, ast.walk(ast.parse(file.read_text(encoding="utf-8")))))


QUOTED = re.findall(r"^```text\n(.*?)\n```", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M | re.S)


def test_quoted_errors_are_those_of_the_package() -> None:
    """Enforces that every line of docs/troubleshooting.md stands in the source, but for the values that it names."""
    templates = set(_templates())
    assert QUOTED
    assert [line for line in QUOTED if not any(line in template for template in templates)] == []


def test_no_error_is_quoted_twice() -> None:
    """Enforces that a line has one remedy."""
    assert len(set(QUOTED)) == len(QUOTED)
