"""Say whether a trained model has a normalization problem, and show why: any model that nnU-Net can load, stock ones too.

Measures on a few images whether train and eval mode agree, whether two tiles predict the same voxels alike, Dice against the
size of the tiles up to the whole image, and how far the network sees; and writes one report, diagnosis.html, with the numbers
beside it. Without -i the images are validation cases of the model's own dataset. Interrupted, it goes on where it was when it
is called again.

    nnunet-norm diagnose -d 4 -c 3d_fullres -tr nnUNetTrainer
    nnunet-norm diagnose --receptive-field -m MODEL_FOLDER -i images -o here
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_norm.commands.machine import DEVICES, device_named
from nnunet_norm.commands.model import add_model_arguments, fold, model_folder
from nnunet_norm.errors import InputImageError, SetupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the images, and the folder to write."""
    add_model_arguments(parser)
    parser.add_argument("-f", type=fold, help="fold, or all (default: the first that is there)")
    parser.add_argument(
        "--receptive-field",
        action="store_true",
        help="only the receptive fields: print them and draw the map of the gradient",
    )
    parser.add_argument(
        "-i",
        metavar="FOLDER",
        help="images, named <case>_0000<ending> by channel (default: validation cases of the model's own dataset)",
    )
    parser.add_argument(
        "-l", metavar="FOLDER", help="labels of the images of -i, named <case><ending>; without, no Dice with labels"
    )
    parser.add_argument(
        "-o", metavar="FOLDER", help="where the report goes (default: diagnosis, in the fold's folder of the model)"
    )
    parser.add_argument("--cases", type=int, default=3, metavar="N", help="images at most (default: 3)")
    parser.add_argument(
        "--max-voxels",
        type=int,
        metavar="N",
        help="larger images are cut to so many voxels in their middle, after preprocessing (default: 4194304)",
    )
    parser.add_argument("-prev_stage_predictions", metavar="FOLDER", help="the previous stage's predictions (cascade)")
    parser.add_argument("-device", default="cuda", choices=DEVICES, help="default: cuda; see CUDA_VISIBLE_DEVICES")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs of batch jobs")


def run(args: argparse.Namespace) -> None:
    """Measure, write, and print the answer."""
    if args.cases < 1:
        raise SetupError(f"--cases {args.cases} must be at least 1")
    if args.max_voxels is not None and args.max_voxels < 1:
        raise SetupError(f"--max-voxels {args.max_voxels} must be at least 1")
    if args.l is not None and args.i is None:
        raise InputImageError(f"-l {args.l!r} are labels of the images of -i, which is not given: give both")
    folder = model_folder(args)
    device = device_named(args.device)
    # nnU-Net takes seconds to import: refuse first
    from nnunet_norm.diagnosis import DiagnosedModel, Diagnosis, cases_of_dataset, cases_of_folder, describe_fields
    from nnunet_norm.diagnosis.run import FIELD, FIGURE, MAX_VOXELS

    model = DiagnosedModel(
        folder, fold=args.f, checkpoint_name=args.chk, device=device, trust_checkpoint=args.trust_checkpoint
    )
    count = 1 if args.receptive_field else args.cases
    if args.i is not None:
        chosen = cases_of_folder(model.nnunet, args.i, args.l, count, args.prev_stage_predictions)
    else:
        chosen = cases_of_dataset(model.nnunet, model.fold, count, args.prev_stage_predictions)
    output = Path(args.o) if args.o is not None else model.checkpoint.parent / "diagnosis"
    diagnosis = Diagnosis(
        model,
        chosen,
        output,
        max_voxels=MAX_VOXELS if args.max_voxels is None else args.max_voxels,
        progress=not args.disable_progress_bar,
    )
    if args.receptive_field:
        field = diagnosis.receptive_field()
        print("\n".join(describe_fields(field)))
        print("\n".join(str(output / name) for name in (FIGURE, FIELD) if (output / name).is_file()))
        return
    finished = diagnosis.run()
    print(finished.verdict.sentence)
    print(f"{finished.html}\n{finished.json}")
