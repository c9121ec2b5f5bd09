"""Seconds and memory of nnU-Net's training steps: per norm, in micro-batches, in processes, and with the disparity hook.

    python benchmarks/training.py [--what norms micro processes disparity] [--device cuda] [--mode eager compiled]
                                  [--patch 32 64 64] [--features 16] [--rounds 4] [--out FOLDER]

All are ``train_step`` of real trainers after ``initialize``: the plans' network, nnU-Net's loss with deep supervision,
clipping and SGD, in the precision in which nnU-Net trains on that device; it compiles on CUDA only. Loading and augmentation
are no part of it: images and labels are drawn.

``norms``: every norm of this package, and nnU-Net's own trainer. ``micro``: a larger batch whole and in micro-batches, each
with and without activation checkpointing. ``processes``: the larger batch in one process and shared by ``--processes``, which
torchrun starts. ``disparity``: what measuring train/eval disparity takes of an epoch.

The plans are those of ``tests/stock_plans/nnUNetPlans.json``, 3d_fullres, smaller on the CPU. Contenders run in one process
(or group of processes) and take turns, in another order in each round, so that a machine that changes its speed changes all;
ratios are taken within a round. Results are added to FOLDER/training_DEVICE.json, .md and .png: an experiment that is run
again replaces the one of the same name.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layers_contenders import CONFIGURATION
from layers_measure import MEASURED_AS
from reporting import command, machine, parser_of, versions
from training_processes import in_processes
from training_report import draw, markdown
from training_step import NORMS, Contender, Step, given, in_turn, small_plans, trainers

from nnunet_norm.writing import write_json, written_beside

SMALL_PATCH, SMALL_FEATURES = [32, 64, 64], 16
"""On the CPU: a step with the plans' own patch and features takes a minute. For fewer features torch runs other kernels."""

SMALLEST_PATCH, FEWEST_FEATURES = [16, 64, 64], 4
"""For gradients in double precision, whose convolutions are slow."""

LARGE_BATCH = {"cpu": 4, "cuda": 8}

WARM_UP = 1

IN_MICRO_BATCHES = ("instance_norm", "batch_renorm")
"""A norm whose gradients are those of the whole batch however it is divided, and one whose are not."""

WITH_DISPARITY = ("instance_norm", "batch_norm", "batch_renorm", "group_norm", "frozen_after")

ALWAYS = 10**9
"""Batches: more than there will be."""


