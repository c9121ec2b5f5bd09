"""Prediction with norms folded into the convolutions before them against prediction without: seconds, and the difference.

    python benchmarks/folding.py --out FOLDER [--ndim 2|3] [--shape N ...] [--device cpu|cuda]

Both get the same network (not trained, with running statistics) and the same image, as in ``benchmarks/prediction.py``, and
are run in one process in turn, in another order in every round; ratios are taken within a round. FOLDER/NAME.json has every
figure, FOLDER/NAME.md the table.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from prediction import DEFAULT_PATCH, network, plans, smooth_image
from prediction_contenders import Contender, make_contender
from prediction_run import compare
from reporting import command, machine, parser_of, spread, table, versions
from torch import Tensor, nn

from nnunet_norm.layers import find_norms
from nnunet_norm.stages.folding import fold_norms
from nnunet_norm.writing import write_json, written_beside

WAYS = ("stages", "tiles")

NOTES = """\
- Seconds: median (least to most) over the rounds, from the preprocessed image to the logits on the CPU, after one prediction
  that is not counted. Times as fast: the same of the ratios within each round.
- Difference: of any logit, folded against not folded, beside the largest logit; labels: the share of voxels whose label is
  another one. The network is not trained: a trained one has fewer voxels between two labels.
"""


def job(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """What ``prediction_contenders`` is told."""
    keys = ("ndim", "stages", "patch", "norm", "mirror", "classes", "device", "tile_size", "halo")
    return {key: getattr(args, key) for key in keys} | {
        "contender": way,
        "shape": args.shape if args.ndim == 3 else [1, *args.shape],
        "plans": plans(args),
        "scratch": None,
        "max_memory": None,
    }


def timed(made: Contender, image: Tensor) -> tuple[Tensor, float]:
    """The logits, which lie on the CPU, and seconds."""
    start = time.perf_counter()
    logits = made.predict(image)
    return logits, time.perf_counter() - start


def measure(args: argparse.Namespace, way: str, nets: dict[str, nn.Module], image: Tensor) -> dict[str, Any]:
    """Every round of one plan of execution, and the difference."""
    made = {name: make_contender(net, job(args, way)) for name, net in nets.items()}
    logits = {name: contender.predict(image) for name, contender in made.items()}
    difference = compare(logits["folded"], logits["plain"].float().numpy())
    del logits
    rounds = []
    for turn in range(args.rounds):
        names = list(made) if turn % 2 else list(made)[::-1]
        rounds.append({name: timed(made[name], image)[1] for name in names})
        print(f"{way}, round {turn + 1}: {rounds[-1]}", flush=True)
    return {"way": way, "rounds": rounds, "plan": made["plain"].plan()} | difference


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    settings, rows = result["settings"], []
    for run in result["runs"]:
        seconds = {name: [turn[name] for turn in run["rounds"]] for name in ("plain", "folded")}
        ratios = [turn["plain"] / turn["folded"] for turn in run["rounds"]]
        rows.append(
            [
                run["way"],
                *(spread(seconds[name]) for name in ("plain", "folded")),
                spread(ratios, "x"),
                f"{run['max_difference']:.2e} ({run['max_logit']:.3g})",
                f"{run['labels_differ']:.2e}",
            ]
        )
    by = " x ".join(map(str, settings["shape"]))
    head = ["", "seconds, not folded", "folded", "times as fast", "largest difference (logit)", "labels that differ"]
    parts = [
        f"# Norms folded into convolutions, {settings['ndim']}d",
        f"`{result['command']}`",
        "\n".join(f"- {key}: {json.dumps(value)}" for key, value in (result["machine"] | result["versions"]).items()),
        f"A plain U-Net of {settings['stages']} stages, {settings['width']} channels wide at the first, "
        f"{settings['classes']} classes, {result['folded']} of {result['norms']} norms folded; image {by}, "
        f"{settings['threads']} threads, {settings['device']}, mirroring {'on' if settings['mirror'] else 'off'}, "
        f"{settings['rounds']} rounds.",
        table([head, *rows]),
        NOTES,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=3)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--patch", type=int, nargs="+", help="default: 512 in 2d, 64 in 3d, on every axis")
    parser.add_argument("--shape", type=int, nargs="+", help="of the image; default: two patches on every axis")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mirror", action="store_true", help="average over the passes mirrored along all axes")
    parser.add_argument("--tile-size", type=int, nargs="+", help="for tiles; default: the predictor's own")
    parser.add_argument("--halo", default="auto", help="for tiles")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.norm = "batch_renorm"
    args.patch = args.patch or [DEFAULT_PATCH[args.ndim]]
    args.patch = args.patch * args.ndim if len(args.patch) == 1 else args.patch
    args.shape = args.shape or [2 * n for n in args.patch]
    args.halo = int(args.halo) if args.halo.isdecimal() else args.halo
    if {len(args.patch), len(args.shape)} != {args.ndim}:
        parser.error(f"--patch and --shape need {args.ndim} numbers with --ndim {args.ndim}")
    return args


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.device == "cuda"  # nnU-Net's predictor sets it for itself
    args.out.mkdir(parents=True, exist_ok=True)
    plain = network(args).to(args.device)
    nets = {"plain": plain, "folded": copy.deepcopy(plain)}
    folded = len(fold_norms(nets["folded"]))
    image = smooth_image(args.shape, args.seed)
    image = image if args.ndim == 3 else image[:, None]
    hidden = ("out", "ways")
    result = {
        "machine": machine(args.device),
        "versions": versions(),
        "command": command("folding.py", sys.argv[1:], ("--out",)),
        "settings": {key: value for key, value in vars(args).items() if key not in hidden},
        "norms": len(find_norms(plain)),
        "folded": folded,
        "runs": [measure(args, way, nets, image) for way in args.ways],
    }
    name = f"folding_{args.ndim}d" + ("_cuda" if args.device == "cuda" else "")
    write_json(args.out / f"{name}.json", result, indent=2)
    with written_beside(args.out / f"{name}.md") as beside:
        beside.write_text(markdown(result), encoding="utf-8")
    for run in result["runs"]:
        ratio = median(turn["plain"] / turn["folded"] for turn in run["rounds"])
        print(f"{run['way']}: {ratio:.3f} times as fast; largest difference {run['max_difference']:.2e}")


if __name__ == "__main__":
    main()
