"""How measured numbers are written into a report: by the names of the classes, null for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from nnunet_norm.metrics import TileMismatch


def mismatch_as_dict(names: Sequence[str], mismatch: TileMismatch) -> dict[str, Any]:
    """A tile mismatch for a JSON file.

    Args:
        names: of the classes or regions, in order.
        mismatch: what was measured.
    """
    return {
        "per_class": named(names, mismatch.per_class),
        "max_dist": none_for_nan(mismatch.max_dist),
        "verdict": mismatch.verdict,
        "max_logit": none_for_nan(mismatch.max_logit),
        "num_pairs": mismatch.num_pairs,
    }


def named(names: Sequence[str], values: Iterable[float | None]) -> dict[str, float | None]:
    """Values by name; None for all where there are none."""
    return {name: none_for_nan(value) for name, value in zip_longest(names, values)}


def none_for_nan(value: float | None) -> float | None:
    """The value, or None for NaN, which JSON does not have."""
    return None if value is None or math.isnan(value) else float(value)
