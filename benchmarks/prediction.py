"""The halo predictor against nnU-Net's predictor, MONAI's sliding window and one pass over the whole image.

    python benchmarks/prediction.py --out FOLDER [--ndim 2|3] [--norm batch_renorm|instance_norm] [--sizes 2 4 6]
    python benchmarks/prediction.py --out FOLDER --single stages --shape 512 512 256 --max-memory 6G --scratch FOLDER

All get the same network (not trained, with running statistics), the same image (smooth, and not alike everywhere) and
the same mirroring. Every run is a process of its own. Rounds go through all sizes and contenders in turn, so that a machine
that changes its speed changes all; ratios are taken within a round. With instance_norm the whole pass and ``stages`` use the
statistics of the image, ``tiles``, nnU-Net and MONAI with those of the tile. ``--single`` runs one contender only.

FOLDER/NAME.json is written after every run, and FOLDER/NAME.md, which says whether the package's bars were met. FOLDER also
holds images and logits (4 bytes x classes x voxels) while the benchmark runs. MONAI must be installed (pip install monai).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from prediction_contenders import CONTENDERS
from prediction_report import markdown
from reporting import command, machine, parser_of, versions
from torch import Tensor, nn
from torch.nn import functional

from nnunet_norm.commands.sizes import parse_size
from nnunet_norm.layers import convert_norm
from nnunet_norm.writing import write_json, written_beside

DEFAULT_PATCH = {2: 512, 3: 64}
"""In 3d less than the usual 128: with 4 of those on every axis the whole pass takes more than 100 GB."""

SETTLING = 3
"""Training forwards that move the running statistics, each by 0.1 of the way. With statistics that are settled wholly an
untrained network makes as much of far context as of near, which trained ones do not."""

WAVES = ((96, 1.0), (24, 0.6), (6, 0.3), (1, 0.1))
"""The image is a sum of noise of these wavelengths (voxels) and strengths."""


def plans(args: argparse.Namespace) -> dict[str, Any]:
    """A plain U-Net as nnU-Net's planner makes them, but for stages, width and patch."""
    ndim, stages = args.ndim, args.stages
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(args.width * 2**i, 320 if ndim == 3 else 512) for i in range(stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
            "kernel_sizes": [[3] * ndim] * stages,
            "strides": [[1] * ndim] + [[2] * ndim] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {"patch_size": args.patch, "batch_size": 2, "architecture": architecture}
    return {
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"benchmark": configuration},
    }


def network(args: argparse.Namespace) -> nn.Module:
    """nnU-Net's initial weights, and running statistics after a few training forwards."""
    made = plans(args)["configurations"]["benchmark"]["architecture"]
    torch.manual_seed(args.seed)
    net = get_network_from_plans(
        *(made["network_class_name"], made["arch_kwargs"], made["_kw_requires_import"], 1, args.classes),
        deep_supervision=False,
    )
    if args.norm != "instance_norm":
        convert_norm(net, "batch_norm", momentum=0.1)
        with torch.no_grad():
            for seed in range(SETTLING):
                net.train()(torch.stack([smooth_image(args.patch, args.seed + 2 * seed + i) for i in (1, 2)]))
    return convert_norm(net, args.norm).eval()


