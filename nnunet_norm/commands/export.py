"""Write a trained model's weights as a start for another training, whatever the norm of either.

nnUNetv2_train -pretrained_weights refuses a checkpoint in which the new network's running statistics are missing. The
file written here has them: kept where the model has them, fresh where not; BatchRenorm's schedule starts at 0.

    nnunet-norm export --pretrained -d 4 -c 3d_fullres -tr nnUNetTrainer -f 0 -o instance_norm.pth
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerBRN -pretrained_weights instance_norm.pth
"""

from __future__ import annotations

import argparse

from nnunet_norm.commands.model import add_model_arguments, fold, model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and the file to write."""
    parser.add_argument("--pretrained", action="store_true", required=True, help="as pretrained weights for a training")
    add_model_arguments(parser)
    parser.add_argument("-f", type=fold, default=0, help="fold (default: 0), or all")
    parser.add_argument("-o", required=True, metavar="FILE", help="the checkpoint to write")


def run(args: argparse.Namespace) -> None:
    """Write the file and say how it is used."""
    folder = model_folder(args)
    from nnunet_norm.prediction.model_folder import check_model_folder
    from nnunet_norm.training.pretrained import export_pretrained

    check_model_folder(folder, [args.f], args.chk)
    export_pretrained(folder, args.f, args.chk, args.o)
    print(f"{args.o}: pretrained weights of {folder}, fold {args.f}, for nnUNetv2_train -pretrained_weights")
