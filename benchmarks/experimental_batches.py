"""Batch effects normalization: batch-wise training and batch-wise inference, both, each alone, and none.

    python benchmarks/experimental_batches.py --data IMAGES --work FOLDER [--dataset em hippocampus] [--epochs 10]
                                              [--iterations 100] [--seeds 0]

The ablation of Lin and Lu (2022, doi 10.1101/2022.10.14.512286). Groups of images that nothing makes alike before the network
sees them: two stacks of electron microscopy (``em``), or hippocampus MRI whose intensities differ by orders of magnitude
(``hippocampus``). Batch-wise training: nnUNetTrainerBEN, whose mini-batches come from one group each, against
nnUNetTrainerBatchNorm. Batch-wise inference: ``nnunet-norm predict --population batch``, with the statistics of all held-out
images of a group, against the stored ones. Plans, data, seed and length of both trainings are the same. Dice is that of the
held-out images of each group, which no training saw.

Everything in FOLDER is kept: started again, the benchmark goes on where it was. Results: OUT/experimental_batches.json
and .md.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from experimental_batches_data import DATA, Case, differences, make_raw, of_preprocessed, read_labels, schemes
from experimental_batches_report import markdown
from nnunet_datasets import Dataset, prepare, program
from reporting import command, machine, parser_of, versions
from trainings import Training, run_all

from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.experimental_batches import FILE_NAME
from nnunet_norm.metrics import dice_counts
from nnunet_norm.writing import write_json, written_beside

TRAINERS = {"mixed": "nnUNetTrainerBatchNorm", "batch-wise": "nnUNetTrainerBEN"}
POPULATIONS = {"stored": "stored", "batch-wise": "batch"}
"""How the statistics at inference are called in the table, and the value of ``--population``."""


def training(way: str, seed: int, which: str, args: argparse.Namespace) -> Training:
    """The training of an arm."""
    dataset, _, patch = DATA[which]
    sizes = ["--num-stages", args.stages, "--patch-size", *patch, "--base-features", args.features]
    length = ["--iterations-per-epoch", args.iterations, "--val-iterations-per-epoch", max(args.iterations // 10, 1)]
    changes = tuple(map(str, [*sizes, "--batch-size", args.batch, *length, "--seed", seed]))
    plans = f"ben_{args.stages}s_{args.features}f_b{args.batch}_{args.iterations}it_seed{seed}"
    title = f"{which}, {way} training, seed {seed}"
    return Training(title, dataset, TRAINERS[way], args.epochs, plans, changes, args.work)


def predicted(run: Training, inference: str, cases: list[Case]) -> Path:
    """Folder with the predictions of the held-out images by ``nnunet-norm predict``."""
    raw, dataset = run.work / "nnUNet_raw" / run.dataset.name, run.dataset
    folder = run.work / "predictions" / dataset.name / f"{run.fold.parent.name}__{POPULATIONS[inference]}"
    held_out = [case for case in cases if case.role == "test"]
    if all((folder / f"{case.name}{dataset.ending}").exists() for case in held_out):
        return folder
    print(f"{run.title}: predicting, {inference} statistics", flush=True)
    model = ("-d", dataset.number, "-c", dataset.configuration, "-tr", run.trainer_name, "-p", run.plans, "-f", "0")
    batches = ("--batches", str(raw / FILE_NAME)) if inference == "batch-wise" else ()
    how = ("--population", POPULATIONS[inference], *batches, "-device", "cpu", "-npp", "0", "-nps", "0")
    program(run.work, f"{folder.name}.log", lambda line: None)(
        *("nnunet-norm", "predict", "-i", str(raw / "imagesTs"), "-o", str(folder)),
        *(*model, *how, "--disable_tta", "--disable_progress_bar"),
    )
    return folder


def dice_of(folder: Path, dataset: Dataset, cases: list[Case], work: Path) -> dict[str, list[float]]:
    """Per group, Dice of each class over all held-out voxels of the group together."""
    counts: dict[str, Any] = {}
    for case in cases:
        if case.role == "test":
            reference = work / "nnUNet_raw" / dataset.name / "labelsTs" / f"{case.name}{dataset.ending}"
            files = (folder / f"{case.name}{dataset.ending}", reference)
            first, second = (torch.from_numpy(read_labels(file).astype(int)) for file in files)
            masks = [
                torch.stack([labels == k for k in range(1, len(dataset.labels))])[None] for labels in (first, second)
            ]
            counts[case.group] = counts.get(case.group, 0) + dice_counts(*masks)
    return {group: (twice / both).tolist() for group, (twice, both) in sorted(counts.items())}


def experiment(which: str, args: argparse.Namespace) -> dict[str, Any]:
    """All arms on one dataset."""
    dataset, cases_in, patch = DATA[which]
    cases = cases_in(args.data)
    prepare(dataset, args.work, lambda folder: make_raw(dataset, cases, folder))
    runs = {(way, seed): training(way, seed, which, args) for seed in args.seeds for way in TRAINERS}
    run_all(list(runs.values()), args.jobs)
    arms = []
    for way in TRAINERS:
        for inference in POPULATIONS:
            folders = [predicted(runs[way, seed], inference, cases) for seed in args.seeds]
            dice = [dice_of(folder, dataset, cases, args.work) for folder in folders]
            arms.append({"training": way, "inference": inference, "dice": dice})
    return {
        "classes": dataset.foreground,
        "patch": patch,
        "schemes": schemes(args.work, dataset),
        "groups": differences(of_preprocessed(args.work, dataset), cases),
        "held_out": {
            group: sum(c.group == group and c.role == "test" for c in cases)
            for group in sorted({c.group for c in cases})
        },
        "arms": arms,
    }


def main() -> None:
    parser = parser_of(__doc__)
    shared = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NNUNET_NORM_DATA", shared)))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dataset", nargs="+", choices=DATA, default=["em"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=100, help="per epoch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on one core")
    parser.add_argument("--note", default="", help="what else is to be said about the machine")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        k: v for k, v in Workspace(args.work, DemoSettings()).environment().items() if k.startswith("nnUNet_")
    }
    path = args.out / "experimental_batches.json"
    keys = ("epochs", "iterations", "seeds", "stages", "features", "batch", "note")
    about = {
        "command": command("experimental_batches.py", sys.argv[1:], ("--data", "--work", "--out")),
        "machine": machine("cpu"),
        "versions": versions(),
        "settings": {key: getattr(args, key) for key in keys},
    }
    for which in args.dataset:
        found = about | experiment(which, args)
        result = json.loads(path.read_text()) if path.exists() else {"experiments": {}}
        result["experiments"][which] = found
        write_json(path, result, indent=2)
        with written_beside(path.with_suffix(".md")) as beside:
            beside.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
