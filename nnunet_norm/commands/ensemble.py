"""Average models, and find which single model or pair is best.

Predictions that are there, as nnUNetv2_ensemble does, with the same voxels:

    nnunet-norm ensemble -i predictions_1 predictions_2 -o ensemble

Images, with models of any trainers, plans and configurations; each predicts as nnunet-norm predict does:

    nnunet-norm ensemble -d 4 -m nnUNetTrainerBRN__nnUNetPlans__3d_fullres nnUNetTrainer__nnUNetPlans__2d -i images -o out

Which model, or which pair, is best in the cross-validation of all of them, and how to predict with it:

    nnunet-norm ensemble --find -d 4 -m MODEL MODEL [...]
    nnunet-norm ensemble --find --sweep GRID

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_norm.commands.ensemble_checks import check_flags
from nnunet_norm.commands.machine import DEVICES, default_processes, device_named
from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.commands.metric_options import add_metric_arguments, add_process_arguments, parse_tolerance
from nnunet_norm.commands.model import fold, model_folder
from nnunet_norm.commands.sizes import parse_size
from nnunet_norm.errors import EnsembleError
from nnunet_norm.scores import METRICS

if TYPE_CHECKING:
    from nnunet_norm.ensembling import Merging, Model, Postprocessing, Prediction

FOLDS = (0, 1, 2, 3, 4)
POSTPROCESSING = ("none", "each", "after")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is averaged, how models predict, and what is searched."""
    parser.add_argument(
        "-i",
        nargs="+",
        metavar="FOLDER",
        help="folders of predictions with probabilities (--save_probabilities); with -m one folder of images",
    )
    parser.add_argument("-o", metavar="FOLDER", help="where the segmentations go; made if need be")
    parser.add_argument(
        "-m",
        nargs="+",
        metavar="MODEL",
        help="models: their folders or, with -d, their names <trainer>__<plans>__<configuration>; MODEL:0,1 uses these folds "
        "of it in place of those of -f",
    )
    parser.add_argument("-d", metavar="DATASET", help="dataset name or number of the models")
    parser.add_argument("-f", nargs="+", type=fold, help="folds (default: 0 1 2 3 4, or those of the sweep), or all")
    parser.add_argument("--save_npz", action="store_true", help="also write the averaged probabilities")
    parser.add_argument(
        "--postprocessing",
        choices=POSTPROCESSING,
        default=POSTPROCESSING[0],
        help="each: where its own postprocessing turns a model's segmentation to background, its probabilities become those "
        "of background before they are averaged; after: nnU-Net's, on the segmentation of the average (default: none)",
    )
    parser.add_argument(
        "-pp_pkl_file",
        nargs="+",
        metavar="FILE",
        help="postprocessing.pkl: one per model for each, one for after (default: those of the cross-validations of the "
        "models, and of their ensemble)",
    )
    add_process_arguments(parser)
    parser.add_argument(
        "--scratch", metavar="DIR", help="where mapped files lie meanwhile (default: in the output folder)"
    )
    _add_prediction_arguments(parser.add_argument_group("with -m, how every model predicts"))
    _add_search_arguments(parser.add_argument_group("with --find"))
    add_metric_arguments(parser)


def _add_prediction_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: checkpoint_final.pth")
    group.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    group.add_argument(
        "--population",
        choices=("stored", "image", "tile", "batch"),
        help="whose statistics normalize, in all models (default: as each model has it); see nnunet-norm predict",
    )
    group.add_argument("--batches", metavar="FILE", help="for --population batch: JSON with the batch of every case")
    group.add_argument(
        "--controls", action="store_true", help="estimate on the controls of each experimental batch alone"
    )
    group.add_argument(
        "--max-memory", metavar="SIZE", help="memory that the process may come to, for example 6G (default: most of it)"
    )
    group.add_argument(
        "-npp", type=int, default=default_processes("nnUNet_npp"), help="processes for preprocessing; 0: none"
    )
    group.add_argument("-nps", type=int, default=default_processes("nnUNet_nps"), help="processes for export; 0: none")
    group.add_argument("-device", default="cuda", choices=DEVICES, help="default: cuda; see CUDA_VISIBLE_DEVICES")
    group.add_argument(
        "--keep_members", action="store_true", help="keep every model's own predictions, in OUTPUT/members"
    )
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="let models run code of their own when they are read; without it, such a model is refused",
    )


def _add_search_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--find", action="store_true", help="score every model and every pair in cross-validation")
    group.add_argument("--sweep", metavar="GRID", help="all models of a sweep, in place of -m")
    group.add_argument("-c", metavar="CONFIGURATION", help="with --sweep: of its models (default: the grid's)")
    group.add_argument("--metric", choices=METRICS, default=METRICS[0], help="chooses the best (default: Dice)")
    group.add_argument("--candidates", type=int, metavar="N", help="pairs of the N best models only (default: of all)")


