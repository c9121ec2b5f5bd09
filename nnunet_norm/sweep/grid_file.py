"""The description of a sweep: a short YAML file, or the grid of a recipe, checked key by key."""

from __future__ import annotations

import importlib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nnunet_norm.errors import GridError
from nnunet_norm.planning.options import OPTIONS, SWITCHES
from nnunet_norm.planning.recipes import RECIPES, recipe_names
from nnunet_norm.training.losses import LOSSES
from nnunet_norm.training.naming import leaf_trainers

ALIASES = {
    "batch": "batch_size",
    "patch": "patch_size",
    "depth": "num_stages",
    "lr": "initial_lr",
    "learning_rate": "initial_lr",
    "features": "base_features",
}
"""Shorter words for axes."""

TRAINER_AXES = ("norm", "loss", "epochs", "trainer")
"""Axes that the trainer's name says; the others are in the plans."""

SETTING = "setting"
"""The axis of a recipe that has several settings."""

MAPPINGS = ("batch_renorm", "unetr", "norm_op_kwargs")
"""Options that are mappings themselves."""

PREFIX = "nnUNetTrainer"

STOCK_LOSSES = ("none", "DiceCE", "CE")


@dataclass(frozen=True, kw_only=True)
class GridFile:
    """What a grid says, in plain types and with the full names of axes.

    Attributes:
        axes: axis -> values; a mapping among the values sets several keys at once.
        dataset: name or number; None where the command is to say it.
        configuration: as nnU-Net names it; None likewise.
        name: of the sweep, and of its folder.
        plans: from which all points are derived.
        folds: numbers, or "all".
        fixed: what all points have in common.
        exclude: combinations of axes that are left out; a list among the values stands for each of them.
        baseline: values of the point with which all others are compared; empty for the first.
        recipe: of ``plans/``, that derives the plans; None for none.
        gpus: per training and machine; 0 is for CPUs.
        nodes: machines per training.
        npz: whether validations keep probabilities, which ensembles are found with.
    """

    axes: Mapping[str, list[Any]]
    name: str
    dataset: str | None = None
    configuration: str | None = None
    plans: str = "nnUNetPlans"
    folds: tuple[int | str, ...] = (0, 1, 2, 3, 4)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[Mapping[str, Any]] = ()
    baseline: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    gpus: int = 1
    nodes: int = 1
    npz: bool = True


KEYS = tuple(GridFile.__dataclass_fields__)
"""What may stand at the top of a grid."""


def read_grid(source: str) -> GridFile:
    """Read a YAML file, or the grid of a recipe of ``plans/``.

    Raises:
        GridError: there is neither; it is not YAML; a key or an axis that does not exist (the valid ones are listed); a value
            of the wrong type; nothing to vary.
    """
    path = Path(source)
    if not path.is_file() and source in recipe_names():
        content = getattr(importlib.import_module(f"{RECIPES}.{source}"), "GRID", None)
        if content is None:
            raise GridError(f"recipe {source} has no grid of its own: name it in a grid with recipe: {source}")
        return parse_grid(content, source, name=source)
    if not path.is_file():
        raise GridError(f"{source}: there is no such file, nor a recipe of that name ({', '.join(recipe_names())})")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GridError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise GridError(f"{source} cannot be read: {error.strerror}") from error
    return parse_grid(content, source, name=path.name.removesuffix(path.suffix))


