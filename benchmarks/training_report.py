"""What ``training.py`` says about its runs: tables, whether the package's bars were met, and a picture."""

import json
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from reporting import amount, spread, table

from nnunet_norm.training.disparity import SHARE_OF_EPOCH
from nnunet_norm.writing import written_beside

STEP = 1.05
"""Bar, at most: seconds of a step with BatchRenorm over one with InstanceNorm."""

KEPT, AGAIN = "#0072b2", "#e69f00"
"""Colours that differ for everybody (Okabe and Ito)."""

GIB = 2**30

NOTES = """\
- Medians, and in brackets the least and the most over the rounds; ratios are taken within a round.
- Peak: the most bytes during a step above parameters, momentum and batch; gradients are part of it.
- Norms: PreciseBN and BEN train with BatchNorm's step. FrozenBN's first line is its training before statistics are frozen.
- Micro-batches: each is run twice, without gradient for the loss of the whole batch and then with gradient; activation
  checkpointing runs each segment once more. Logits, and what the loss takes for the whole batch, are in memory however it is
  divided. On the CPU torch has a slower kernel for convolutions of one sample whose channels x depth x height are at most
  20480: micro-batches of 1 take longer there than their arithmetic.
- Gradient difference: the largest of a step from equal weights, over the largest gradient, in double precision, of a network
  of 4 features at the first stage. It is rounding where the norm does not look across samples; BatchRenorm normalizes each
  micro-batch by itself.
- Processes: one thread each. One process alone runs without DistributedDataParallel; together they share the same batch, and
  a step is as long as that of the slowest. Speed-up: seconds alone over seconds together, medians of starts in turn;
  efficiency: that over the number of processes.
- Disparity: share of an epoch of nnU-Net's length that the measurement takes, from the difference between validation steps
  with and without it, on as many batches as are the default.
"""


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def norm_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per norm, beside nnU-Net's own trainer and this package's InstanceNorm."""
    rows = [["", "seconds", "over nnU-Net's", "over InstanceNorm", "peak", "peak over nnU-Net's"]]
    contenders = found["contenders"]
    stock, base = contenders["stock"], contenders["instance_norm"]
    for own in contenders.values():
        times = [spread(own["seconds"]), *(spread(ratios(own["seconds"], b["seconds"]), "x") for b in (stock, base))]
        rows.append([own["title"], *times, amount(own["peak"]), f"{own['peak'] / stock['peak']:.3f}x"])
    return rows


def micro_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per way to run the batch with one norm."""
    rows = [[found["title"], "seconds", "over whole", "peak", "peak over whole", "gradient difference"]]
    whole = found["contenders"][found["whole"]]
    for own in found["contenders"].values():
        times = [spread(own["seconds"]), spread(ratios(own["seconds"], whole["seconds"]), "x")]
        peaks = [amount(own["peak"]), f"{own['peak'] / whole['peak']:.3f}x"]
        rows.append([own["title"], *times, *peaks, "" if own is whole else f"{own['gradient_difference']:.1e}"])
    return rows


def speed_ups(own: dict[str, Any]) -> list[float]:
    """Start by start."""
    return [median(alone) / median(together) for alone, together in zip(own["alone"], own["together"], strict=True)]


def process_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per contender."""
    count, contenders = found["processes"], found["contenders"]
    none = contenders["batch_renorm_none"]
    rows = [["", "seconds, 1 process", f"seconds, {count}", "speed-up", "efficiency, %", f'{count}, over sync="none"']]
    for own in contenders.values():
        times = [spread([s for start in own[key] for s in start]) for key in ("alone", "together")]
        gains = speed_ups(own)
        efficiency = spread([100 * gain / count for gain in gains])
        over = [r for starts in zip(own["together"], none["together"], strict=True) for r in ratios(*starts)]
        rows.append([own["title"], *times, spread(gains, "x"), efficiency, spread(over, "x")])
    return rows


def shares(own: dict[str, Any]) -> list[float]:
    """Of an epoch, in each round: what the measurement takes, over everything else."""
    epochs = [
        own["iterations"] * train + own["val_iterations"] * without
        for train, without in zip(own["train"], own["without"], strict=True)
    ]
    more = [own["batches"] * (a - b) for a, b in zip(own["with"], own["without"], strict=True)]
    return ratios(more, epochs)


def disparity_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row per norm."""
    rows = [
        ["", "training step, s", "validation step, s", "with the measurement, s", "batches", "share of an epoch, %"]
    ]
    for own in found["contenders"].values():
        times = [spread(own[key]) for key in ("train", "without", "with")]
        rows.append([own["title"], *times, str(own["batches"]), spread([100 * share for share in shares(own)])])
    return rows


