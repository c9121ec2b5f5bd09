"""Predict images with a trained model as if each went through the network in one piece: no blending, no seams.

Takes the flags of nnUNetv2_predict; -m names a model folder in place of -d, -tr, -p and -c.

    nnunet-norm predict -i images -o predictions -d 4 -c 3d_fullres -tr nnUNetTrainerBRN -f 0
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nnunet_norm.commands import slurm
from nnunet_norm.commands.machine import DEVICES, default_processes, device_named
from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.commands.model import add_model_arguments, fold, model_folder
from nnunet_norm.commands.sizes import parse_size
from nnunet_norm.errors import SetupError, TilingError

if TYPE_CHECKING:
    from nnunet_norm.prediction import HaloPredictor

CITATION = (
    "Please cite when using nnU-Net: Isensee, F., Jaeger, P. F., Kohl, S. A., Petersen, J., & Maier-Hein, K. H. (2021). "
    "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. Nature methods, 18(2), "
    "203-211."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of nnUNetv2_predict, -m, and those of this package."""
    add_model_arguments(parser)
    parser.add_argument("-f", nargs="+", type=fold, default=[0, 1, 2, 3, 4], help="folds (default: 0 1 2 3 4), or all")
    parser.add_argument(
        "-i",
        required=True,
        metavar="FOLDER",
        help="images, named <case>_0000<ending> by channel; or one volume on disk, or a folder of them (<case>.zarr)",
    )
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where the segmentations go; made if need be")
    parser.add_argument(
        "--tile-size",
        nargs="+",
        metavar="N",
        help="voxels, one number for all axes or one per axis (default: the patch size), or auto: where the tile does not "
        "change the result, the one that costs least among those that memory holds",
    )
    parser.add_argument(
        "--halo",
        nargs="+",
        default=["auto"],
        metavar="H",
        help="auto (default: the exact halo where it fits the tile, else the effective one), exact (or refuse), erf (the "
        "effective one), or voxels: one number for all axes or one per axis",
    )
    parser.add_argument(
        "--execution",
        choices=("auto", "stages", "tiles"),
        default="auto",
        help="stages: every stage of the network over the whole image, exact at any depth; tiles: any network, one halo for "
        "all of it; auto (default): stages where network, memory and scratch allow it",
    )
    parser.add_argument(
        "--population",
        choices=("stored", "image", "tile", "batch"),
        help="whose statistics normalize: stored ones of the training (default where the network has them); those of the "
        "whole image (default for InstanceNorm and GroupNorm) or of each tile, as nnU-Net does with InstanceNorm; batch: "
        "those of all images of -i, or of each experimental batch, estimated first (nnunet-norm recalibrate keeps them)",
    )
    parser.add_argument(
        "--batches",
        metavar="FILE",
        help="for --population batch: JSON with the experimental batch of every case, as in experimental_batches.json",
    )
    parser.add_argument(
        "--controls", action="store_true", help="estimate on the controls of each experimental batch alone"
    )
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="where stages keep their maps, as memory-mapped files (default: in memory), and --population batch the "
        "preprocessed images (default: the system's folder for temporary files)",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory that the process may come to, for example 6G (default: most of what is available); files of --scratch "
        "come on top; a tile that takes more is refused",
    )
    parser.add_argument(
        "--no_folding",
        action="store_true",
        help="do not fold norms with stored statistics into the convolutions before them (slower, the same but for rounding)",
    )
    parser.add_argument("-step_size", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    parser.add_argument("--save_probabilities", action="store_true", help="also write what nnUNetv2_ensemble needs")
    parser.add_argument("--continue_prediction", action="store_true", help="leave out the cases that are there already")
    parser.add_argument("-prev_stage_predictions", metavar="FOLDER", help="the previous stage's predictions (cascade)")
    parser.add_argument(
        "-npp", type=int, default=default_processes("nnUNet_npp"), help="processes for preprocessing; 0: none"
    )
    parser.add_argument("-nps", type=int, default=default_processes("nnUNet_nps"), help="processes for export; 0: none")
    parser.add_argument(
        "-num_parts",
        type=int,
        default=1,
        help="into how many calls the cases are divided; and every volume on disk, if there are fewer volumes than parts",
    )
    parser.add_argument("-part_id", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument(
        "--verify_parts",
        action="store_true",
        help="predict nothing: see that all -num_parts parts are there, and give the outputs of volumes their names",
    )
    parser.add_argument(
        "--level",
        metavar="LEVEL",
        help="of an OME-Zarr volume: number or path of the resolution (default: 0, the full one)",
    )
    parser.add_argument("-device", default="cuda", choices=DEVICES, help="default: cuda; see CUDA_VISIBLE_DEVICES")
    parser.add_argument("--not_on_device", action="store_true", help="keep image, result and scratch on the CPU")
    parser.add_argument("--verbose", action="store_true", help="nnU-Net's own messages")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs of batch jobs")
    slurm.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Load the model and predict the folder."""
    halo, tile_size = _halo(args.halo), _tile_size(args.tile_size)
    max_memory = parse_size(args.max_memory, "--max-memory") if args.max_memory is not None else None
    _check(args)
    slurm.check(args)
    computes_nothing = args.slurm or args.verify_parts  # here, where there may be no GPU
    folder = model_folder(args)
    import torch

    from nnunet_norm.prediction import HaloPredictor  # nnU-Net takes seconds to import: refuse first
    from nnunet_norm.prediction.parts import CaseParts

    print(f"{CITATION}\n")
    predictor = HaloPredictor(
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not (args.not_on_device or computes_nothing),
        device=device_named("cpu" if computes_nothing else args.device),
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
        tile_size=tile_size,
        halo=halo,
        execution=args.execution,
        population=args.population,
        batches=args.batches,
        controls=args.controls,
        scratch=args.scratch,
        max_memory=max_memory,
        fold_norms=not args.no_folding,
        trust_checkpoint=args.trust_checkpoint,
    )
    with messages_shown():
        predictor.initialize_from_trained_model_folder(folder, args.f, args.chk)
        if computes_nothing:
            predictor.device = torch.device(args.device)  # of those who compute: outputs tell it
        on_disk = _reads_volumes(args)
        if args.slurm:
            slurm.submit(args, predictor, add_arguments)
            return
        if on_disk:
            _predict_volumes(predictor, args)
            return
        if args.verify_parts:
            cases = CaseParts(predictor, args.i, args.prev_stage_predictions)
            cases.verify(args.num_parts, args.o, probabilities=args.save_probabilities)
            return
        predictor.predict_from_files(
            args.i,
            args.o,
            save_probabilities=args.save_probabilities,
            overwrite=not args.continue_prediction,
            num_processes_preprocessing=args.npp,
            num_processes_segmentation_export=args.nps,
            folder_with_segs_from_prev_stage=args.prev_stage_predictions,
            num_parts=args.num_parts,
            part_id=args.part_id,
        )


def _reads_volumes(args: argparse.Namespace) -> bool:
    """Whether -i names volumes on disk; refuses the flag that is for those alone otherwise."""
    from nnunet_norm.volumes import holds_volumes, is_volume

    if is_volume(args.i) or holds_volumes(args.i):
        return True
    if args.level:
        raise SetupError(f"--level is for volumes on disk, and -i {args.i} holds no <case>.zarr: leave it out")
    return False


def _predict_volumes(predictor: HaloPredictor, args: argparse.Namespace) -> None:
    from nnunet_norm.prediction.volumes import VolumeOptions, VolumePrediction

    options = VolumeOptions(
        level=args.level,
        save_probabilities=args.save_probabilities,
        resume=args.continue_prediction,
        num_parts=args.num_parts,
        part_id=args.part_id,
    )
    prediction = VolumePrediction(predictor, args.i, args.o, options)
    if args.verify_parts:
        prediction.verify()
    else:
        prediction.run()


def _check(args: argparse.Namespace) -> None:
    if args.step_size is not None:
        raise TilingError(f"-step_size {args.step_size} has no meaning here (no blending): use --tile-size and --halo")
    if not 0 <= args.part_id < args.num_parts:
        raise SetupError(
            f"-part_id {args.part_id} must be from 0 to {args.num_parts - 1} (-num_parts {args.num_parts})"
        )
    if min(args.npp, args.nps) < 0:
        raise SetupError(f"-npp {args.npp} and -nps {args.nps} must not be negative; 0 works without further processes")


def _tile_size(words: list[str] | None) -> str | list[int] | None:
    """The words of --tile-size: auto, or numbers."""
    if words is None:
        return None
    if words == ["auto"]:
        return words[0]
    if not all(word.isdecimal() for word in words):
        raise TilingError(f"--tile-size {' '.join(words)} is neither auto nor numbers: give auto, or voxels")
    return [int(word) for word in words]


def _halo(words: list[str]) -> str | list[int]:
    """The words of --halo: one that the predictor knows, or numbers."""
    if all(word.isdecimal() for word in words):
        return [int(word) for word in words]
    if len(words) > 1:
        raise TilingError(f"--halo {' '.join(words)} is neither a word nor numbers: give auto, exact, erf, or voxels")
    return words[0]