def parse_grid(content: Any, source: str, *, name: str) -> GridFile:
    """Check the content of a grid.

    Args:
        content: as YAML gives it.
        source: for messages.
        name: of the sweep, where the grid has none.

    Raises:
        GridError: see :func:`read_grid`.
    """
    if not isinstance(content, Mapping) or not content:
        raise GridError(f"{source} is empty or no list of keys; a grid has {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise GridError(f"{source}: {key} is not a key of a grid; valid ones are {', '.join(KEYS)}")
    values = {key: value for key, value in content.items() if value is not None}
    reader = _Reader(source, values.get("recipe"))
    if values.get("recipe") is not None and values["recipe"] not in recipe_names():
        raise GridError(f"{source}: recipe {values['recipe']} is not known; choose from {', '.join(recipe_names())}")
    axes = reader.axes(values.get("axes"))
    fixed = reader.keyed("fixed", values.get("fixed", {}))
    for key in fixed.keys() & axes.keys():
        raise GridError(f"{source}: {key} is fixed and an axis; leave out one of them")
    npz, name = values.get("npz", True), str(values.get("name", name))
    if not isinstance(npz, bool):
        raise GridError(f"{source}: npz is {npz!r}; it must be true or false")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise GridError(
            f"{source}: name is {name!r}; it names a folder: give the grid a name of letters, digits and _ . -"
        )
    texts = {key: str(values[key]) if key in values else None for key in ("dataset", "configuration", "recipe")}
    return GridFile(
        axes=axes,
        name=name,
        dataset=texts["dataset"],
        configuration=texts["configuration"],
        plans=str(values.get("plans", GridFile.plans)),
        folds=folds_of(values.get("folds", GridFile.folds), source),
        fixed=fixed,
        exclude=[reader.choice("exclude", rule, axes) for rule in reader.list_of("exclude", values)],
        baseline=reader.choice("baseline", values.get("baseline", {}), axes),
        recipe=texts["recipe"],
        gpus=reader.whole("gpus", values.get("gpus", 1), 0),
        nodes=reader.whole("nodes", values.get("nodes", 1), 1),
        npz=npz,
    )


def parts_of(axis: str, value: Any) -> Mapping[str, Any]:
    """What a value of an axis says, key by key: it may be a mapping that says several things."""
    return value if isinstance(value, Mapping) and axis not in MAPPINGS else {axis: value}


def folds_of(folds: Any, source: str) -> tuple[int | str, ...]:
    """Folds as nnU-Net takes them: different numbers, or ``all`` alone or among them.

    Raises:
        GridError: anything else.
    """
    given = list(folds) if isinstance(folds, list | tuple) else [folds]
    checked = [int(fold) if isinstance(fold, str) and fold.isdecimal() else fold for fold in given]
    right = all(
        fold == "all" or (isinstance(fold, int) and not isinstance(fold, bool) and fold >= 0) for fold in checked
    )
    if not checked or not right or len(set(checked)) < len(checked):
        raise GridError(f"{source}: folds is {folds!r}; it must be a list of different numbers from 0, or all")
    return tuple(checked)


class _Reader:
    """Axes and their values, checked, with what they are called in full."""

    def __init__(self, source: str, recipe: Any) -> None:
        self.source = source
        self.valid = (*TRAINER_AXES, *((SETTING,) if recipe is not None else ()), *OPTIONS)
        self.norms = tuple(
            leaf.removeprefix(PREFIX)
            for leaf in leaf_trainers(vars(importlib.import_module("nnunet_norm.trainers.nnunet_norm_trainers")))
        )

    def axes(self, axes: Any) -> dict[str, list[Any]]:
        if not isinstance(axes, Mapping) or not axes:
            raise GridError(f"{self.source}: axes is {axes!r}: the grid is empty; give axes of {', '.join(self.valid)}")
        found: dict[str, list[Any]] = {}
        for key, values in axes.items():
            if not isinstance(values, list):
                raise GridError(f"{self.source}: axis {key} is {values!r}; it must be a list of values")
            if not values:
                raise GridError(f"{self.source}: axis {key} is []: the grid is empty; give a list of values")
            free = all(isinstance(value, Mapping) for value in values) and key not in (*MAPPINGS, *ALIASES, *self.valid)
            name = str(key) if free else self.key(key)
            if name in found:
                raise GridError(f"{self.source}: axis {name} is there twice")
            found[name] = [self.value(name, value) for value in values]
            if any(value in found[name][:number] for number, value in enumerate(found[name])):
                raise GridError(f"{self.source}: axis {key} has a value twice: {values}")
        return found

    def key(self, key: Any) -> str:
        name = ALIASES.get(key, key)
        if name not in self.valid:
            also = ", ".join(f"{short} ({full})" for short, full in ALIASES.items())
            raise GridError(
                f"{self.source}: {key} is not an axis of a grid; valid ones are {', '.join(self.valid)}; in short: {also}"
            )
        return str(name)

    def keyed(self, where: str, values: Any) -> dict[str, Any]:
        """A mapping of axes to one value each."""
        if not isinstance(values, Mapping):
            raise GridError(f"{self.source}: {where} is {values!r}; it must be a list of keys with a value each")
        return {self.key(key): self.value(self.key(key), value) for key, value in values.items()}

    def value(self, axis: str, value: Any) -> Any:
        """A value as :func:`nnunet_norm.planning.derive_plans` or a trainer's name takes it."""
        if isinstance(value, Mapping) and axis not in MAPPINGS:
            return self.keyed(f"a value of axis {axis}", value)
        if axis == "loss":
            return self._loss(value)
        if axis == "norm":
            return self._one_of(axis, value, self.norms)
        if axis == "epochs":
            return self.whole(axis, value, 1)
        if axis in SWITCHES and not isinstance(value, bool):
            raise GridError(f"{self.source}: {axis} is {value!r}; it must be true or false")
        return value  # options check their values themselves

    def choice(self, where: str, rule: Any, axes: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Values of some axes, each of which the axis has; in ``exclude`` also lists of them."""
        if not isinstance(rule, Mapping) or (where == "exclude" and not rule):
            raise GridError(f"{self.source}: {where} has {rule!r}; it must be axes with their values")
        found: dict[str, Any] = {}
        for key, value in rule.items():
            name = str(key if key in axes else ALIASES.get(key, key))
            if name not in axes:
                raise GridError(f"{self.source}: {where} names {key}, which is no axis; there are {', '.join(axes)}")
            several = where == "exclude" and isinstance(value, list) and value not in axes[name]
            wanted = [self.value(name, item) for item in value] if several else [self.value(name, value)]
            for item in wanted:
                if item not in axes[name]:
                    raise GridError(
                        f"{self.source}: {where} has {key}: {item}, which is not in the grid; there are {axes[name]}"
                    )
            found[name] = wanted if where == "exclude" else wanted[0]
        return found

    def list_of(self, key: str, values: Mapping[str, Any]) -> list[Any]:
        found = values.get(key, [])
        if not isinstance(found, list):
            raise GridError(f"{self.source}: {key} is {found!r}; it must be a list")
        return found

    def whole(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GridError(f"{self.source}: {key} is {value!r}; it must be a whole number of at least {least}")
        return value

    def _loss(self, value: Any) -> str | None:
        if value is None or value in STOCK_LOSSES:
            return None
        return self._one_of("loss", value, (STOCK_LOSSES[1], *LOSSES))

    def _one_of(self, axis: str, value: Any, choice: Sequence[str]) -> str:
        if value not in choice:
            raise GridError(f"{self.source}: {axis} is {value!r}; choose from {', '.join(choice)}")
        return str(value)


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once, as of two the first would be lost, and whose numbers are those of YAML 1.2.

    YAML 1.1, which PyYAML reads otherwise, takes 027 for 23, 1:30 for 90, 1e-3 for text, and no and off for false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"({_pattern})$"), list("-+.0123456789tTfF"))
