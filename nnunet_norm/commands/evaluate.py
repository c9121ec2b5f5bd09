"""Compare predictions with references: nnU-Net's summary.json, with surface metrics in mm beside Dice.

In the manner of nnUNetv2_evaluate_folder: every <case><ending> of PRED_FOLDER is compared with the file of the same name in
GT_FOLDER, and Dice, IoU and counts are those of nnU-Net, to the last bit. Added are the normalized surface Dice (NSD: the
share of both surfaces that lies within a tolerance of the other one) and, with --hd95, the 95 % Hausdorff distance.
Interrupted, it goes on where it was when it is called again.

    nnunet-norm evaluate labelsTs predictions --tolerance 2 pancreas=3 --hd95

A class that neither file of a case has is left out of the means, as nnU-Net does; the table says in how many cases.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.commands.metric_options import (
    add_metric_arguments,
    add_process_arguments,
    check_processes,
    parse_tolerance,
)
from nnunet_norm.errors import EvaluationError
from nnunet_norm.reading import read_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folders, the file to write, and what is measured."""
    parser.add_argument("gt_folder", metavar="GT_FOLDER", help="references")
    parser.add_argument("pred_folder", metavar="PRED_FOLDER", help="predictions")
    parser.add_argument("-djfile", metavar="FILE", help="dataset.json (default: that of PRED_FOLDER, left by nnU-Net)")
    parser.add_argument("-o", metavar="FILE", help="output file, .json (default: PRED_FOLDER/summary.json)")
    parser.add_argument("--chill", action="store_true", help="leave out references that have no prediction")
    add_metric_arguments(parser)
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Compare, write, and print a table."""
    check_processes(args)
    tolerance = parse_tolerance(args.tolerance)
    dataset_json = _dataset_json(args)
    output = Path(args.o) if args.o is not None else Path(args.pred_folder, "summary.json")
    # nnU-Net takes seconds to import: refuse first
    from nnunet_norm.evaluation import Options, as_text, evaluate_folder

    with messages_shown():
        summary = evaluate_folder(
            args.gt_folder,
            args.pred_folder,
            dataset_json=dataset_json,
            options=Options(tolerance, args.hd95),
            num_processes=args.np,
            output_file=output,
            chill=args.chill,
            progress=not args.disable_progress_bar,
        )
    print(as_text(summary))
    print(os.fspath(output))


def _dataset_json(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(args.pred_folder).is_dir():
        raise EvaluationError(f"folder of the predictions {args.pred_folder!r} does not exist: name it second")
    path = Path(args.pred_folder, "dataset.json") if args.djfile is None else Path(args.djfile)
    return read_object(path, EvaluationError, "give the dataset.json with -djfile")
