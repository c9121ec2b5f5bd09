"""What ``layers.py`` says about its runs: tables, and whether the package's bars were met."""

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from layers_contenders import CONTENDERS
from reporting import amount, spread, table

TITLES = {name: title for name, (title, *_) in CONTENDERS.items()}
BASELINE = "batch_norm"
"""What all are ratios to."""

EAGER_LAYER, COMPILED_LAYER, MEMORY = 1.15, 1.05, 1.02
"""Bars, at most: seconds of BatchRenorm over those of BatchNorm (eager on the CPU; compiled), and its peak memory."""

NOTES = """\
- Seconds: of a forward and a backward pass, added up over all norms of the network. Ratios are taken within a round, between
  these sums; shown are their median and range over the rounds.
- Peak: bytes above inputs and parameters while forward and backward run; held: those between the two, output and what is kept
  for the backward pass. Both added up over the norms.
- Error: the largest difference of output and gradients, on the smallest map in single precision, from the same formula in
  double precision, over the largest value of each.
- The explicit formula updates its running statistics in the graph that reads them: compiled, its gradients may be wrong.
"""


def sums(experiment: dict[str, Any], name: str) -> list[float]:
    """Seconds per round, over all norms of the network."""
    counts = [of["count"] for of in experiment["maps"]]
    rounds = experiment["contenders"][name]["seconds"]
    return [sum(c * s for c, s in zip(counts, row, strict=True)) for row in rounds]


def ratios(experiment: dict[str, Any], over: str, under: str) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(sums(experiment, over), sums(experiment, under), strict=True)]


def total(experiment: dict[str, Any], name: str, key: str) -> int | None:
    """Bytes over all norms; None where they were not measured."""
    row = experiment["contenders"][name]
    if key not in row:
        return None
    return sum(of["count"] * value for of, value in zip(experiment["maps"], row[key], strict=True))


def over(experiment: dict[str, Any], name: str, base: str, key: str) -> float | None:
    """Ratio of bytes."""
    above, below = total(experiment, name, key), total(experiment, base, key)
    return None if above is None or below is None else above / below


def rows(experiment: dict[str, Any]) -> list[list[str]]:
    """One row per contender."""
    base = BASELINE
    head = ["", "seconds", f"over {TITLES[base]}", "peak", f"peak over {TITLES[base]}"]
    found = [[*head, f"held over {TITLES[base]}", "error"]]
    for name in experiment["contenders"]:
        peak, held = (over(experiment, name, base, key) for key in ("peak", "held"))
        cells = [TITLES[name], spread(sums(experiment, name)), spread(ratios(experiment, name, base), "x")]
        cells += [amount(total(experiment, name, "peak")), f"{peak:.3f}x"]
        found.append([*cells, f"{held:.3f}x", f"{experiment['errors'][name]:.1e}"])
    return found


def per_map(experiment: dict[str, Any]) -> list[list[str]]:
    """Ratios of seconds map by map: where a sum comes from."""
    base = BASELINE
    others = [name for name in experiment["contenders"] if name != base]
    found = [["input of the norm", "norms", f"ms, {TITLES[base]}", *[TITLES[name] for name in others]]]
    for number, of in enumerate(experiment["maps"]):
        times = {n: [row[number] for row in c["seconds"]] for n, c in experiment["contenders"].items()}
        shares = [f"{median(a / b for a, b in zip(times[name], times[base], strict=True)):.3g}x" for name in others]
        shape = " x ".join(map(str, of["shape"]))
        found.append([shape, str(of["count"]), f"{median(times[base]) * 1000:.3g}", *shares])
    return found


def bars(result: dict[str, Any]) -> list[list[str]]:
    """Experiment, what, the bar, what was seen, and the verdict, for BatchRenorm."""
    found = [["experiment", "BatchRenorm", "bar", "measured", ""]]
    for title, experiment in result["experiments"].items():
        what, base = experiment["what"], BASELINE
        present = experiment["contenders"]
        names = [n for n in ("batch_renorm", "batch_renorm_warmup") if n in present and base in present]
        for name in names:
            values, memory = ratios(experiment, name, base), over(experiment, name, base, "peak")
            assert memory is not None
            bar = _time_bar(result["device"], what, experiment["mode"])
            found.append(_judged([title, f"{TITLES[name]}, time over {TITLES[base]}"], values, bar))
            memory_bar = MEMORY if what == "layers" else None
            found.append(_judged([title, f"{TITLES[name]}, peak memory over {TITLES[base]}"], [memory], memory_bar))
    return found


def _time_bar(device: str, what: str, mode: str) -> float | None:
    if what == "blocks":
        return None
    if mode == "compiled":
        return COMPILED_LAYER
    return EAGER_LAYER if device == "cpu" else None


def _judged(cells: Sequence[str], values: Sequence[float], bar: float | None) -> list[str]:
    if bar is None:
        return [*cells, "for information", spread(values, "x"), ""]
    return [*cells, f"at most {bar}", spread(values, "x"), "met" if median(values) <= bar else "missed"]


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    device = {"cpu": "CPU", "cuda": "CUDA"}[result["device"]]
    parts = [f"# Norms of a stock 3d_fullres network, forward and backward, {device}", "## Bars", table(bars(result))]
    for title, experiment in result["experiments"].items():
        parts += [
            f"## {title}",
            f"`{experiment['command']}`",
            _about(experiment),
            table(rows(experiment)),
            table(per_map(experiment)),
        ]
    parts.append(NOTES + f"- Memory is measured by {result['memory_measured_as']}.")
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _about(experiment: dict[str, Any]) -> str:
    patch = " x ".join(map(str, experiment["patch"]))
    norms = sum(of["count"] for of in experiment["maps"])
    words = f"{norms} norms, patch {patch}, batch {experiment['batch']}; {experiment['rounds']} rounds; "
    words += f"{experiment['threads']} threads."
    if experiment["load"] > experiment["threads"] + 1:
        words += f" Other programs ran at the same time: load average up to {experiment['load']:.1f}."
    told = experiment["machine"] | experiment["versions"]
    return (
        f"{words} {experiment['note']}".strip() + "\n\n" + "\n".join(f"- {k}: {json.dumps(v)}" for k, v in told.items())
    )
