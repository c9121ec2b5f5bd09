"""What ``benchmarks/prediction.py`` says about its runs: tables, and whether the bars were met."""

import json
from statistics import median
from typing import Any

from reporting import amount, spread, table

NAMES = {
    "whole": "one pass over the whole image",
    "whole_channels_last": "the same, channels last in memory",
    "stages": "halo predictor, stages",
    "tiles": "halo predictor, tiles",
    "monai": "MONAI, sliding window",
    "nnunet": "nnU-Net's predictor",
}

FASTER = {(3, "batch_renorm"): 4.0, (3, "instance_norm"): 3.0, (2, "batch_renorm"): 2.3, (2, "instance_norm"): 2.3}
"""Bar: how much faster ``stages`` is than nnU-Net's predictor at least, 4 patches wide."""

OVER_ONE_PASS = {"batch_renorm": 1.15, "instance_norm": 1.6}
"""Bar: seconds of ``stages`` over those of one pass at most."""

NOTES = """\
- Seconds: median (least to most) over the rounds, from the preprocessed image to the logits on the CPU, after
  a warm-up on one patch (on CUDA also on the image). Ratios: the same of the ratios within each round.
- Anonymous memory: {measured}; its peak in any round, less what the process took just before (network, image, libraries). The
  result is in it, but with scratch on disk.
- Labels and differences: against one pass over the whole image; the difference is the largest of any logit, in float32. The
  network is not trained: the shares compare these predictors, and say little about what a trained network would lose.
"""


def done(result: dict[str, Any], size: int, name: str) -> dict[int, dict[str, Any]]:
    """By round."""
    return {
        run["round"]: run
        for run in result["runs"]
        if run["size"] == size and run["contender"] == name and run["status"] == "done"
    }


def ratios(result: dict[str, Any], size: int, over: str, under: str) -> list[float]:
    """Seconds of one over those of another, round by round."""
    above, below = done(result, size, over), done(result, size, under)
    return [above[turn]["seconds"] / below[turn]["seconds"] for turn in sorted({*above} & {*below})]


def on_disk(run: dict[str, Any]) -> int:
    """Bytes on the disk that the plan announces."""
    plan = run["plan"]
    return plan["scratch_bytes"] + plan["result_bytes"] if plan.get("scratch") == "disk" else 0


def announced(run: dict[str, Any]) -> str:
    """The scratch that the plan announces, and the result with it."""
    plan = run["plan"]
    if "scratch" not in plan:
        return ""
    return f"{amount(plan['scratch_bytes'])} and {amount(plan['result_bytes'])} for the result, {plan['scratch']}"


def row(result: dict[str, Any], size: int, name: str, on_cuda: bool) -> list[str]:
    runs = list(done(result, size, name).values())
    if not runs:
        last = [run for run in result["runs"] if run["size"] == size and run["contender"] == name][-1]
        needs = f": {amount(last['needs'])}, {amount(last['available'])} available" if "needs" in last else ""
        return [NAMES[name], " ".join([last["status"] + needs, last.get("why", "").replace("|", "/")]).strip()]
    compared = next((run for run in runs if "labels_differ" in run), None)
    found = [
        NAMES[name],
        spread([run["seconds"] for run in runs]),
        spread(ratios(result, size, "nnunet", name), "x"),
        spread(ratios(result, size, name, "whole"), "x"),
        amount(max(run["anonymous_above"] for run in runs)),
    ]
    if on_cuda:
        found.append(amount(max(run["device_above"] for run in runs)))
    return [
        *found,
        announced(runs[0]),
        f"{compared['labels_differ']:.2e}" if compared else "",
        f"{compared['max_difference']:.2e}" if compared else "",
    ]


def bars(result: dict[str, Any]) -> list[list[str]]:
    """For ``stages``: image, what, the bar, what was seen, and the verdict."""
    settings, found = result["settings"], []
    norm, limit = settings["norm"], settings["max_memory"]
    for number, size in enumerate(result["sizes"]):
        runs = list(done(result, number, "stages").values())
        rows = []
        if size["patches"] == 4:
            bar, values = FASTER[settings["ndim"], norm], ratios(result, number, "nnunet", "stages")
            met = bool(values) and median(values) >= bar
            rows.append(["times as fast as nnU-Net's predictor", f"at least {bar:g}", spread(values), met])
        most, values = OVER_ONE_PASS[norm], ratios(result, number, "stages", "whole")
        rows.append(
            ["time over one pass", f"at most {most:g}", spread(values), bool(values) and median(values) <= most]
        )
        if values := ratios(result, number, "stages", "whole_channels_last"):
            rows.append(["time over one pass, channels last", "for comparison", spread(values), None])
        compared = next((run for run in runs if "is_rounding" in run and size["reference"] == "whole"), None)
        if norm == "batch_renorm":
            seen = f"{compared['max_difference']:.1e}" if compared else spread([])
            rows.append(["difference to one pass", "0 or float32 rounding", seen, compared and compared["is_rounding"]])
        if runs and "memory_bytes" in runs[0]["plan"]:
            peak, said = max(run["anonymous_above"] for run in runs), runs[0]["plan"]["memory_bytes"]
            rows.append(["anonymous memory above", f"at most {amount(said)}, as announced", amount(peak), peak <= said])
        if limit and runs:
            peak = max(run["anonymous_before"] + run["anonymous_above"] for run in runs)
            rows.append(["anonymous memory of the process", f"at most {amount(limit)}", amount(peak), peak <= limit])
        if runs and runs[0]["on_disk"] is not None:
            peak, said = max(run["on_disk"] for run in runs), on_disk(runs[0])
            rows.append(
                ["scratch on disk", f"at most {amount(said)}, as announced", amount(peak), peak <= said * 1.001]
            )
        for what, bar, seen, met in rows:
            if seen == spread([]) and len({run["contender"] for run in result["runs"]}) == 1:
                continue
            verdict = "" if met is None or seen == spread([]) else "met" if met else "missed"
            found.append([title(size), what, bar, seen, verdict])
    return found