def run(args: argparse.Namespace) -> None:
    """Average, predict and average, or search."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    check_flags(args, parser)
    max_memory = parse_size(args.max_memory, "--max-memory") if args.max_memory is not None else None
    if args.find:
        _find(args)
    elif args.m:
        _predict(args, max_memory)
    else:
        _average(args)


def _average(args: argparse.Namespace) -> None:
    from nnunet_norm.ensembling import load_postprocessing, member_of_folder, merge_folders

    given = [load_postprocessing(file) for file in args.pp_pkl_file or []]
    before = given if args.postprocessing == "each" else [None] * len(args.i)
    members = [member_of_folder(*each) for each in zip(args.i, before, strict=True)]
    after = given[0] if args.postprocessing == "after" else None
    with messages_shown():
        now = merge_folders(members, args.o, _merging(args, after))
    print(f"{len(members[0].files)} cases in {args.o}, {len(now)} of them averaged now")


def _merging(args: argparse.Namespace, after: Postprocessing | None = None) -> Merging:
    from nnunet_norm.ensembling import Merging

    return Merging(
        save_probabilities=args.save_npz,
        postprocessing=after,
        scratch=args.scratch,
        num_processes=args.np,
        progress=not args.disable_progress_bar,
    )


def _predict(args: argparse.Namespace, max_memory: int | None) -> None:
    from nnunet_norm.ensembling import load_postprocessing, predict_ensemble
    from nnunet_norm.ensembling.models import check_models, postprocessing_of_ensemble

    models = _models(args)
    check_models(models, args.chk)
    given = [load_postprocessing(file) for file in args.pp_pkl_file or []]
    before, after = None, None
    if args.postprocessing == "each":
        before = given or [model.postprocessing() for model in models]
    elif args.postprocessing == "after":
        after = given[0] if given else postprocessing_of_ensemble(models)
    with messages_shown():
        predict_ensemble(
            models,
            args.i[0],
            args.o,
            _prediction(args, max_memory),
            _merging(args, after),
            before=before,
            keep_members=args.keep_members,
        )
    print(f"the average of {len(models)} models is in {args.o}")


def _prediction(args: argparse.Namespace, max_memory: int | None) -> Prediction:
    from nnunet_norm.ensembling import Prediction
    from nnunet_norm.prediction import HaloPredictor

    options: dict[str, Any] = {
        "use_mirroring": not args.disable_tta,
        "population": args.population,
        "batches": args.batches,
        "controls": args.controls,
    }
    return Prediction(
        partial(
            HaloPredictor,
            **options,
            device=device_named(args.device),
            perform_everything_on_device=True,
            verbose=False,
            verbose_preprocessing=False,
            allow_tqdm=not args.disable_progress_bar,
            scratch=args.scratch,
            max_memory=max_memory,
            trust_checkpoint=args.trust_checkpoint,
        ),
        {**options, "device": args.device, "batches": _content(args.batches)},
        checkpoint_name=args.chk,
        num_processes_preprocessing=args.npp,
        num_processes_segmentation_export=args.nps,
        shared_statistics=args.population == "batch",
    )


def _content(file: str | None) -> str | None:
    """What a file of experimental batches says now; the predictor refuses one that cannot be read."""
    return Path(file).read_text(encoding="utf-8", errors="replace") if file and Path(file).is_file() else file


def _models(args: argparse.Namespace) -> list[Model]:
    """The models of -m, each with its folds.

    With -d, a name of nnU-Net's is that of the dataset's model, whatever lies in the working folder.

    Raises:
        EnsembleError: with -d, a name that is not nnU-Net's; a fold that is given twice.
        SetupError: nnUNet_results is not set, or there is no such dataset.
    """
    from nnunet_norm.ensembling import Model

    models = []
    for word in args.m:
        name, separator, numbers = word.rpartition(":")
        own = [fold(number) for number in numbers.split(",")] if separator and _are_folds(numbers) else None
        name = word if own is None else name
        folds = tuple(own or args.f or FOLDS)
        if len(set(folds)) < len(folds):
            raise EnsembleError(f"-m {word} has a fold twice ({', '.join(map(str, folds))}): give every fold once")
        parts = [] if Path(name).name != name else name.split("__")
        if args.d is not None and (len(parts) == 3 or not Path(name).is_dir()):
            if len(parts) != 3:
                raise EnsembleError(f"-m {name!r} is neither a folder nor <trainer>__<plans>__<configuration>")
            found = dict(zip(("tr", "p", "c"), parts, strict=True))
            name = model_folder(argparse.Namespace(m=None, d=args.d, **found))
        models.append(Model(Path(os.path.abspath(name)), folds))
    return models


def _are_folds(text: str) -> bool:
    return all(part == "all" or part.isdecimal() for part in text.split(","))


def _find(args: argparse.Namespace) -> None:
    tolerance = parse_tolerance(args.tolerance)
    from nnunet_norm.ensembling import Model, Search, instructions_of, table_of, write_findings
    from nnunet_norm.evaluation import Options

    if args.sweep is not None:
        from nnunet_norm.sweep.grid import load_grid

        grid = load_grid(args.sweep, dataset=args.d, configuration=args.c, folds=args.f)
        models = [Model(grid.model_folder(point), tuple(grid.folds)) for point in grid.points]
        folder = grid.folder
    else:
        models = _models(args)
        folder = models[0].folder.parent
    search = Search(
        metric=args.metric,
        options=Options(tolerance, args.hd95),
        num_candidates=args.candidates,
        num_processes=args.np,
        scratch=args.scratch,
        progress=not args.disable_progress_bar,
    )
    with messages_shown():
        found = search.run(models)
    print(f"{table_of(found)}\n\n{instructions_of(found)}")
    print("\n".join(str(path) for path in write_findings(found, folder)))