def measured_plans(batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """The plans of the experiments, with a batch."""
    return small_plans(args.patch, batch, args.features)


def norms(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """A training step with each norm."""
    contenders = {name: NORMS[name] for name in args.norms}
    with trainers(contenders, mode, measured_plans(args.batch, args), args.classes, args.torch_device) as made:
        steps = {name: Step(trainer, args.classes) for name, trainer in made.items()}
        for _, step in itertools.product(range(WARM_UP), steps.values()):
            step.train()
        peaks = {name: step.peak() for name, step in steps.items()}
        taken = in_turn({name: step.train for name, step in steps.items()}, args.rounds, args.device)
    rows = {name: {"title": one.title, "seconds": taken[name], "peak": peaks[name]} for name, one in contenders.items()}
    return {"batch": args.batch, "contenders": rows}


def divided(norm: str, batch: int, compiled: bool) -> dict[str, Contender]:
    """Contenders with a norm: the batch in micro-batches of several sizes, checkpointed and not."""
    found = {}
    for size, again in itertools.product(dict.fromkeys(max(batch // d, 1) for d in (1, 2, 4, batch)), (False, True)):
        block = {"micro_batch_size": size, "activation_checkpointing": again}
        title = "whole" if size == batch else f"micro-batches of {size}"
        if again:
            title += ", activation checkpointing" + (", eager" if compiled else "")
        found[f"{size}{' again' if again else ''}"] = replace(NORMS[norm], title=title, settings=partial(given, block))
    return found


def micro(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """A large batch, whole and in parts."""
    plans, batch = measured_plans(args.large_batch, args), args.large_batch
    found = {}
    for norm in IN_MICRO_BATCHES:
        print(f"  {NORMS[norm].title}", flush=True)
        contenders = divided(norm, batch, mode == "compiled")
        differences = gradient_differences(contenders, args)
        with trainers(contenders, mode, plans, args.classes, args.torch_device) as made:
            steps = {name: Step(trainer, args.classes) for name, trainer in made.items()}
            for _, step in itertools.product(range(WARM_UP), steps.values()):
                step.train()
            peaks = {name: step.peak() for name, step in steps.items()}
            taken = in_turn({name: step.train for name, step in steps.items()}, args.rounds, args.device)
        rows = {
            name: {
                "title": one.title,
                **one.settings(batch),
                "seconds": taken[name],
                "peak": peaks[name],
                "gradient_difference": differences[name],
            }
            for name, one in contenders.items()
        }
        found[norm] = {"title": NORMS[norm].title, "whole": str(batch), "contenders": rows}
    return {"batch": batch, "norms": found}


def gradient_differences(contenders: Mapping[str, Contender], args: argparse.Namespace) -> dict[str, float]:
    """The largest difference of gradients to those of the whole batch, over the largest gradient.

    From equal weights, in double precision, of a small network on the CPU, whatever the steps are measured on.
    """
    plans = small_plans(SMALLEST_PATCH, args.large_batch, FEWEST_FEATURES)
    with trainers(contenders, "eager", plans, args.classes, torch.device("cpu")) as made:
        found = {name: Step(trainer, args.classes).gradients() for name, trainer in made.items()}
    expected = found[str(args.large_batch)]
    largest = max(gradient.abs().max() for gradient in expected)
    return {
        name: float(max((a - b).abs().max() for a, b in zip(own, expected, strict=True)) / largest)
        for name, own in found.items()
    }


def processes(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same batch in one process and in several."""
    plans = measured_plans(args.large_batch, args)
    return {"batch": args.large_batch} | in_processes(plans, mode, args)


def disparity(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Training steps, and validation steps with and without the measurement."""
    contenders = {name: NORMS[name] for name in WITH_DISPARITY}
    with trainers(contenders, mode, measured_plans(args.batch, args), args.classes, args.torch_device) as made:
        lengths = {
            name: {
                "title": contenders[name].title,
                "batches": trainer.disparity_batches,
                "iterations": trainer.num_iterations_per_epoch,
                "val_iterations": trainer.num_val_iterations_per_epoch,
            }
            for name, trainer in made.items()
        }
        actions: dict[str, Callable[[], None]] = {}
        for name, trainer in made.items():
            step = Step(trainer, args.classes)
            actions[f"{name} train"] = training(step)
            actions[f"{name} without"] = validation(step, 0)
            actions[f"{name} with"] = validation(step, ALWAYS)
        for action in actions.values():
            action()
        taken = in_turn(actions, args.rounds, args.device)
    rows = {
        name: length | {key: taken[f"{name} {key}"] for key in ("train", "without", "with")}
        for name, length in lengths.items()
    }
    return {"batch": args.batch, "contenders": rows}


def training(step: Step) -> Callable[[], None]:
    """A training step."""

    def run() -> None:
        step.trainer.network.train()
        step.train()

    return run


def validation(step: Step, batches: int) -> Callable[[], None]:
    """A validation step of an epoch that measures disparity on ``batches``."""

    def run() -> None:
        step.trainer.network.eval()
        step.trainer.disparity_batches = batches
        step.validate()

    return run


EXPERIMENTS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "norms": norms,
    "micro": micro,
    "processes": processes,
    "disparity": disparity,
}


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--what", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS), help="of --what norms")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--patch", type=int, nargs=3, help="default: the plans'; CPU: 32 64 64")
    parser.add_argument("--features", type=int, help="of the first stage; default: the plans'; CPU: 16")
    parser.add_argument("--batch", type=int, default=2, help="of norms and disparity; default: the plans' 2")
    parser.add_argument("--large-batch", type=int, help="of micro and processes; default: 4; CUDA: 8")
    parser.add_argument("--classes", type=int, default=14, help="labels, background included")
    parser.add_argument("--processes", type=int, default=2, help="that share a batch; on CUDA each has a GPU")
    parser.add_argument("--starts", type=int, default=2, help="times that they are started, in turn with one process")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of all but --what processes: one each there"
    )
    parser.add_argument("--note", default="", help="what else is to be said, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for name in ("stock", "instance_norm"):
        if name not in args.norms:
            parser.error(f"--norms: {name} is what others are compared with")
    args.large_batch = args.large_batch or LARGE_BATCH[args.device]
    if args.device == "cpu":
        args.patch, args.features = args.patch or SMALL_PATCH, args.features or SMALL_FEATURES
    args.torch_device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    return args


def save(path: Path, result: dict[str, Any]) -> None:
    """JSON, report, and the picture if there is anything to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result, indent=2)
    draw(result, path.with_suffix(".png"))
    with written_beside(path.with_suffix(".md")) as beside:
        beside.write_text(markdown(result), encoding="utf-8")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    path = args.out / f"training_{args.device}.json"
    for what, mode in itertools.product(args.what, args.mode):
        if mode == "compiled" and args.device == "cpu":
            print(f"{what}, compiled: nnU-Net does not compile on the CPU", flush=True)
            continue
        print(f"{what}, {mode}", flush=True)
        start, load = time.perf_counter(), os.getloadavg()[0]
        found = EXPERIMENTS[what](mode, args)
        configuration = measured_plans(found["batch"], args)["configurations"][CONFIGURATION]
        about = {
            "what": what,
            "mode": mode,
            "command": command("training.py", sys.argv[1:], ("--out",)),
            "machine": machine(args.device),
            "versions": versions(),
            "threads": args.threads,
            "rounds": args.rounds,
            "patch": configuration["patch_size"],
            "features": configuration["architecture"]["arch_kwargs"]["features_per_stage"],
            "load": max(load, os.getloadavg()[0]),
            "note": args.note,
            "took": time.perf_counter() - start,
        }
        result = json.loads(path.read_text()) if path.exists() else {"device": args.device, "experiments": {}}
        result["memory_measured_as"] = MEASURED_AS[args.device]
        result["experiments"][f"{what}, {mode}"] = about | found
        save(path, result)
        print(f"  done in {about['took']:.0f} s; {path}", flush=True)


if __name__ == "__main__":
    main()
