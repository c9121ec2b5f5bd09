"""What trainings of a sweep have come to: scores of their validations, what their trainers measured, curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_norm.evaluation.options import Class
from nnunet_norm.sweep.factors import Factors
from nnunet_norm.sweep.grid import Grid
from nnunet_norm.sweep.points import Point, Run
from nnunet_norm.sweep.progress import Epoch


@dataclass(frozen=True)
class Spread:
    """Mean and spread over folds.

    Attributes:
        mean: of the folds that have a value; NaN if none has.
        deviation: standard deviation with n - 1; NaN for fewer than two folds.
        count: of those folds.
    """

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """NaN is no value."""
        present = [value for value in values if not math.isnan(value)]
        return cls(
            statistics.fmean(present) if present else math.nan,
            statistics.stdev(present) if len(present) > 1 else math.nan,
            len(present),
        )


@dataclass(frozen=True)
class Tiles:
    """How far two tiles are apart that predict the same voxels; see ``norm_report.json``.

    Attributes:
        mismatch: mean over the classes of the median of 1 - Dice; NaN if not measured.
        max_dist: largest difference of logits; NaN if not measured.
        verdict: ``max_dist`` in words.
    """

    mismatch: float
    max_dist: float
    verdict: str

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Tiles:
        """Of a part of ``norm_report.json``."""
        per_class = (_number(value) for value in (found.get("per_class") or {}).values())
        distance = _number(found.get("max_dist"))
        return cls(Spread.of(per_class).mean, distance, str(found.get("verdict", "not measured")))


@dataclass(frozen=True)
class Outcome:
    """What one training has come to.

    Attributes:
        run: which one.
        missing: what it lacks to be done; None if it lacks nothing.
        summary: of the evaluation of its validation; None before it is done.
        report: ``norm_report.json`` of its validation; None where the trainer writes none.
        epochs: that have ended.
        fault: why its validation, though done, cannot be evaluated; None if it can.
    """

    run: Run
    missing: str | None
    summary: Mapping[str, Any] | None
    report: Mapping[str, Any] | None
    epochs: tuple[Epoch, ...]
    fault: str | None = None

    def score(self, metric: str, label: Class | None = None) -> float:
        """Mean over the cases, of one class or region or over all in the foreground; NaN where there is none."""
        if self.summary is None:
            return math.nan
        scores = self.summary["foreground_mean"] if label is None else self.summary["mean"].get(label, {})
        return _number(scores.get(metric))

    @property
    def num_cases(self) -> int:
        """Validated and evaluated."""
        return 0 if self.summary is None else len(self.summary["metric_per_case"])

    @property
    def disparity(self) -> float:
        """Train/eval disparity of the validation, mean over the classes; NaN where it was not measured."""
        return _number((self.report or {}).get("train_eval_disparity", {}).get("mean"))

    @property
    def tiles(self) -> Tiles:
        """As images are predicted by ``nnunet-norm predict``."""
        return Tiles.of((self.report or {}).get("tile_mismatch", {}))

    @property
    def tiles_alone(self) -> Tiles:
        """As it would be in tiles with statistics of their own: of norms that have no stored ones."""
        return Tiles.of((self.report or {}).get("tile_mismatch_with_tile_statistics", {}))

    @property
    def seconds(self) -> float:
        """Of an epoch, the median; NaN before the first has ended."""
        times = [epoch.seconds for epoch in self.epochs if not math.isnan(epoch.seconds)]
        return statistics.median(times) if times else math.nan


@dataclass(frozen=True)
class Collection:
    """A sweep and its outcomes.

    Attributes:
        grid: the sweep.
        factors: in what its points differ.
        outcomes: of every run of it.
        labels: classes or regions, as summaries have them, with their names.
        metrics: that were evaluated, "Dice" first.
        settings: of the evaluation, as summaries have them.
    """

    grid: Grid
    factors: Factors
    outcomes: tuple[Outcome, ...]
    labels: Mapping[Class, str]
    metrics: tuple[str, ...]
    settings: Mapping[str, Any]

    def of(self, point: Point) -> list[Outcome]:
        """Of a point's folds, in order."""
        return [outcome for outcome in self.outcomes if outcome.run.point.name == point.name]

    def counted(self, point: Point) -> list[Outcome]:
        """Of a point's folds those that means are of: all but ``all``, which is trained on the cases of its validation.

        Where the sweep has no other fold, that one.
        """
        outcomes = self.of(point)
        return [outcome for outcome in outcomes if outcome.run.fold != "all"] or outcomes

    def spread(self, point: Point, metric: str, label: Class | None = None) -> Spread:
        """Over the folds that count and are done."""
        return Spread.of(outcome.score(metric, label) for outcome in self.counted(point))

    @property
    def done(self) -> list[Outcome]:
        """Those with scores."""
        return [outcome for outcome in self.outcomes if outcome.summary is not None]


def _number(value: float | None) -> float:
    """NaN for None, which stands for "not measured" in JSON."""
    return math.nan if value is None else float(value)