def smooth_image(shape: list[int], seed: int) -> Tensor:
    """(1, *shape): noise of several wavelengths, its contrast growing along the last axis, its mean along the first."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 1, *shape)
    for wavelength, strength in WAVES:
        coarse = torch.randn(1, 1, *(max(2, -(-n // wavelength)) for n in shape), generator=generator)
        mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
        total += strength * functional.interpolate(coarse, size=shape, mode=mode, align_corners=True)
    total *= torch.linspace(0.3, 2, shape[-1])
    return (total + torch.linspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)))[0]


@dataclass
class Benchmark:
    """All runs, and what they need on disk."""

    args: argparse.Namespace
    work: Path
    shapes: list[list[int]]
    started: float = field(default_factory=time.monotonic)
    runs: list[dict[str, Any]] = field(default_factory=list)
    references: dict[int, str] = field(default_factory=dict)

    def go(self) -> None:
        """Round by round, the contenders of each in another order; the first round begins with the reference."""
        torch.save(network(self.args), self.work / "network.pt")
        for number, shape in enumerate(self.shapes):
            image = smooth_image(shape, self.args.seed)
            np.save(self.work / f"image_{number}.npy", (image if self.args.ndim == 3 else image[:, None]).numpy())
        for turn in range(self.args.rounds):
            shift = turn % len(self.args.contenders)
            for number in range(len(self.shapes)):
                for name in self.args.contenders[shift:] + self.args.contenders[:shift]:
                    self.one(turn, number, name)
        self.save()

    def one(self, turn: int, number: int, name: str) -> None:
        """Run a contender, unless it could not before or there is no time left."""
        before = [run for run in self.of(name, number) if run["status"] not in ("done", "no time left")]
        if before:
            return
        left = self.seconds_left()
        if self.expected(name, number) > left:
            run = {"status": "no time left"}
        else:
            begin = time.monotonic()
            run = self.start(self.job(turn, number, name), left)
            run["elapsed"] = time.monotonic() - begin
            if run["status"] == "done" and run.pop("is_reference"):
                self.references[number] = name
        self.runs.append({"round": turn, "size": number, "contender": name} | run)
        shown = f"{run['seconds']:.2f} s" if run["status"] == "done" else f"{run['status']} {run.get('why', '')}"
        print(f"round {turn + 1}, {' x '.join(map(str, self.shapes[number]))}, {name}: {shown}", flush=True)
        self.save()

    def of(self, name: str, number: int) -> list[dict[str, Any]]:
        """The runs of a contender on an image."""
        return [run for run in self.runs if run["contender"] == name and run["size"] == number]

    def seconds_left(self) -> float:
        """Of the budget."""
        budget = self.args.budget_minutes
        return math.inf if budget is None else budget * 60 - (time.monotonic() - self.started)

    def expected(self, name: str, number: int) -> float:
        """Seconds that a run will take, from those before it."""
        voxels = math.prod(self.shapes[number])
        guesses = [
            run["elapsed"] + run["seconds"] * (voxels / math.prod(self.shapes[run["size"]]) - 1)
            for run in self.runs
            if run["contender"] == name and run["size"] <= number and run["status"] == "done"
        ]
        return guesses[-1] if guesses else 0.0

    def job(self, turn: int, number: int, name: str) -> dict[str, Any]:
        """What a run is told. The reference is one pass, or, if that was tried and is not there, the stages."""
        args, shape = self.args, self.shapes[number]
        tried = "whole" not in args.contenders or self.of("whole", number)
        exact = name == "whole" or (name == "stages" and tried)
        keys = ("ndim", "stages", "patch", "norm", "mirror", "classes", "device", "threads", "tile_size", "halo")
        return {key: getattr(args, key) for key in keys} | {
            "contender": name,
            "shape": shape if args.ndim == 3 else [1, *shape],
            "plans": plans(args),
            "network": str(self.work / "network.pt"),
            "image": str(self.work / f"image_{number}.npy"),
            "reference": str(self.work / f"reference_{number}.npy"),
            "is_reference": exact and number not in self.references and len(args.contenders) > 1,
            "compare": turn == 0,
            "scratch": str(args.scratch.resolve()) if args.scratch else None,
            "max_memory": args.max_memory,
            "result": str(self.work / "result.json"),
        }

    def start(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        """Run a job in a process of its own."""
        result, log = Path(job["result"]), self.work / "log.txt"
        result.unlink(missing_ok=True)
        (self.work / "job.json").write_text(json.dumps(job))
        threads = str(self.args.threads)
        numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "nnUNet_def_n_proc"), threads)
        environment = {key: value for key, value in os.environ.items() if key != "nnUNet_compile"} | numbers
        program = Path(__file__).with_name("prediction_run.py")
        line = [sys.executable, str(program), str(self.work / "job.json")]
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    line,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=None if limit == math.inf else max(limit, 1),
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"status": "no time left", "why": "stopped when the budget was used up"}
        if not result.exists():
            return {"status": "killed", "why": f"exit status {done.returncode}; -9 is mostly for want of memory"}
        found = json.loads(result.read_text())
        if found["status"] in ("failed", "out of memory"):
            sys.stderr.write(log.read_text()[-4000:])
        return found | {"is_reference": job["is_reference"]}

    def save(self) -> None:
        """Write what there is so far; no name of a folder stands in it."""
        args = self.args
        hidden = ("out", "scratch", "contenders", "sizes", "shape", "single")
        content = {
            "machine": machine(args.device),
            "versions": versions(),
            "command": command("prediction.py", sys.argv[1:], ("--out", "--scratch")),
            "settings": {key: value for key, value in vars(args).items() if key not in hidden}
            | {"scratch": "on disk" if args.scratch else "in memory"},
            "sizes": [
                {
                    "shape": shape,
                    "patches": None if args.shape else args.sizes[number],
                    "reference": self.references.get(number),
                }
                for number, shape in enumerate(self.shapes)
            ],
            "runs": self.runs,
        }
        text = json.dumps(content)
        for path in (self.work, args.scratch and args.scratch.resolve(), args.out):
            text = text.replace(str(path), "FOLDER") if path else text
        content = json.loads(text)
        name = f"prediction_{args.ndim}d_{args.norm}" + (f"_{args.single}" if args.single else "")
        write_json(args.out / f"{name}.json", content, indent=2)
        with written_beside(args.out / f"{name}.md") as beside:
            beside.write_text(markdown(content), encoding="utf-8")


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=3)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--norm", choices=("batch_renorm", "instance_norm"), default="batch_renorm")
    parser.add_argument("--patch", type=int, nargs="+", help="default: 512 in 2d, 64 in 3d, on every axis")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 6], help="patches on every axis")
    parser.add_argument("--shape", type=int, nargs="+", help="one image of this shape, in place of --sizes")
    parser.add_argument("--mirror", action="store_true", help="average over the passes mirrored along all axes")
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=CONTENDERS)
    parser.add_argument("--single", choices=CONTENDERS, help="this contender only, and one round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tile-size", type=int, nargs="+", help="for tiles; default: the predictor's own")
    parser.add_argument("--halo", default="auto", help="for tiles")
    parser.add_argument(
        "--max-memory", type=parse_size, help="for stages and tiles, as 6G; default: the predictor's own"
    )
    parser.add_argument("--scratch", type=Path, help="a folder; default: in memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-minutes", type=float, help="start nothing that would take longer, and stop what does")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.contenders = [args.single] if args.single else [name for name in CONTENDERS if name in args.contenders]
    args.rounds = args.rounds or (1 if args.single else 3)
    args.patch = args.patch or [DEFAULT_PATCH[args.ndim]]
    args.patch = args.patch * args.ndim if len(args.patch) == 1 else args.patch
    args.halo = int(args.halo) if args.halo.isdecimal() else args.halo
    if {len(args.patch), len(args.shape or args.patch)} != {args.ndim}:
        parser.error(f"--patch and --shape need {args.ndim} numbers with --ndim {args.ndim}")
    if any(n % 2 ** (args.stages - 1) for n in args.patch) or max(args.patch) < 2**args.stages:
        parser.error(f"--patch must be a multiple of {2 ** (args.stages - 1)}, and larger on one axis")
    return args


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    shapes = [args.shape] if args.shape else [[n * size for n in args.patch] for size in args.sizes]
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".prediction_") as work:
        Benchmark(args, Path(work), shapes).go()


if __name__ == "__main__":
    main()