def bars(result: dict[str, Any]) -> list[list[str]]:
    """Experiment, what, the bar, what was seen, and the verdict."""
    rows = [["experiment", "", "bar", "measured", ""]]
    for title, found in result["experiments"].items():
        contenders = found.get("contenders", {})
        if found["what"] == "norms":
            base = contenders["instance_norm"]
            for name in ("batch_renorm", "batch_renorm_warmup"):
                if name in contenders:
                    own = contenders[name]
                    values = ratios(own["seconds"], base["seconds"])
                    rows.append(judged([title, f"{own['title']}, time over InstanceNorm"], values, STEP, "x"))
        if found["what"] == "disparity":
            for own in contenders.values():
                values = [100 * share for share in shares(own)]
                rows.append(judged([title, f"{own['title']}, % of an epoch"], values, 100 * SHARE_OF_EPOCH))
    return rows


def judged(cells: list[str], values: list[float], bar: float, unit: str = "") -> list[str]:
    """A row with its verdict, which is the median's."""
    return [*cells, f"at most {bar:g}{unit}", spread(values, unit), "met" if median(values) <= bar else "missed"]


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    device, verdicts = {"cpu": "CPU", "cuda": "CUDA"}[result["device"]], bars(result)
    parts = [f"# nnU-Net's training steps, {device}"]
    if len(verdicts) > 1:
        parts += ["## Bars", table(verdicts)]
    for title, found in result["experiments"].items():
        parts += [f"## {title}", f"`{found['command']}`", about(found)]
        if found["what"] == "micro":
            parts += [table(micro_rows(own)) for own in found["norms"].values()]
            parts.append(f"![Memory against seconds](training_{result['device']}.png)")
        else:
            rows = {"norms": norm_rows, "processes": process_rows, "disparity": disparity_rows}
            parts.append(table(rows[found["what"]](found)))
    parts.append(NOTES + f"- Memory is measured by {result['memory_measured_as']}.")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def setting(found: dict[str, Any]) -> str:
    """Network, patch and batch in words."""
    patch, features = (" x ".join(map(str, found["patch"])), ", ".join(map(str, found["features"])))
    return f"stock 3d_fullres network with {features} features per stage, patch {patch}, batch {found['batch']}"


def about(found: dict[str, Any]) -> str:
    """What was run, on what."""
    threads = found["threads"]
    how, rounds = f"{threads} threads", f"{found['rounds']} rounds"
    if found["what"] == "processes":
        how = f"{found['processes']} processes of one thread, {found['backend']}"
        rounds = f"{found['starts']} starts of {rounds}"
    words = f"A {setting(found)}; {how}; {rounds}."
    if found["load"] > threads + 1:
        words += f" Load average up to {found['load']:.1f}: other programs may have run at the same time."
    told = found["machine"] | found["versions"]
    return f"{words} {found['note']}".strip() + "\n\n" + "\n".join(f"- {k}: {json.dumps(v)}" for k, v in told.items())


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory against seconds of micro-batches, a panel per norm and mode; nothing if they were not measured."""
    measured = {title: found for title, found in result["experiments"].items() if found["what"] == "micro"}
    if not measured:
        return
    panels = [(found, norm) for found in measured.values() for norm in found["norms"].values()]
    figure = Figure(figsize=(5 * len(panels), 5.2), dpi=120)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.4 / len(panels) ** 1.5, right=0.98, top=0.93, bottom=0.25, wspace=0.25)
    for axis, (found, norm) in zip(axes, panels, strict=True):
        _panel(axis, norm, f"{norm['title']}, {found['mode']}")
    first = next(iter(measured.values()))
    caption = (
        f"A training step of the {setting(first)}, on {result['device'].upper()}: whole, and in micro-batches of the sizes "
        "at the points, with activations kept for the gradient or computed again. Peak memory above parameters, momentum and "
        "batch; points: medians over rounds, lines: least to most."
    )
    figure.text(0.03, 0.03, textwrap.fill(caption, 75 * len(panels)), fontsize=8.5, va="bottom")
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")


def _panel(axis: Any, norm: dict[str, Any], title: str) -> None:
    kinds = {False: ("kept", KEPT, "o", (5, 4)), True: ("computed again", AGAIN, "s", (-2, -13))}
    for again, (name, colour, marker, offset) in kinds.items():
        rows = [own for own in norm["contenders"].values() if own["activation_checkpointing"] is again]
        places = [median(own["seconds"]) for own in rows]
        heights = [own["peak"] / GIB for own in rows]
        low = [place - min(own["seconds"]) for place, own in zip(places, rows, strict=True)]
        high = [max(own["seconds"]) - place for place, own in zip(places, rows, strict=True)]
        look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1, "elinewidth": 0.8, "capsize": 2}
        axis.errorbar(places, heights, xerr=[low, high], label=f"activations {name}", **look)
        for own, place, height in zip(rows, places, heights, strict=True):
            size = own["micro_batch_size"]
            text = "whole" if str(size) == norm["whole"] else str(size)
            axis.annotate(text, (place, height), offset, textcoords="offset points", fontsize=8, color=colour)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("seconds per step")
    axis.set_ylabel("peak memory of a step (GiB)")
    axis.margins(0.12)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
