"""The house's one-way streets: who may import whom, read from the source without running it."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RANKS = {
    "errors": 0,
    "reading": 0,
    "scores": 0,
    "validations": 0,
    "writing": 0,
    "living": 0,
    "orphans": 0,
    "pages": 0,
    "layers": 1,
    "metrics": 1,
    "receptive_field": 1,
    "submission": 1,
    "tiling": 1,
    "stages": 2,
    "statistics": 3,
    "settings": 4,
    "architectures": 4,
    "experimental_batches": 4,
    "inputs": 4,
    "planning": 4,
    "training": 5,
    "volumes": 5,
    "prediction": 5,
    "evaluation": 5,
    "ensembling": 5,
    "sweep": 6,
    "commands": 6,
    "cli": 6,
    "demo": 6,
    "diagnosis": 6,
}
"""A part imports parts of its own rank or below; in a circle they may not import each other at any rank."""

WITHOUT_NNUNET = {
    "errors": set(),
    "reading": set(),
    "scores": set(),
    "validations": set(),
    "writing": set(),
    "living": {"torch"},
    "orphans": set(),
    "pages": {"matplotlib"},
    "layers": {"torch"},
    "metrics": {"torch", "numpy", "scipy", "monai"},
    "receptive_field": {"torch", "numpy", "scipy"},
    "submission": set(),
    "tiling": {"torch", "numpy", "scipy"},
    "stages": {"torch", "filelock"},
    "statistics": {"torch", "tqdm"},
}
"""Parts that stand without nnU-Net, and all that they may import from outside the standard library."""

LEAVES = ("nnunet_norm.trainers", "nnunet_norm.plans", "trainers", "plans")
LINES_AT_MOST = 330


def _modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _source_name(path: Path) -> str:
    """``nnunet_norm.layers.group_norm`` for its file; ``nnunet_norm.layers`` for its ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    """Every module that ``path`` imports, absolute, at whatever depth; ``from a import b`` gives ``a.b``."""
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def _part(module: str) -> str | None:
    """``layers`` for ``nnunet_norm.layers.group_norm``; None outside the package and for ``nnunet_norm`` itself."""
    names = module.split(".")
    if names[0] != "nnunet_norm" or len(names) == 1 or names[1].startswith("__"):
        return None
    return names[1]


LIBRARY = [pytest.param(path, id=_source_name(path)) for path in _modules("nnunet_norm")]
TRAINERS = [pytest.param(path, id=_source_name(path)) for path in _modules("trainers")]
EVERY_MODULE = LIBRARY + TRAINERS + [pytest.param(path, id=_source_name(path)) for path in _modules("plans")]


def test_every_part_of_the_library_has_a_place_in_the_order() -> None:
    """Enforces that a new folder or module of the package is given a rank here before it is imported anywhere."""
    assert {_part(_source_name(path)) for path in _modules("nnunet_norm")} - {None} <= set(RANKS)


@pytest.mark.parametrize("path", LIBRARY)
def test_imports_point_downwards(path: Path) -> None:
    """Enforces errors <- layers, metrics, receptive_field, tiling <- stages <- statistics and so on."""
    own = _part(_source_name(path))
    targets = {_part(module) for module in _imports(path)} - {None}
    assert own is not None or not targets, "nnunet_norm/__init__.py imports nothing: `import nnunet_norm` stays light"
    upwards = {target for target in targets if RANKS[target] > RANKS[own]} if own else set()
    assert not upwards, f"{own} (rank {RANKS[own]}) imports {upwards}"


def test_no_two_parts_import_each_other() -> None:
    """Enforces that parts of one rank depend on each other in one direction only (graphlib raises on a circle)."""
    graph: dict[str, set[str]] = {}
    for path in _modules("nnunet_norm"):
        own = _part(_source_name(path))
        if own:
            graph.setdefault(own, set()).update({_part(module) for module in _imports(path)} - {None, own})
    assert set(TopologicalSorter(graph).static_order()) <= set(RANKS)


@pytest.mark.parametrize("path", LIBRARY)
def test_lower_parts_stand_without_nnunet(path: Path) -> None:
    """Enforces that the lower parts, up to stages and statistics, can be used by people who do not have nnU-Net."""
    own = _part(_source_name(path))
    if own not in WITHOUT_NNUNET:
        return
    outside = {module.split(".")[0] for module in _imports(path)} - set(sys.stdlib_module_names) - {"nnunet_norm"}
    assert outside <= WITHOUT_NNUNET[own]


@pytest.mark.parametrize("path", LIBRARY)
def test_library_never_imports_trainers_or_plans(path: Path) -> None:
    """Enforces that the leaves know the library and not the other way round (nnU-Net reloads them at each lookup)."""
    known = {module for module in _imports(path) if f"{module}.".startswith(tuple(f"{leaf}." for leaf in LEAVES))}
    assert not known


@pytest.mark.parametrize("path", TRAINERS)
def test_trainers_use_absolute_imports(path: Path) -> None:
    """Enforces absolute imports: nnU-Net imports each file of the folder as a top-level module, without a package."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [node.lineno for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("path", EVERY_MODULE)
def test_modules_stay_short(path: Path) -> None:
    """Enforces one concept per module: a longer one is to be divided."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES_AT_MOST


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces that the reader above is not blind: relative, aliased and nested imports are all seen."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "nnunet_norm" / "layers" / "example.py"
    module.parent.mkdir(parents=True)
    module.write_text("from . import a\nfrom ..tiling import b\ndef f():\n    import torch.nn as c\n")
    assert _imports(module) == {"nnunet_norm.layers.a", "nnunet_norm.tiling.b", "torch.nn"}
    assert _source_name(module) == "nnunet_norm.layers.example"
