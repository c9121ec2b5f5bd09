"""How long ``normalization.py`` trains: a number of epochs, the same for every row, that fits a budget in minutes."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from normalization_settings import Setting, Wanted, training
from trainings import run_all

from nnunet_norm.errors import SetupError
from nnunet_norm.writing import write_json

CALIBRATED = 2
"""Epochs of the training that is timed."""

ROW = "BatchRenorm"


def epochs_for(minutes: float, trainings: Sequence[Wanted], args) -> int:
    """Epochs that all trainings together can have; at least one. They are written down once, and kept from then on.

    Args:
        minutes: for all trainings, ``args.jobs`` at a time.
        trainings: what is to be trained.
        args: with ``iterations``, ``jobs``, ``work`` and ``what``.

    Raises:
        SetupError: the number is not known yet, and this call is not to train.
    """
    settings = {each.name: each.setting for each in trainings}
    listed = ", ".join(f"{name} ({settings[name].network.name})" for name in sorted(settings))
    key = f"{minutes:g} minutes, {args.jobs} at a time, {args.iterations} iterations: {listed}"
    path = args.work / "budget.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        if "train" not in args.what:
            raise SetupError(f"--budget {minutes:g}: nothing was trained with it yet ({key}); leave out --report-only")
        timed = {name: _timed(setting, args.iterations, args.work) for name, setting in settings.items()}
        epoch = sum(timed[each.name]["seconds_per_epoch"] * each.cost for each in trainings)
        around = sum(timed[each.name]["seconds_around"] for each in trainings)
        seconds = minutes * 60 * args.jobs
        known[key] = {"epochs": max(int((seconds - around) // epoch), 1), "trainings": len(trainings), "timed": timed}
        if seconds < around + epoch:
            shortest = (around + epoch) / 60 / args.jobs
            print(f"--budget {minutes:g} is exceeded: one epoch each takes {shortest:.0f} minutes", flush=True)
        write_json(path, known)
    found = known[key]
    print(f"{key}: {found['epochs']} epochs each", flush=True)
    if found["trainings"] != len(trainings):
        print(
            f"that was found for {found['trainings']} trainings and holds for later calls; this one has {len(trainings)}, "
            f"which take about {minutes * len(trainings) / found['trainings']:.0f} minutes",
            flush=True,
        )
    return found["epochs"]


def _timed(setting: Setting, iterations: int, work: Path) -> dict[str, float]:
    """Seconds of an epoch, and of what comes before and after all epochs, in a short training of its own."""
    plan = training(ROW, 0, setting, CALIBRATED, max(iterations // 5, 1), work)
    path = plan.fold / "seconds.json"
    if not path.exists():
        start = time.perf_counter()
        run_all([plan], 1)
        write_json(path, {"all": time.perf_counter() - start})
    return seconds_of(plan.fold, json.loads(path.read_text())["all"], max(iterations // 5, 1), iterations)


def seconds_of(fold: Path, total: float, timed: int, iterations: int) -> dict[str, float]:
    """From the log of a training of ``timed`` iterations an epoch to epochs of ``iterations``.

    The first epoch is left out: it warms up. Whatever is in no epoch is before and after.
    """
    log = sorted(fold.glob("training_log_*.txt"))[-1].read_text()
    epochs = [float(line.split("Epoch time: ")[1].split()[0]) for line in log.splitlines() if "Epoch time: " in line]
    return {"seconds_per_epoch": epochs[-1] * iterations / timed, "seconds_around": max(total - sum(epochs), 0.0)}
