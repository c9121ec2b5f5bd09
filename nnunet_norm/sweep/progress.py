"""What nnU-Net's training logs say of every epoch, of any trainer, also while the training runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"training_log_(\d+(?:_\d+){5})\.txt")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?: ")
_EPOCH = re.compile(r"Epoch (\d+)")
_TYPE = re.compile(r"\w+\.\w+\(")  # NumPy 2 writes np.float32(0.5)
_NUMBER = re.compile(r"nan|[-+]?inf|[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_VALUES = {"Current learning rate: ": "learning_rate", "train_loss ": "train_loss", "val_loss ": "val_loss"}
_DICE = "Pseudo dice "
_END = "Epoch time: "


@dataclass(frozen=True)
class Epoch:
    """One finished epoch; NaN for what its log does not say.

    Attributes:
        number: from 0, as nnU-Net counts.
        seconds: that it took, without writing checkpoints and pictures.
        train_loss: mean over its iterations.
        val_loss: mean over its validation iterations.
        dice: nnU-Net's pseudo Dice: of validation patches, mean over the classes or regions that occurred.
        learning_rate: at its beginning, rounded to five places.
    """

    number: int
    seconds: float
    train_loss: float
    val_loss: float
    dice: float
    learning_rate: float


def read_epochs(fold_folder: str | Path) -> list[Epoch]:
    """The finished epochs of a training, in order; empty if it has not begun.

    A training that was continued has several logs. Where one goes on with an epoch that an earlier one had already (the
    checkpoint was older), the earlier one's from there on are left out: the network that is trained never saw them. So a
    training that began afresh in the same folder takes the place of the one before.

    Args:
        fold_folder: nnU-Net's results folder of a fold.
    """
    epochs: dict[int, Epoch] = {}
    for path in _logs(Path(fold_folder)):
        for number, epoch in _events(path):
            if epoch is None:
                epochs = {known: value for known, value in epochs.items() if known < number}
            else:
                epochs[number] = epoch
    return list(epochs.values())


def _logs(folder: Path) -> list[Path]:
    """Its logs, by the time in their names, in which months and days have no leading zero."""
    found = [(name[1], path) for path in folder.glob("training_log_*.txt") if (name := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted((tuple(map(int, time.split("_"))), path) for time, path in found)]


def _events(path: Path) -> Iterator[tuple[int, Epoch | None]]:
    """Of one log in its order: (number, None) where an epoch begins, (number, epoch) where it has ended."""
    number, values = None, dict[str, float]()
    for line in _lines(path):
        if begins := _EPOCH.fullmatch(line):
            number, values = int(begins[1]), {}
            yield number, None
        elif line.startswith(_DICE):
            values["dice"] = _mean_of_present(_numbers(line.removeprefix(_DICE)))
        elif line.startswith(_END) and number is not None:
            keys = ("train_loss", "val_loss", "dice", "learning_rate")
            found = {key: values.get(key, math.nan) for key in keys}
            yield number, Epoch(number=number, seconds=_first(line.removeprefix(_END)), **found)
            number = None
        else:
            for start, key in _VALUES.items():
                if line.startswith(start):
                    values[key] = _first(line.removeprefix(start))


def _lines(path: Path) -> Iterator[str]:
    """Whole lines without their times; the last one may be half-written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # removed since the folder was listed
        return
    for line in text[: text.rfind("\n") + 1].splitlines():
        yield _STAMP.sub("", line).strip()


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _NUMBER.findall(_TYPE.sub("", text))]


def _first(text: str) -> float:
    return next(iter(_numbers(text)), math.nan)


def _mean_of_present(values: list[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
