"""What BatchRenorm costs: forward and backward of each norm, on the feature maps of a stock 3d_fullres network.

    python benchmarks/layers.py [--device cuda] [--what layers blocks] [--mode eager compiled]
                                [--precision fp32 autocast] [--rounds 10] [--patch 32 64 64] [--out FOLDER]

``layers``: the norm alone, summed over all norms of the network. ``blocks``: convolution, norm and LeakyReLU, as the network
has them. (Whole training steps: ``training.py``.) Input shapes are those of the 3d_fullres configuration of
``tests/stock_plans/nnUNetPlans.json``, or of a smaller ``--patch``; maps that several norms are given are measured once and
counted as often.

All contenders run in one process on the same inputs, in another order for each map and round, so that a machine that
changes its speed changes all; ratios are taken within a round. Results are added to FOLDER/layers_DEVICE.json and .md: an
experiment that is run again replaces the one of the same name.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from layers_contenders import (
    CONFIGURATION,
    CONTENDERS,
    FeatureMap,
    compiled,
    contender,
    feature_maps,
    largest_error,
    stock_plans,
)
from layers_measure import MEASURED_AS, Pass, half, repeats_of, seconds
from layers_report import markdown
from reporting import command, machine, parser_of, versions

from nnunet_norm.writing import write_json, written_beside

SMALL_PATCH = [32, 64, 64]
"""For blocks on the CPU, whose convolutions take minutes with the plans' own patch."""


def measure(actions: dict[str, list[Any]], counts: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Bytes, then seconds round by round, of what every contender does on every map.

    Args:
        actions: per contender and map something with ``both()`` and ``memory()``, warmed up.
        counts: how many norms of the network are given each map.
        args: of the command line.
    """
    memory = {name: [action.memory() for action in row] for name, row in actions.items()}
    first = next(iter(actions.values()))
    repeats = [repeats_of(action.both, args.device) for action in first]
    taken: dict[str, list[list[float]]] = {name: [] for name in actions}
    names, start = list(actions), time.perf_counter()
    for turn in range(args.rounds):
        for name in names:
            taken[name].append([0.0] * len(counts))
        for number in range(len(counts)):
            shift = (turn + number) % len(names)
            for name in names[shift:] + names[:shift]:
                taken[name][-1][number] = seconds(actions[name][number].both, repeats[number], args.device)
        if turn == 0:
            left = (time.perf_counter() - start) * (args.rounds - 1)
            print(f"  the other {args.rounds - 1} rounds will take about {left:.0f} s", flush=True)
    keys = next(iter(memory.values()))[0]
    rows = {
        name: {"seconds": taken[name]} | {key: [found[key] for found in memory[name]] for key in keys} for name in names
    }
    return {"repeats": repeats, "contenders": rows}


def layers_or_blocks(what: str, mode: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every norm of the network, alone or in its block."""
    patch = args.patch or (SMALL_PATCH if what == "blocks" and args.device == "cpu" else None)
    plans = stock_plans(patch, args.batch)
    maps = dict(itertools.islice(feature_maps(plans, what == "blocks").items(), args.layers))
    smallest = min(maps, key=lambda of: torch.Size(of.shape).numel())
    errors = {name: largest_error(name, smallest, mode) for name in args.contenders}
    actions: dict[str, list[Any]] = {name: [] for name in args.contenders}
    for number, of in enumerate(maps):
        print(f"  {' x '.join(map(str, of.shape))}: warming up", flush=True)
        x, grad = tensors_for(of, precision, args.device)
        for name in actions:
            module = contender(name, of).to(args.device).train()
            run = compiled(module, f"{name}_{number}") if mode == "compiled" else module
            actions[name].append(Pass(run, module, x, grad, args.device, precision))
    about = {
        "patch": plans["configurations"][CONFIGURATION]["patch_size"],
        "batch": plans["configurations"][CONFIGURATION]["batch_size"],
        "maps": [{"shape": of.shape, "source": of.source, "count": count} for of, count in maps.items()],
        "errors": errors,
    }
    return about | measure(actions, list(maps.values()), args)


def tensors_for(of: FeatureMap, precision: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The input, of the type in which autocast hands it on, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    dtype = half(device) if precision == "autocast" else torch.float32
    x = torch.randn(of.source or of.shape, generator=generator).mul_(1.3).add_(0.2)
    grad = torch.randn(of.shape, generator=generator)
    return x.to(device, dtype).requires_grad_(), grad.to(device)


def experiments(args: argparse.Namespace) -> dict[str, tuple[str, str, str]]:
    """What is to be run, by name."""
    every = itertools.product(args.what, args.mode, args.precision)
    return {", ".join(one): one for one in every}


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--what", nargs="+", choices=["layers", "blocks"], default=["layers"])
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "autocast"], default=["fp32"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layers", type=int, metavar="N", help="only the N largest of the different feature maps")
    parser.add_argument("--patch", type=int, nargs=3, help="instead of the plans'; CPU blocks: 32 64 64")
    parser.add_argument("--batch", type=int, help="instead of the plans'")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", default="", help="what else is to be said, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if "batch_norm" not in args.contenders:
        parser.error("--contenders: batch_norm is what the others are compared with")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    path = args.out / f"layers_{args.device}.json"
    for name, (what, mode, precision) in experiments(args).items():
        print(name, flush=True)
        start, load = time.perf_counter(), os.getloadavg()[0]
        found = layers_or_blocks(what, mode, precision, args)
        about = {
            "what": what,
            "mode": mode,
            "precision": precision,
            "command": command("layers.py", sys.argv[1:], ("--out",)),
            "machine": machine(args.device),
            "versions": versions(),
            "threads": args.threads,
            "rounds": args.rounds,
            "load": max(load, os.getloadavg()[0]),
            "note": args.note,
        }
        result = json.loads(path.read_text()) if path.exists() else {"device": args.device, "experiments": {}}
        result["memory_measured_as"] = MEASURED_AS[args.device]
        result["experiments"][name] = about | found
        write_json(path, result, indent=2)
        with written_beside(path.with_suffix(".md")) as beside:
            beside.write_text(markdown(result), encoding="utf-8")
        print(f"  done in {time.perf_counter() - start:.0f} s; {path}", flush=True)


if __name__ == "__main__":
    main()
