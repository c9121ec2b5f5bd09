"""Tables of the papers behind this package on real images: what each norm does to Dice, to its two modes, and to seams.

    python benchmarks/normalization.py vnc_2d isbi_2d --work FOLDER --data IMAGES [--seeds 0 1 2] [--budget 120]
    python benchmarks/normalization.py Dataset123_X:3d_fullres --work FOLDER --stages 4 --patch 32 96 96

A setting is one of ``normalization_settings.py``, made from IMAGES (``vnc_sstem``, ``isbi2012_em``, ``hippocampus_msd04``),
or any dataset in your own ``nnUNet_*`` folders by its name, fold 0 of its own split; nothing is written there.
``nnUNetv2_train`` trains one small network per norm, input normalization and seed, on one core each, ``--jobs`` at a time.
Then, on images that were not trained on:

* tables: Dice of patches in eval and in train mode and the disparity between them, in batches as large as in training; tile
  mismatch; Dice of whole images by the halo predictor and by nnU-Net's (Buglakova et al. 2025, tables 1 and 2);
* tiles: Dice against the size of the tiles;
* batches: Dice and disparity against the size of the batch that normalizes (Wu and Johnson 2021, figure 5), of networks that
  are trained so (GhostBN), and of the train mode of others;
* transfer: models of one microscope on images of another, with their own statistics and with those of the other images.

``--budget`` takes minutes for all trainings of the call and finds the number of epochs, the same for all, by a short
training; it is written down in FOLDER and holds from then on. Everything in FOLDER is kept: started again, the benchmark
goes on where it was, and takes whatever is trained there. Results: OUT/normalization_SETTING.json, .md and .png.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from normalization_budget import epochs_for
from normalization_datasets import make, network_changes, refuse_collisions, setting_named, with_network
from normalization_measure import batch_sizes, ghost, tables, tiles
from normalization_models import Trained, opened, stamp_of
from normalization_report import write_report
from normalization_settings import NORMALIZATION_BATCHES, ROWS, SETTINGS, SOURCES, Setting, Wanted
from normalization_transfer import make_images, transfer
from reporting import command_or_former, machine, parser_of, refusals_in_one_line, versions
from trainings import Training, run_all

from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.errors import NnunetNormError
from nnunet_norm.writing import write_json

PARTS = ("train", "tables", "tiles", "transfer", "batches")
BATCHED = ("BatchNorm", "BatchRenorm", "PreciseBN")
"""Rows whose train mode depends on the batch."""

ONLY = f"{', '.join(ROWS)}; trainings of GhostBN are no rows: they belong to --what batches"
"""Help of ``--only``."""

Measure = Callable[[Trained], dict[str, Any]]


def planned(settings: dict[str, Setting], seeds: Sequence[int]) -> Iterator[Wanted]:
    """Every training that a report can have, seed by seed."""
    for seed in seeds:
        for name, setting in settings.items():
            yield from (Wanted(name, setting, row, seed) for row in ROWS)
            if setting.ghost is not None:
                yield from (Wanted(name, setting, size, seed) for size in NORMALIZATION_BATCHES)


def is_wanted(each: Wanted, args: argparse.Namespace) -> bool:
    """Whether this call trains it and measures on it."""
    return each.what in args.only if isinstance(each.what, str) else "batches" in args.what


def measures(each: Wanted, run: Training, args: argparse.Namespace) -> dict[str, tuple[str, Measure]]:
    """What can be measured on a training, by name: the part of the work that it is, and how."""
    if not isinstance(each.what, str):
        return {"ghost": ("batches", ghost)}
    found: dict[str, tuple[str, Measure]] = {"tables": ("tables", partial(tables, run=run)), "tiles": ("tiles", tiles)}
    if each.what in BATCHED:
        found["batches"] = ("batches", batch_sizes)
    if each.setting.other:
        found["transfer"] = ("transfer", partial(elsewhere, each=each, run=run, args=args))
    return found


def elsewhere(trained: Trained, each: Wanted, run: Training, args: argparse.Namespace) -> dict[str, Any]:
    """The model on the images of the other setting."""
    del trained  # it has its own images
    adapted = args.work / "transfer" / "models" / each.setting.dataset.name / run.fold.parent.name
    return transfer(run, make_images(SETTINGS[each.setting.other], args.data, args.work), adapted)


def measured(each: Wanted, run: Training, args: argparse.Namespace) -> dict[str, Any]:
    """What is known of a training; what this call wants and is not known yet, is measured."""
    if not run.is_done:
        return {}
    of = [*stamp_of(run), args.cases]
    trained = opened(run, args.cases)
    found = {}
    for name, (part, measure) in measures(each, run, args).items():
        path = args.work / "measured" / each.setting.dataset.name / run.fold.parent.name / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("of") != of:
            if args.report_only or part not in args.what or not is_wanted(each, args):
                continue
            start = time.perf_counter()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_json(path, {"of": of, "found": measure(trained)})
            except ValueError as error:  # this package's refusals, and torch's: one value per channel has no variance
                why = str(error).partition("\n")[0]
                print(f"{each.name}, {run.title}: {name} not measured: {why}", file=sys.stderr, flush=True)
                continue
            print(f"{each.name}, {run.title}: {name} measured, {time.perf_counter() - start:.0f} s", flush=True)
        found[name] = json.loads(path.read_text())["found"]
    return found


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    shared = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("settings", nargs="+", help=f"{', '.join(SETTINGS)}, or Dataset123_X:3d_fullres")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NNUNET_NORM_DATA", shared)))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=ONLY)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=15)
    length.add_argument(
        "--budget", type=float, metavar="MINUTES", help="for all trainings of the call, instead of --epochs"
    )
    parser.add_argument("--iterations", type=int, default=100, help="per epoch")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on one core")
    parser.add_argument("--cases", type=int, default=20, help="validation cases that are measured, at most")
    parser.add_argument("--stages", type=int, help="of the network, instead of the setting's; so the next three")
    parser.add_argument("--patch", type=int, nargs="+")
    parser.add_argument("--features", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--report-only", action="store_true", help="neither train nor measure: what is known")
    parser.add_argument("--note", default="", help="what else is to be said about the machine")
    args = parser.parse_args()
    if args.report_only:
        args.what = [part for part in args.what if part != "train"]
    return args


def prepared(args: argparse.Namespace) -> dict[str, Setting]:
    """Datasets, and then nnU-Net's folders are those in ``--work``."""
    found = {text.replace(":", "_"): setting_named(text) for text in args.settings}
    args.work = args.work.resolve()
    refuse_collisions(found.values(), args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    for setting in found.values():
        make(setting, args.data, args.work)
    own = Workspace(args.work, DemoSettings()).environment()
    os.environ |= {key: value for key, value in own.items() if key.startswith("nnUNet_")}
    return {name: with_network(setting, network_changes(args), args.work) for name, setting in found.items()}


def result_of(
    name: str, setting: Setting, runs: list[tuple[Wanted, Training]], args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is known of a setting, measured now or before."""
    found: dict[str, Any] = {}
    for each, run in runs:
        if each.name == name:
            found.setdefault(str(each.what), {})[str(each.seed)] = measured(each, run, args)
    splits = args.work / "nnUNet_preprocessed" / setting.dataset.name / "splits_final.json"
    cases = {role: len(names) for role, names in json.loads(splits.read_text())[0].items()}
    former, folders = file_of(name, args), ("--data", "--work", "--out")
    return {
        "command": command_or_former("normalization.py", sys.argv[1:], folders, former),
        "machine": machine("cpu"),
        "versions": versions(),
        "note": args.note,
        "setting": name,
        "dataset": setting.dataset.name,
        "cases": cases | {"measured": min(cases["val"], args.cases)},
        "images": SOURCES.get(setting.source.split("_")[0], ""),
        "configuration": setting.dataset.configuration,
        "network": setting.network.words,
        "ghost_network": setting.ghost.words if setting.ghost else None,
        "other": setting.other,
        "epochs": args.epochs,
        "iterations": args.iterations,
        "seeds": args.seeds,
        "trained": found,
    }


def file_of(name: str, args: argparse.Namespace) -> Path:
    """The results of a setting."""
    return args.out / f"normalization_{name}.json"


def main() -> None:
    args = arguments()
    failed = None
    with refusals_in_one_line("normalization.py"):
        settings = prepared(args)
        every = list(planned(settings, args.seeds))
        if args.budget is not None:
            args.epochs = epochs_for(args.budget, [each for each in every if is_wanted(each, args)], args)
        runs = [(each, each.training(args.epochs, args.iterations, args.work)) for each in every]
        if "train" in args.what:
            try:
                run_all([run for each, run in runs if is_wanted(each, args)], args.jobs)
            except NnunetNormError as error:  # what could be trained is reported
                failed = error
        torch.set_num_threads(os.cpu_count() or 1)
        for name, setting in settings.items():
            write_report(result_of(name, setting, runs, args), file_of(name, args))
        if failed:
            raise failed


if __name__ == "__main__":
    main()
