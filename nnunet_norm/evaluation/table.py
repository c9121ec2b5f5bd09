"""A summary as a table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key

from nnunet_norm.evaluation.evaluate import ABSENT, SETTINGS
from nnunet_norm.evaluation.options import Class
from nnunet_norm.pages import markdown_table
from nnunet_norm.scores import DICE, HD95, NSD


def as_text(summary: Mapping[str, Any]) -> str:
    """The means of every class and over all of them, how often a class is not there, and what that means.

    Args:
        summary: as :func:`nnunet_norm.evaluation.evaluate_pairs` returns it.
    """
    settings, cases = summary[SETTINGS], summary["metric_per_case"]
    metrics = [DICE, NSD, *([HD95] if HD95 in summary["foreground_mean"] else [])]
    header = ["class", DICE, NSD, "at mm", *([f"{HD95} mm"] if HD95 in metrics else [])]
    header += ["absent in", "missed in", "made up in"]
    rows = []
    for one, means in summary["mean"].items():
        key = label_or_region_to_key(one)
        name = settings["classes"][key]
        cells = [f"{key} {name}", *(_number(metric, means[metric]) for metric in metrics)]
        cells.insert(3, f"{settings['tolerance'][key]:g}")
        rows.append([*cells, *map(str, _absences(cases, one))])
    overall = ["mean", *(_number(metric, summary["foreground_mean"][metric]) for metric in metrics)]
    overall.insert(3, "")
    rows.append([*overall, "", "", ""])
    cases_said = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    return (
        f"{cases_said}; NSD: the share of both surfaces within the tolerance of the other\n{markdown_table(header, rows)}\n"
        f"absent: in neither segmentation; missed: in the reference alone; made up: in the prediction alone. {ABSENT}"
    )


def tolerance_in_words(settings: Mapping[str, Any]) -> str:
    """``1 mm``, or where classes have their own ``0.5 mm for front, 2 mm for rear``.

    Args:
        settings: what a summary has at :data:`SETTINGS`.
    """
    tolerances = settings["tolerance"]
    if len(set(tolerances.values())) == 1:
        return f"{next(iter(tolerances.values())):g} mm"
    return ", ".join(f"{value:g} mm for {settings['classes'][key]}" for key, value in tolerances.items())


def _absences(cases: list[Mapping[str, Any]], one: Class) -> tuple[int, int, int]:
    """In how many cases a class is in neither segmentation, in the reference alone, in the prediction alone."""
    counts = [(case["metrics"][one]["n_ref"] > 0, case["metrics"][one]["n_pred"] > 0) for case in cases]
    return counts.count((False, False)), counts.count((True, False)), counts.count((False, True))


def _number(metric: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if metric == HD95 else f"{value:.4f}"
