"""Write a trained model as one that stock nnU-Net runs without this package, or as a start for another training.

A network whose norms have stored statistics (BatchRenorm, BatchNorm and its kind) predicts as one with BatchNorm does. The
new model has nnU-Net's own trainer, and plans of a new name in which BatchNorm is the norm; nnUNetv2_predict gives the same
with both, to the last bit.

    nnunet-norm export -d 4 -c 3d_fullres -tr nnUNetTrainerBRN
    nnUNetv2_predict -d 4 -c 3d_fullres -p nnUNetPlans_BRN -i images -o predictions

With --pretrained: a checkpoint for nnUNetv2_train -pretrained_weights, which refuses one in which the new network's running
statistics are missing. The file written here has them: kept where the model has them, fresh where not; BatchRenorm's
schedule starts at 0.

    nnunet-norm export --pretrained -d 4 -c 3d_fullres -tr nnUNetTrainer -f 0 -o instance_norm.pth
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerBRN -pretrained_weights instance_norm.pth
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_norm.commands.model import add_model_arguments, fold, how_to_predict, model_folder
from nnunet_norm.errors import SetupError

if TYPE_CHECKING:
    from nnunet_norm.prediction.stock_model import StockExport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the folder or file to write."""
    parser.add_argument("--pretrained", action="store_true", help="as pretrained weights for a training")
    add_model_arguments(parser)
    parser.add_argument(
        "-f", nargs="+", type=fold, help="folds, or all (default: every one that is there; with --pretrained: 0)"
    )
    parser.add_argument(
        "-o",
        metavar="PATH",
        help="the model folder to write, for nnUNetv2_predict_from_modelfolder (default: in nnUNet_results, where "
        "nnUNetv2_predict finds it); with --pretrained: the checkpoint to write",
    )
    parser.add_argument(
        "--plans-name",
        metavar="NAME",
        help="name of the new model's plans (default: the old name and the trainer's norm, as in nnUNetPlans_BRN)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the folder or the file, and say how it is used."""
    if args.pretrained:
        _export_pretrained(args)
        return
    folder = model_folder(args)
    from nnunet_norm.prediction.stock_model import TRAINER, stock_export  # nnU-Net takes seconds to import

    export = stock_export(folder, args.f, args.chk, args.plans_name, trust_checkpoint=args.trust_checkpoint)
    target = args.o if args.o is not None else _folder_in_results(args, folder, export)
    export.write(target)
    use = how_to_predict(
        target,
        by_folder=args.o is not None,
        configuration=export.configuration,
        trainer=TRAINER,
        plans=export.plans_name,
        folds=export.folds,
        checkpoint=args.chk,
    )
    folds = ", ".join(map(str, export.folds))
    print(f"{target}: {folder} for stock nnU-Net, folds {folds}; predict with {use}")


def _folder_in_results(args: argparse.Namespace, folder: str, export: StockExport) -> str:
    """Where ``nnUNetv2_predict -p`` looks for the model."""
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    from nnunet_norm.prediction.stock_model import TRAINER

    if "nnUNet_results" not in os.environ:
        raise SetupError("nnUNet_results is not set: export it, or give the folder to write with -o")
    dataset = export.dataset_name if args.m is not None else Path(folder).parent.name
    return get_output_folder(dataset, TRAINER, export.plans_name, export.configuration)


def _export_pretrained(args: argparse.Namespace) -> None:
    folds = [0] if args.f is None else args.f
    if args.o is None or len(folds) != 1 or args.plans_name is not None:
        given = "no -o" if args.o is None else f"-f {' '.join(map(str, folds))}" if len(folds) != 1 else "--plans-name"
        raise SetupError(
            f"{given} with --pretrained: it writes one checkpoint of one fold (-f 0) to the file that -o names"
        )
    folder = model_folder(args)
    from nnunet_norm.prediction.model_folder import check_model_folder
    from nnunet_norm.training.pretrained import export_pretrained

    check_model_folder(folder, folds, args.chk)
    export_pretrained(folder, folds[0], args.chk, args.o, trust_checkpoint=args.trust_checkpoint)
    print(f"{args.o}: pretrained weights of {folder}, fold {folds[0]}, for nnUNetv2_train -pretrained_weights")
