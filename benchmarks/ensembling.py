"""Averaging probabilities: peak memory and seconds of nnunet-norm ensemble -i beside nnUNetv2_ensemble.

    python benchmarks/ensembling.py --out FOLDER [--sizes 128 256] [--classes 16] [--members 2]

Every run is the real program with one process (-np 1), in processes of its own, on the same folders of one case each; memory
is the anonymous and shared memory of all of them together, sampled twenty times a second. Probabilities are a softmax of
smooth noise, so that they compress about as those of networks do. Afterwards the segmentations are compared, byte for byte.

FOLDER/ensembling.json and .md are written after every run. FOLDER also holds the probabilities while the benchmark runs.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from file_to_file import measured, write_model
from prediction import smooth_image
from reporting import amount, command, machine, parser_of, table, versions

from nnunet_norm.writing import write_json, written_beside

PROGRAMS = ("nnU-Net", "nnunet-norm")


def write_member(folder: Path, model: Path, *, classes: int, size: int, seed: int) -> Path:
    """A folder of predictions with one case, as nnU-Net's predictor leaves it, but for the segmentation."""
    folder.mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(model / name, folder / name)
    shape = (size,) * 3
    probabilities = np.empty((classes, *shape), np.float32)
    for number in range(classes):
        probabilities[number] = np.exp(3 * smooth_image(list(shape), classes * seed + number)[0].numpy())
    probabilities /= probabilities.sum(0)
    np.savez_compressed(folder / "case.npz", probabilities=probabilities)
    stuff = {"spacing": (1.0, 1.0, 1.0), "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).ravel())}
    save_pickle({"sitk_stuff": stuff, "spacing": [1.0, 1.0, 1.0]}, str(folder / "case.pkl"))
    return folder


class Benchmark:
    """All runs, written after each."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.runs: list[dict[str, Any]] = []

    def go(self) -> None:
        """Every size and number of classes, with both programs."""
        for classes in self.args.classes:
            model = write_model(self.work / f"model_{classes}", classes=classes, width=8, stages=3, spacing=1.0)
            for size in self.args.sizes:
                place = self.work / f"{classes}_{size}"
                members = [
                    write_member(place / f"member_{seed}", model, classes=classes, size=size, seed=seed)
                    for seed in range(self.args.members)
                ]
                for name in PROGRAMS:
                    run = measured(self.line(name, members, place / name), place / name)
                    same = None
                    if name != "nnU-Net":
                        files = [place / program / "case.nii.gz" for program in PROGRAMS]
                        same = all(file.is_file() for file in files) and len({file.read_bytes() for file in files}) == 1
                    stored = sum((member / "case.npz").stat().st_size for member in members)
                    what = {"name": name, "classes": classes, "size": size, "members": len(members), "stored": stored}
                    self.keep(what | run | {"same": same})
                shutil.rmtree(place)

    def line(self, name: str, members: list[Path], output: Path) -> list[str]:
        """The command line of a program."""
        programs = {"nnU-Net": ["nnUNetv2_ensemble"], "nnunet-norm": ["nnunet-norm", "ensemble"]}
        program, *verb = programs[name]
        folders = ["-i", *map(str, members), "-o", str(output)]
        return [str(Path(sys.executable).with_name(program)), *verb, *folders, "-np", "1"]

    def keep(self, run: dict[str, Any]) -> None:
        """Write what there is so far."""
        self.runs.append(run)
        print({key: value for key, value in run.items() if key != "why"}, flush=True)
        content = {
            "command": command("ensembling.py", sys.argv[1:], ("--out",)),
            "machine": machine("cpu"),
            "versions": versions(),
            "runs": self.runs,
        }
        write_json(
            self.args.out / "ensembling.json",
            json.loads(json.dumps(content).replace(str(self.work), "FOLDER")),
            indent=2,
        )
        with written_beside(self.args.out / "ensembling.md") as beside:
            beside.write_text(report(content), encoding="utf-8")


def report(content: dict[str, Any]) -> str:
    """The table."""
    found = content["machine"]
    rows = [["classes", "image", "members", "one member's array", "program", "seconds", "memory", "same labels"]]
    for run in content["runs"]:
        failed = "" if run["status"] == 0 else f" (ended with status {run['status']})"
        rows.append(
            [
                str(run["classes"]),
                f"{run['size']} cubed",
                str(run["members"]),
                amount(4 * run["classes"] * run["size"] ** 3),
                run["name"],
                f"{run['seconds']:.0f}{failed}",
                amount(run["memory"]),
                {None: "", True: "yes", False: "NO"}[run["same"]],
            ]
        )
    return (
        f"# Averaging probabilities\n\n`{content['command']}` on {found['cores']} cores of {found['cpu']}, "
        f"{amount(found['memory'])}.\n\nMemory is the most that all processes of the program had at a time, anonymous and "
        f"shared; files that are mapped are not in it.\n\n{table(rows)}\n"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--classes", type=int, nargs="+", default=[16])
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".ensembling_") as work:
        Benchmark(args, Path(work)).go()


if __name__ == "__main__":
    main()
