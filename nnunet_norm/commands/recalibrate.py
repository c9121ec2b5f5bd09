"""Give a trained model the statistics of other images: a new domain, every experimental batch, or every single image.

The mean and variance that each norm has stored are estimated anew on the images of -i: exactly where the network runs stage
by stage; in tiles, what is padded at their borders counts. Weights stay, labels are not needed. A new model folder is written
that every command of nnU-Net takes, and the old one stays. A model with InstanceNorm, which has no stored statistics, becomes
one with BatchNorm that stock nnU-Net runs.

    nnunet-norm recalibrate -d 4 -c 3d_fullres -tr nnUNetTrainerBRN -i images_of_the_new_scanner
    nnUNetv2_predict -d 4 -c 3d_fullres -tr nnUNetTrainerBRN -p nnUNetPlans_recalibrated -i images -o predictions

With --batches every experimental batch gets a model of its own, with --per-image every image. nnunet-norm predict
--population batch does the same on the fly and writes no model.
"""

from __future__ import annotations

import argparse

from nnunet_norm.commands.machine import DEVICES, default_processes, device_named
from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.commands.model import add_model_arguments, fold, how_to_predict, model_folder
from nnunet_norm.commands.sizes import parse_size
from nnunet_norm.errors import SetupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the images, and the folder to write."""
    add_model_arguments(parser)
    parser.add_argument("-f", nargs="+", type=fold, help="folds, or all (default: every one that is there)")
    parser.add_argument("-i", required=True, metavar="FOLDER", help="images, named <case>_0000<ending> by channel")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--batches",
        metavar="FILE",
        help="a model per experimental batch: JSON with that of every case, as in experimental_batches.json",
    )
    which.add_argument("--per-image", action="store_true", help="a model per image")
    parser.add_argument(
        "--controls", action="store_true", help="estimate on the controls of each experimental batch alone"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-o",
        metavar="FOLDER",
        help="the model folder to write, for nnUNetv2_predict_from_modelfolder; with --batches and --per-image the folder of "
        "the model folders (default: beside the model, where nnUNetv2_predict finds them)",
    )
    where.add_argument(
        "--plans-name",
        metavar="NAME",
        help="name of the new model's plans (default: the old name and _recalibrated); the name of the experimental batch or "
        "of the case is appended",
    )
    parser.add_argument(
        "--continue", dest="continued", action="store_true", help="keep models that were written before"
    )
    parser.add_argument("-prev_stage_predictions", metavar="FOLDER", help="the previous stage's predictions (cascade)")
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="where preprocessed images and maps lie as memory-mapped files (default: images in a temporary folder, maps in "
        "memory)",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory that the process may come to, for example 6G (default: most of what is available)",
    )
    parser.add_argument(
        "-npp", type=int, default=default_processes("nnUNet_npp"), help="processes for preprocessing; 0: none"
    )
    parser.add_argument("-device", default="cuda", choices=DEVICES, help="default: cuda; see CUDA_VISIBLE_DEVICES")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs of batch jobs")


def run(args: argparse.Namespace) -> None:
    """Estimate and write, one population after another."""
    if args.npp < 0:
        raise SetupError(f"-npp {args.npp} must not be negative; 0 works without further processes")
    max_memory = parse_size(args.max_memory, "--max-memory") if args.max_memory is not None else None
    folder = model_folder(args)
    from nnunet_norm.prediction.recalibration import Recalibration  # nnU-Net takes seconds to import: refuse first

    with messages_shown():
        recalibration = Recalibration(
            folder,
            folds=args.f,
            checkpoint_name=args.chk,
            batches=args.batches,
            controls=args.controls,
            per_image=args.per_image,
            device=device_named(args.device),
            scratch=args.scratch,
            max_memory=max_memory,
            progress=not args.disable_progress_bar,
            trust_checkpoint=args.trust_checkpoint,
        )
        targets = recalibration.targets(
            args.i,
            output=args.o,
            plans_name=args.plans_name,
            previous_stage_folder=args.prev_stage_predictions,
            continued=args.continued,
        )
        for target in targets:
            if target.is_there:
                print(f"{target.folder}: written before, kept")
                continue
            recalibration.write(target, previous_stage_folder=args.prev_stage_predictions, num_processes=args.npp)
            use = how_to_predict(
                target.folder,
                by_folder=args.o is not None or args.m is not None,
                configuration=recalibration.configuration,
                trainer=recalibration.trainer_name,
                plans=target.plans_name,
                folds=recalibration.folds,
                checkpoint=args.chk,
                stock=recalibration.predictor.input_normalization is None,
            )
            print(f"{target.folder}: statistics of {target.population}; predict with {use}")
