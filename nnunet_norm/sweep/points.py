"""Points of a grid: models, and their trainings fold by fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_norm.planning.naming import PREFIXES, SWITCHES, short

STOCK_LOSS = "DiceCE"
"""What tables call nnU-Net's own loss, which a trainer's name does not mention."""


@dataclass(frozen=True)
class Point:
    """One model: derived plans and a trainer. Every fold of it is one training.

    Attributes:
        values: axis -> value as the grid has it, in the order of the axes.
        trainer: its full name.
        plans_name: of the derived plans.
        configuration: that is trained.
        epochs: of the training.
        varying: axes with more than one value, which tell points apart.
        plans: the derived plans.
    """

    values: Mapping[str, Any] = field(hash=False)
    trainer: str
    plans_name: str
    configuration: str
    epochs: int
    varying: tuple[str, ...] = ()
    plans: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """nnU-Net's name for the model, and of its folder."""
        return f"{self.trainer}__{self.plans_name}__{self.configuration}"

    @property
    def label(self) -> str:
        """What tells the point apart from the others, in short: ``BRN, DiceFocal, b16``."""
        return ", ".join(shown(axis, self.values[axis]) for axis in self.varying) or self.name


@dataclass(frozen=True)
class Run:
    """One training: a fold of a point's model."""

    point: Point
    fold: int | str

    @property
    def name(self) -> str:
        """The model's name and the fold, as a relative path."""
        return f"{self.point.name}/fold_{self.fold}"


def shown(axis: str, value: Any) -> str:
    """A value of an axis, for people, so short that several fit a line: ``b16``, ``p64x160x160``, ``DiceCE``, ``lr0.01``."""
    if axis == "loss" and value is None:
        return STOCK_LOSS
    if axis == "epochs":
        return f"{value} epochs"
    if isinstance(value, Mapping) and axis not in PREFIXES:
        return " ".join(shown(key, inner) for key, inner in value.items())
    if value is False and (axis, value) not in SWITCHES:
        return f"no {short(axis, True)}"
    return short(axis, value) if axis in PREFIXES or isinstance(value, bool) else str(value)
