"""Report on a sweep, finished or not: tables and figures as one HTML file, and the same as Markdown and CSV.

The validation of every training that is done is evaluated (Dice, surface Dice, on request the Hausdorff distance) and
compared with the baseline case by case. What was evaluated once is kept, so a later report is quick.

    nnunet-norm sweep report grid.yaml
    nnunet-norm sweep report amos -d 219 -c 3d_fullres --tolerance 2 --hd95
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.commands.metric_options import (
    add_metric_arguments,
    add_process_arguments,
    check_processes,
    parse_tolerance,
)
from nnunet_norm.commands.sweep_grid import add_grid_arguments, grid_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, where the report goes, and what is measured."""
    add_grid_arguments(parser)
    parser.add_argument("-o", metavar="FOLDER", help="where it goes (default: report, in the sweep's folder)")
    add_metric_arguments(parser)
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Collect, evaluate, write, and print what stands at the top of the report."""
    check_processes(args)
    tolerance = parse_tolerance(args.tolerance)
    grid = grid_of(args)
    # MONAI and matplotlib take seconds to import: refuse first
    from nnunet_norm.evaluation import Options
    from nnunet_norm.pages import markdown_table
    from nnunet_norm.sweep.collecting import collect, compare_with_baseline
    from nnunet_norm.sweep.report import FOLDER, sentences, write_report
    from nnunet_norm.sweep.tables import points_table

    options = Options(tolerance, hd95=args.hd95)
    with messages_shown():
        found = collect(grid, options, num_processes=args.np, progress=not args.disable_progress_bar)
    comparisons = compare_with_baseline(found)
    written = write_report(found, comparisons, Path(args.o) if args.o is not None else grid.folder / FOLDER)
    table = points_table(found, comparisons)
    print("\n".join([*sentences(found, comparisons), "", markdown_table(table.header, table.rows), ""]))
    print("\n".join(map(str, (written.html, written.markdown, written.points, written.runs))))
