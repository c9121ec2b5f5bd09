"""The grid that the commands of a sweep work on: its arguments."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nnunet_norm.commands.model import fold

if TYPE_CHECKING:
    from nnunet_norm.sweep.grid import Grid


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, and what it may leave open."""
    parser.add_argument("grid", metavar="GRID", help="YAML file, or a recipe of plans/ that has a grid, e.g. amos")
    parser.add_argument("-d", metavar="DATASET", help="name or number of the dataset (default: the grid's)")
    parser.add_argument("-c", metavar="CONFIGURATION", help="for example 3d_fullres (default: the grid's)")
    parser.add_argument("-f", nargs="+", type=fold, metavar="FOLD", help="folds (default: the grid's, or else 0 to 4)")


def grid_of(args: argparse.Namespace) -> Grid:
    """Read the grid that the arguments name.

    Raises:
        NnunetNormError: see :func:`nnunet_norm.sweep.grid.load_grid`.
    """
    from nnunet_norm.sweep.grid import load_grid  # takes nnU-Net's seconds

    return load_grid(args.grid, dataset=args.d, configuration=args.c, folds=args.f)
