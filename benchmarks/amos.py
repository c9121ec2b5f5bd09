"""Patch, batch and loss: the settings of the study on AMOS 2022 with InstanceNorm and with BatchRenorm, as one sweep.

    python benchmarks/amos.py --work FOLDER [--data IMAGES] [--epochs N | --budget MINUTES] [--iterations 50] [--folds 0]
                              [--norms ...] [--losses ...] [--settings ...] [--cases 100] [--jobs 2] [--seed 0]
    python benchmarks/amos.py --work FOLDER --dataset 219 -c 3d_fullres --folds 0 1 2 3 4 --epochs 1000 --gpus 1
                              [--fixed micro_batch_size=2 activation_checkpointing=true] [-- --engine slurm ...]

Without ``--dataset``: the hippocampus MRI of the Medical Segmentation Decathlon, with the study's settings scaled to its
small images (a U-Net of 3 stages and 8 features; patches from 16x16x16). With it: a dataset that nnU-Net has preprocessed in
the folders of the user's nnUNet_* variables, e.g. AMOS itself, with nnU-Net's own plans. What follows ``--`` goes to
``nnunet-norm sweep run``.

The grid is that of ``nnunet-norm sweep run amos``. It is trained by ``sweep run``, measured by ``sweep report`` (Dice and
surface Dice, the study's DSC and NSD), and ``ensemble --find`` looks for the best model or pair, once all are done. Every
training has as many optimizer steps, as in the study, so larger batches see more patches. ``--budget`` measures a few
steps of every setting first and then gives all trainings the same number of epochs, at least one, so that the sweep ends in
about that time; the number is kept in FOLDER and holds for every later call. Started again, everything goes on where it was.

Results: OUT/amos_hippocampus.json, .md and figures; of another dataset OUT/amos_<its name>.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from amos_length import Length, length_of
from amos_report import write_results
from amos_sweep import Sweep
from nnunet_datasets import make_raw, prepare
from reporting import command_or_former, machine, parser_of, refusals_in_one_line, versions
from whole_image_statistics_data import DATASETS, cases_of

from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.errors import NnunetNormError
from nnunet_norm.plans.amos import GRID
from nnunet_norm.training.losses import LOSSES
from nnunet_norm.writing import write_json

HIPPOCAMPUS = DATASETS["hippocampus"]
BASE = "amos_base"
SMALL = ("--num-stages", "3", "--patch-size", "16", "16", "16", "--base-features", "8", "--batch-size", "2")
"""Plans that the settings scale. The largest patch, 2.4 times as wide, still fits the images (at least 24x40x31)."""

SCALED = (
    "The study's patches are 64x160x160 to 64x384x384 in images of about 100x500x500 voxels. Here they are scaled to "
    "16x16x16, 16x32x32, 16x36x36 and 16x40x40 in images of about 36x50x35: one axis stays, the other two grow by the "
    "study's factors (1.8, 2.2 and 2.4), enlarged to what the strides divide (2, 2.25 and 2.5). The U-Net has 3 stages and 8 "
    "features, so that the deepest maps of the smallest patch are 4 voxels wide (the study's: 5). Batches are the study's."
)


def make_hippocampus(args: argparse.Namespace, sweep: Sweep) -> None:
    """Dataset, split in five folds by nnU-Net's own rule, and base plans; what is there is not made again."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    every = [(name, "train", *files) for name, _, *files in sorted(cases_of("hippocampus", args.data))]
    cases = every[:: max(len(every) // args.cases, 1)][: args.cases]
    prepare(HIPPOCAMPUS, args.work, lambda folder: make_raw(HIPPOCAMPUS, cases, folder))
    preprocessed = args.work / "nnUNet_preprocessed" / HIPPOCAMPUS.name
    write_json(preprocessed / "splits_final.json", generate_crossval_split([case[0] for case in cases]))
    if not (preprocessed / f"{BASE}.json").exists():
        which = ("-d", HIPPOCAMPUS.number, "-c", HIPPOCAMPUS.configuration, "--plans-name", BASE)
        sweep.call("plan", *which, *SMALL)


def grid_of(args: argparse.Namespace, length: Length) -> dict[str, Any]:
    """The study's grid, or the part that was asked for, at some length."""
    return {
        "name": f"amos_{length.epochs}x{length.iterations}_seed{args.seed}",
        "dataset": args.dataset or HIPPOCAMPUS.number,
        "configuration": args.c,
        "plans": args.plans,
        "recipe": GRID["recipe"],
        "folds": args.folds,
        "gpus": args.gpus,
        "fixed": {**args.fixed, "seed": args.seed, **length.fixed},
        "axes": {"norm": args.norms, "loss": args.losses, "setting": args.settings},
        "npz": args.candidates > 0,
    }


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    shared = Path(__file__).parents[2] / "shared" / "data"
    axes = GRID["axes"]
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NNUNET_NORM_DATA", shared)))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dataset", help="another one, e.g. 219, in the user's nnUNet_* folders")
    parser.add_argument("-c", default="3d_fullres", help="configuration")
    parser.add_argument("--plans", help="that the settings scale (default: nnU-Net's; of the hippocampus, small ones)")
    parser.add_argument("--cases", type=int, default=100, help="of the hippocampus, evenly over all (default: 100)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="default: 10; with --dataset 1000, as in the study")
    length.add_argument("--budget", type=float, metavar="MINUTES", help="all trainings together, calibration included")
    parser.add_argument("--iterations", type=int, help="per epoch (default: 50; with --dataset nnU-Net's 250)")
    parser.add_argument("--norms", nargs="+", default=axes["norm"], help="the first is what others are compared with")
    parser.add_argument("--losses", nargs="+", choices=("DiceCE", *LOSSES), default=axes["loss"])
    parser.add_argument("--settings", nargs="+", choices=axes["setting"], default=axes["setting"])
    parser.add_argument("--folds", nargs="+", type=int, default=[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=2.0, help="of the surface Dice, in mm (default: 2)")
    parser.add_argument("--candidates", type=int, default=8, help="pairs of so many best models; 0: none (default: 8)")
    parser.add_argument(
        "--fixed", nargs="*", default=[], metavar="KEY=VALUE", help="what else all plans have in common"
    )
    parser.add_argument("--gpus", type=int, default=0, help="per training (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time on the CPU; with --gpus one per GPU")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--note", default="", help="what else is to be said about the machine")
    parser.add_argument("sweep", nargs="*", metavar="-- FLAG", help="for nnunet-norm sweep run")
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on the dataset; values of --fixed as YAML reads them."""
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.plans = args.plans or ("nnUNetPlans" if args.dataset else BASE)
    args.iterations = args.iterations or (250 if args.dataset else 50)
    args.epochs = args.epochs or (1000 if args.dataset else 10)
    args.fixed = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in args.fixed)}
    where = ("--slots", str(args.jobs)) if not args.gpus else ()
    args.sweep = [*(args.sweep or where), "-device", "cuda" if args.gpus else "cpu", "--disable_progress_bar"]
    if not args.dataset:  # what nnU-Net reads when it is imported, in this process too
        own = Workspace(args.work, DemoSettings()).environment()
        os.environ |= {key: value for key, value in own.items() if key.startswith("nnUNet_")}
    return args


def main() -> None:
    args = checked(options().parse_args())
    sweep = Sweep(args.work, args.tolerance)
    failed = None
    with refusals_in_one_line("amos.py"):
        if not args.dataset:
            make_hippocampus(args, sweep)
        length = Length(args.epochs, args.iterations)
        if args.budget is not None:
            flags = None if args.report_only else args.sweep
            length = length_of(sweep, partial(grid_of, args), args.budget, length, args.jobs, flags)
        grid = grid_of(args, length)
        file = sweep.write(grid)
        if not args.report_only:
            try:
                sweep.call("sweep", "run", str(file), *args.sweep)
            except NnunetNormError as error:  # a training failed: report on the others
                failed = error
        keys = ("cases", "folds", "seed", "budget", "norms", "losses", "settings", "fixed", "note")
        name = f"amos_{args.dataset}" if args.dataset else "amos_hippocampus"
        former = args.out / f"{name}.json"
        about = {
            "command": command_or_former("amos.py", sys.argv[1:], ("--data", "--work", "--out"), former),
            "machine": machine("cuda" if args.gpus else "cpu"),
            "versions": versions(),
            "settings": {key: getattr(args, key) for key in keys} | length.as_dict(),
            "scaled": SCALED if args.plans == BASE else "",
        }
        print(write_results(sweep.measure(file, args.candidates), about, args.out / name))
        if failed:
            raise failed


if __name__ == "__main__":
    main()
