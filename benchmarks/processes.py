"""One process and two at the same batch: loss and Dice, epoch by epoch, of BatchRenorm trained with DDP.

    python benchmarks/processes.py --data IMAGES --work FOLDER [--epochs 20] [--iterations 40] [--seeds 0 1]

IMAGES holds ``hippocampus_msd04``. nnU-Net preprocesses it, and ``nnunet-norm train`` trains the same small 3d network in
one process and in two (gloo, on the CPU, one thread each), with the same number of samples per optimizer step over all
processes, through the final validation. With two processes each normalizes its own half of the batch, and r and d refer to
running statistics of both halves; with ``sync=full`` both normalize with the whole batch, as one process does. Trainings of a
seed begin with the same weights and draw other patches: curves are to be compared with the spread of seeds, not point by
point.

Everything in FOLDER is kept: started again, the benchmark goes on where it was. Results: OUT/processes.json, .md and .png.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from nnunet_datasets import make_raw, prepare, program
from reporting import command, machine, parser_of, spread, table, versions
from trainings import Training
from whole_image_statistics_data import DATASETS, cases_of

from nnunet_norm.demo.steps import continue_flag
from nnunet_norm.writing import write_json, written_beside

DATASET = DATASETS["hippocampus"]
TRAINER = "nnUNetTrainerBRN"
WAYS = {
    "1 process": (1, "running", "tab:blue"),
    "2 processes": (2, "running", "tab:orange"),
    "2 processes, sync=full": (2, "full", "tab:green"),
}
"""Number of processes, what they share, and a colour; the last normalizes with the batch of both."""
CURVES = {"train_losses": "training loss", "val_losses": "validation loss", "mean_fg_dice": "pseudo Dice"}


@dataclass(frozen=True)
class Processes(Training):
    """A training in ``number`` processes."""

    number: int = 1

    def run(self) -> None:
        """``nnunet-norm train`` on as many cores, or nothing if that was done before."""
        if self.is_done:
            print(f"{self.title}: trained before", flush=True)
            return
        run = program(self.work, f"{self.trainer_name}__{self.plans}.log", partial(self._follow, time.perf_counter()))
        what = (self.dataset.number, self.dataset.configuration, "0", "-tr", self.trainer_name, "-p", self.plans)
        run("nnunet-norm", "train", *what, "-device", "cpu", "-num_gpus", str(self.number), *continue_flag(self.fold))


def training(way: str, seed: int, args: argparse.Namespace) -> Processes:
    """The training of one of :data:`WAYS` and a seed."""
    number, sync, _ = WAYS[way]
    patch = "x".join(map(str, args.patch))
    plans = f"processes{number}_b{args.batch}_f{args.features}_{args.iterations}it_p{patch}_seed{seed}"
    plans += "_full" * (sync == "full")
    length = ["--iterations-per-epoch", args.iterations, "--val-iterations-per-epoch", max(args.iterations // 10, 1)]
    sizes = [
        "--base-features",
        args.features,
        "--batch-size",
        args.batch,
        "--num-stages",
        "3",
        "--patch-size",
        *args.patch,
    ]
    changes = tuple(map(str, [*sizes, *length, "--seed", seed, "--batch-renorm", f"sync={sync}"]))
    return Processes(f"{way}, seed {seed}", DATASET, TRAINER, args.epochs, plans, changes, args.work, number)


def result_of(run: Processes, way: str, seed: int) -> dict[str, Any]:
    """Curves and final figures of a finished training."""
    log = torch.load(run.checkpoint, map_location="cpu", weights_only=False)["logging"]
    summary = json.loads((run.fold / "validation" / "summary.json").read_text())
    report = json.loads((run.fold / "validation" / "norm_report.json").read_text())
    seconds = [e - s for s, e in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)]
    return {
        "way": way,
        "seed": seed,
        "dice": summary["foreground_mean"]["Dice"],
        "disparity": report["train_eval_disparity"]["mean"],
        "cases": report["num_cases"],
        "seconds_per_epoch": median(seconds),
        "curves": {key: [float(value) for value in log[key]] for key in CURVES},
    }


def draw(results: list[dict[str, Any]]) -> plt.Figure:
    """A panel per curve; seeds of one number of processes share a colour."""
    fig, axes = plt.subplots(1, len(CURVES), figsize=(12, 3.8), layout="constrained")
    for axis, (key, label) in zip(axes, CURVES.items(), strict=True):
        for result in results:
            way = result["way"]
            name = way if result["seed"] == results[0]["seed"] else None
            axis.plot(result["curves"][key], color=WAYS[way][-1], label=name, linewidth=1.2)
        axis.set(xlabel="epoch", ylabel=label)
    axes[0].legend()
    fig.suptitle(
        "BatchRenorm on hippocampus MRI: one process and two (DDP, gloo), same batch; a line per seed", fontsize=10
    )
    return fig


def markdown(found: dict[str, Any]) -> str:
    """The report."""
    rows = [["", "Dice of the final validation", "disparity", "last training loss", "seconds per epoch"]]
    for way in WAYS:
        of = [result for result in found["results"] if result["way"] == way]
        losses = [mean(result["curves"]["train_losses"][-3:]) for result in of]
        keys = ("dice", "disparity")
        values = [spread([result[key] for result in of if result[key] is not None]) for key in keys]
        seconds = spread([result["seconds_per_epoch"] for result in of])
        rows.append([way, *values, spread(losses), seconds])
    about = found["arguments"]
    patch = "x".join(map(str, about["patch"]))
    return "\n".join(
        [
            "# One process and two at the same batch",
            "",
            f"`{found['command']}`, {len(about['seeds'])} seeds: median (least to most). Batch {about['batch']} over all "
            f"processes, patch {patch}, {about['epochs']} epochs of {about['iterations']} iterations, {TRAINER}. "
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores, torch {found['versions']['torch']}; "
            "one thread per process.",
            "",
            table(rows),
            "",
            "A step of two processes with sync=full is that of one process with the whole batch, to rounding "
            "(`tests/training/test_scaled_trainer_processes.py`); these trainings differ in the patches that they draw.",
            "",
            "![Training loss, validation loss and pseudo Dice by epoch](processes.png)",
            "",
            "*A line per seed. Two processes normalize half the batch each, or with sync=full the whole batch, as one "
            "process does. The training loss is the mean over processes.*",
            "",
        ]
    )


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    shared = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NNUNET_NORM_DATA", shared)))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=40, help="per epoch")
    parser.add_argument("--batch", type=int, default=4, help="over all processes")
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 32, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    if not (args.data / "hippocampus_msd04").is_dir():
        parser.error(f"--data {args.data} holds no hippocampus_msd04; give another folder, or set NNUNET_NORM_DATA")
    return args


def main() -> None:
    args = arguments()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(DATASET, args.work, lambda folder: make_raw(DATASET, cases_of("hippocampus", args.data), folder))
    results = []
    for seed in args.seeds:
        for way in WAYS:
            run = training(way, seed, args)
            run.make_plans()
            run.run()
            results.append(result_of(run, way, seed))
    found = {
        "command": command("processes.py", sys.argv[1:], ("--data", "--work", "--out")),
        "machine": machine("cpu"),
        "versions": versions(),
        "arguments": {
            key: getattr(args, key) for key in ("epochs", "iterations", "batch", "features", "patch", "seeds")
        },
        "results": results,
    }
    write_json(args.out / "processes.json", found)
    mpl.use("Agg")
    with written_beside(args.out / "processes.png") as beside:
        draw(results).savefig(beside, dpi=110)
    with written_beside(args.out / "processes.md") as beside:
        beside.write_text(markdown(found))


if __name__ == "__main__":
    main()
