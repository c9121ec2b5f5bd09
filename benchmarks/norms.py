"""All norms on electron microscopy: Dice in train and in eval mode, and how far the two disagree.

    python benchmarks/norms.py --data IMAGES --work FOLDER [--epochs 10] [--iterations 100] [--seeds 0] [--only BatchNorm ...]

IMAGES holds ``vnc_sstem``. nnU-Net's own programs preprocess it and train one small 2d network per norm, on one core each,
``--jobs`` at a time. Then each network predicts the same mini-batches of validation tiles with its norms in eval and in train
mode, of the size that normalizes its training. BatchNorm at batch 2 is the positive control: its modes must disagree.

Everything in FOLDER is kept: started again, the benchmark goes on where it was. Results: OUT/norms.json, .md and .png.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from norms_measure import measure, reported, trained
from norms_report import draw, markdown
from reporting import command, machine, versions
from trainings import Training, run_all
from whole_image_statistics_data import DATASETS, cases_of, make_raw, prepare

from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.writing import write_json, written_beside

DATASET = DATASETS["vnc"]
BATCH, GHOST_BATCH = 2, 4
VALIDATED = "test"
"""The sections that ``whole_image_statistics.py`` tests on: none of them touches one that is trained on."""


@dataclass(frozen=True)
class Norm:
    """A row of the table.

    Attributes:
        trainer: its trainer.
        plan: flags of ``nnunet-norm plan`` beyond those of all, if it needs plans of its own.
        batch_note: what is to be said about its batch.
    """

    trainer: str
    plan: tuple[str, ...] = ()
    batch_note: str = ""


NORMS = {
    "InstanceNorm": Norm("nnUNetTrainerInstanceNorm"),
    "InstanceNorm, tracked": Norm("nnUNetTrainerINTracked"),
    "GroupNorm": Norm("nnUNetTrainerGN"),
    "BatchNorm": Norm("nnUNetTrainerBatchNorm"),
    "BatchRenorm": Norm("nnUNetTrainerBRN"),
    "PreciseBN": Norm("nnUNetTrainerPreciseBN"),
    "FrozenBN": Norm("nnUNetTrainerFrozenBN"),
    "GhostBN": Norm(
        "nnUNetTrainerGhostBN",
        ("--batch-size", str(GHOST_BATCH), "--normalization-batch-size", str(BATCH)),
        f", by {BATCH}",
    ),
    "no norm": Norm("nnUNetTrainerNoNorm"),
}


def training(name: str, seed: int, args: argparse.Namespace) -> Training:
    """The training of a norm."""
    norm, size = NORMS[name], "x".join(map(str, args.patch))
    special = "_ghost" if norm.plan else ""
    plans = f"norms_{args.stages}s_{args.features}f_{size}_{args.iterations}it_seed{seed}{special}"
    sizes = ["--num-stages", args.stages, "--patch-size", *args.patch, "--base-features", args.features]
    length = ["--iterations-per-epoch", args.iterations, "--val-iterations-per-epoch", max(args.iterations // 10, 1)]
    changes = tuple(map(str, [*sizes, "--batch-size", BATCH, *length, "--seed", seed, *norm.plan]))
    return Training(f"{name}, seed {seed}", DATASET, norm.trainer, args.epochs, plans, changes, args.work)


def result_of(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What was found for one training."""
    run = training(name, seed, args)
    trainer = trained(DATASET.name, DATASET.configuration, run.trainer_name, run.plans, run.checkpoint)
    found = {"measured": measure(trainer), "reported": reported(run.fold)}
    print(f"{run.title}: measured", flush=True)
    about = {"seed": seed, "trainer": run.trainer_name, "plans": run.plans, "batch_note": NORMS[name].batch_note}
    return about | found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NNUNET_NORM_DATA", shared)))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=100, help="per epoch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--patch", type=int, nargs=2, default=[128, 128])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on one core")
    parser.add_argument("--note", default="", help="what else is to be said about the machine")
    args = parser.parse_args()
    if not (args.data / "vnc_sstem").is_dir():
        parser.error(f"--data {args.data} holds no vnc_sstem; give another folder, or set NNUNET_NORM_DATA")
    return args


def main() -> None:
    args = arguments()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        k: v for k, v in Workspace(args.work, DemoSettings()).environment().items() if k.startswith("nnUNet_")
    }
    roles = {"train": "train", VALIDATED: "val"}
    cases = [(name, roles[role], *files) for name, role, *files in cases_of("vnc", args.data) if role in roles]
    prepare(DATASET, args.work, lambda folder: make_raw(DATASET, cases, folder))
    start = time.perf_counter()
    run_all([training(name, seed, args) for name in args.only for seed in args.seeds], args.jobs)
    trained_for = time.perf_counter() - start
    torch.set_num_threads(os.cpu_count() or 1)
    sections = {
        role: [name.removeprefix("case_") for name, own, *_ in cases if own == role] for role in ("train", "val")
    }
    keys = ("epochs", "iterations", "seeds", "stages", "features", "patch", "jobs", "note")
    result = {
        "command": command("norms.py", sys.argv[1:], ("--data", "--work", "--out")),
        "machine": machine("cpu"),
        "versions": versions(),
        "settings": {key: getattr(args, key) for key in keys}
        | {f"{role}_sections": f"{names[0]} to {names[-1]}" for role, names in sections.items()},
        "seconds_of_training": trained_for,
        "classes": DATASET.foreground,
        "norms": {name: [result_of(name, seed, args) for seed in args.seeds] for name in args.only},
    }
    path = args.out / "norms.json"
    write_json(path, result, indent=2)
    draw(result, path.with_suffix(".png"))
    with written_beside(path.with_suffix(".md")) as beside:
        beside.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
