"""Flags of commands that compare predictions with references."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from nnunet_norm.errors import EvaluationError
from nnunet_norm.scores import EVERY


def add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured beside Dice."""
    parser.add_argument(
        "--tolerance",
        nargs="+",
        default=[],
        metavar="MM",
        help="of the surface Dice, in mm: one for all classes, or LABEL=MM for one, by its name or number (default: 1)",
    )
    parser.add_argument("--hd95", action="store_true", help="measure the 95 %% Hausdorff distance too")


def parse_tolerance(words: Sequence[str]) -> dict[str, float]:
    """The tolerances that a command line has, by class: ``["2"]``, ``["liver=3", "tumour=1"]``, or ``["2", "tumour=1"]``.

    Raises:
        EvaluationError: a word is no length in mm or ``LABEL=MM``, or a class is named twice.
    """
    asked: dict[str, float] = {}
    for word in words:
        key, _, value = word.rpartition("=")
        key = key or EVERY
        try:
            number = float(value)
        except ValueError as error:
            raise EvaluationError(f"--tolerance {word!r}: give MM, or LABEL=MM for a class of its own") from error
        if not math.isfinite(number) or number < 0:
            raise EvaluationError(f"--tolerance {word!r}: give 0 mm or more")
        if key in asked:
            raise EvaluationError(f"--tolerance {word!r}: there is one for {'all' if key == EVERY else key} already")
        asked[key] = number
    return asked
