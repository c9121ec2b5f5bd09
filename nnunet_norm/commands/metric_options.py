"""Flags of commands that compare predictions with references."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from nnunet_norm.commands.machine import default_processes
from nnunet_norm.errors import EvaluationError, SetupError
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


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """How many cases at a time, and whether progress is shown."""
    parser.add_argument(
        "-np",
        type=int,
        default=default_processes("nnUNet_def_n_proc"),
        metavar="N",
        help="cases at a time (default: nnUNet_def_n_proc, or 3)",
    )
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs of batch jobs")


def check_processes(args: argparse.Namespace) -> None:
    """Refuse to work with none.

    Raises:
        SetupError: as said.
    """
    if args.np < 1:
        raise SetupError(f"-np {args.np} must be at least 1")


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
