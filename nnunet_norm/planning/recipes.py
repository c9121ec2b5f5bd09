"""Recipes: modules of ``plans/``, found by name."""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nnunet_norm.errors import PlansError

RECIPES = "nnunet_norm.plans"
"""Where recipes are found by name; the library does not import them otherwise."""


@dataclass(frozen=True)
class Recipe:
    """A named set of changes.

    Attributes:
        derive: takes what ``derive_plans`` takes.
        losses: endings of trainer names that belong to it, besides none.
    """

    derive: Callable[..., dict[str, Any]]
    losses: tuple[str, ...]


def recipe_names() -> list[str]:
    """The modules of ``plans/``."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(RECIPES).__path__))


def find_recipe(name: str, setting: str | None = None) -> Recipe:
    """The function ``derive`` of a module in ``plans/``, and its ``LOSSES``, if any.

    A module with several settings lists them in ``SETTINGS``, and its ``derive`` takes one as ``setting``.

    Raises:
        PlansError: no such recipe or setting (those that are there are listed), a setting missing, or one too many.
    """
    if name not in recipe_names():
        raise PlansError(f"--recipe {name} is not known; choose from {', '.join(recipe_names())}")
    module = importlib.import_module(f"{RECIPES}.{name}")
    settings = getattr(module, "SETTINGS", ())
    derive: Callable[..., dict[str, Any]] = module.derive
    if settings:
        if setting not in settings:
            problem = "is missing" if setting is None else f"{setting} is not known"
            raise PlansError(f"--setting {problem}; recipe {name} has {', '.join(settings)}")
        derive = functools.partial(derive, setting=setting)
    elif setting is not None:
        raise PlansError(f"--setting {setting}: recipe {name} has no settings; leave it out")
    return Recipe(derive, tuple(getattr(module, "LOSSES", ())))
