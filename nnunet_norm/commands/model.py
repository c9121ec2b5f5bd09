"""The trained model that a command works on: its arguments, and its folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from nnunet_norm.errors import ModelFolderError, SetupError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model as nnU-Net names it, or by its folder; folds are the command's own."""
    parser.add_argument("-m", metavar="FOLDER", help="the trained model's folder; else it is found by -d, -tr, -p, -c")
    parser.add_argument("-d", metavar="DATASET", help="dataset name or number")
    parser.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="default: nnUNetTrainer")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: nnUNetPlans")
    parser.add_argument("-c", metavar="CONFIGURATION", help="for example 3d_fullres")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: checkpoint_final.pth")
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="let the model run code of its own when it is read; without it, such a model is refused",
    )


def fold(text: str) -> int | str:
    """A fold from the command line: a number, or "all"."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'")
    return text if text == "all" else int(text)


def model_folder(args: argparse.Namespace) -> str:
    """The folder that ``-m`` names, or the model's folder under nnUNet_results.

    Raises:
        ModelFolderError: no model is named.
        SetupError: nnUNet_results is not set, or the dataset is not known.
    """
    if args.m is not None:
        return args.m
    if args.d is None or args.c is None:
        raise ModelFolderError("no model is named: give -d and -c (and -tr, -p), or the model's folder with -m")
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    if "nnUNet_results" not in os.environ:
        raise SetupError("nnUNet_results is not set: export it, or give the trained model's folder with -m")
    if not args.d.startswith("Dataset"):
        if not args.d.isdecimal():
            raise SetupError(f"-d {args.d!r} is neither a number nor a name that begins with 'Dataset'")
        candidates = list(find_candidate_datasets(int(args.d)))
        if len(candidates) != 1:
            found = f"more than one: {', '.join(candidates)}" if candidates else "none"
            raise SetupError(
                f"-d {args.d} should be one dataset in nnUNet_results, _raw and _preprocessed; found {found}"
            )
    return get_output_folder(args.d, args.tr, args.p, args.c)


def how_to_predict(
    folder: str | Path,
    *,
    by_folder: bool,
    configuration: str,
    trainer: str,
    plans: str,
    folds: Sequence[int | str],
    checkpoint: str,
    stock: bool = True,
) -> str:
    """The command that predicts with a model folder that was written.

    Args:
        folder: the model.
        by_folder: name it by its folder, since it does not lie where nnU-Net looks for it.
        configuration: of the model.
        trainer: of the model.
        plans: of the model.
        folds: of the model.
        checkpoint: file name of the checkpoints.
        stock: whether nnU-Net's own predictor can; else it is this package's.
    """
    own = "nnunet-norm predict"
    if by_folder:
        program = f"{'nnUNetv2_predict_from_modelfolder' if stock else own} -m {folder}"
    else:
        of_trainer = "" if trainer == "nnUNetTrainer" else f" -tr {trainer}"
        name = Path(folder).parent.name
        program = f"{'nnUNetv2_predict' if stock else own} -d {name} -c {configuration}{of_trainer} -p {plans}"
    chosen = "" if checkpoint == "checkpoint_final.pth" else f" -chk {checkpoint}"
    return f"{program} -f {' '.join(map(str, folds))}{chosen} -i IN -o OUT"