def title(size: dict[str, Any]) -> str:
    shape = " x ".join(map(str, size["shape"]))
    return shape if size["patches"] is None else f"{shape} ({size['patches']} patches wide)"


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader must know about these numbers."""
    settings, found = result["settings"], []
    if settings["stages"] != 6:
        found.append(f"The bars are for 6 stages, not {settings['stages']}.")
    if settings["classes"] != 16:
        found.append(f"The bar for memory is for 16 classes, not {settings['classes']}.")
    load = max((run["load"] for run in result["runs"] if "load" in run), default=0.0)
    if load > settings["threads"] + 1:
        found.append(f"Other programs ran at the same time: load average up to {load:.1f}.")
    for number, size in enumerate(result["sizes"]):
        ratio = ratios(result, number, "stages", "whole")
        plans = [run["plan"] for run in done(result, number, "stages").values()]
        if ratio and median(ratio) < 0.97 and not plans[0].get("one_pass"):
            layout, blocks = (
                ratios(result, number, *pair)
                for pair in (("whole_channels_last", "whole"), ("stages", "whole_channels_last"))
            )
            found.append(
                f"{title(size)}: `stages` is faster than the pass that it equals ({spread(ratio, 'x')}), though it computes "
                f"no less. That pass with channels last in memory, as in `stages`, takes {spread(layout, 'x')}: what the "
                f"layout does. `stages` over this one takes {spread(blocks, 'x')}: what blocks do, by caches, by memory that "
                f"is used again, and by halos."
            )
        if size["reference"] not in (None, "whole"):
            found.append(
                f"{title(size)}: one pass did not run, so labels and differences are against `{size['reference']}`."
            )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    settings, on_cuda = result["settings"], result["settings"]["device"] == "cuda"
    patch, mirroring = " x ".join(map(str, settings["patch"])), "on" if settings["mirror"] else "off"
    kind = {
        "batch_renorm": "fixed statistics (BatchRenorm)",
        "instance_norm": "the image's own statistics (InstanceNorm)",
    }
    head = ["", "seconds", "times as fast as nnU-Net's", "over one pass", "anonymous memory"]
    head += [*(["device memory"] if on_cuda else []), "scratch announced", "labels that differ", "largest difference"]
    first = next((run for run in result["runs"] if run["status"] == "done"), {})
    parts = [
        f"# Prediction, {settings['ndim']}d, {kind[settings['norm']]}",
        f"`{result['command']}`",
        "\n".join(f"- {key}: {json.dumps(value)}" for key, value in (result["machine"] | result["versions"]).items()),
        f"A plain U-Net of {settings['stages']} stages, {settings['width']} channels wide at the first, "
        f"{settings['classes']} classes, patch {patch}; {settings['threads']} threads, {settings['device']}, mirroring "
        f"{mirroring}, scratch {settings['scratch']}, {settings['rounds']} rounds.",
    ]
    for number, size in enumerate(result["sizes"]):
        names = list(dict.fromkeys(run["contender"] for run in result["runs"] if run["size"] == number))
        rows = [row(result, number, name, on_cuda) for name in NAMES if name in names]
        parts += [f"## {title(size)}", table([head, *rows])]
    judged = bars(result)
    parts += ["## Bars", table([["image", "what", "bar", "measured", ""], *judged])] if judged else []
    parts.append("\n\n".join(remarks(result)))
    parts.append(NOTES.format(measured=first.get("measured_as", "not measured")))
    parts += ["## Plans of execution", "\n".join(executions(result))]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def executions(result: dict[str, Any]) -> list[str]:
    """Every contender's plan, once per size."""
    found = {
        (run["size"], run["contender"]): run["plan"] | {"dtype of the result": run["dtype"]}
        for run in result["runs"]
        if run["status"] == "done"
    }
    return [f"- {title(result['sizes'][size])}, {name}: `{json.dumps(plan)}`" for (size, name), plan in found.items()]
