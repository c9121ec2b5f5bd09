import math

import numpy as np
import pytest

from nnunet_norm.evaluation import Comparison
from nnunet_norm.sweep.figures import MOST_LINES, Curves, Scores, draw_curves, draw_differences, draw_scores, window
from nnunet_norm.sweep.progress import Epoch


def _training(losses: list[float], first: int = 0) -> list[Epoch]:
    return [
        Epoch(number=n, seconds=1, train_loss=loss, val_loss=0, dice=0, learning_rate=0)
        for n, loss in enumerate(losses, first)
    ]


def _draw(panels: list[Curves]):
    figure = draw_curves(panels, "train_loss", "training loss", rising=True, shared=False)
    figure.draw_without_rendering()
    return figure


def test_a_curve_is_the_mean_of_the_folds_that_have_reached_the_epoch() -> None:
    """Enforces mean, lowest and highest fold of every epoch, with folds of different lengths and one that diverged."""
    figure = _draw([Curves("p", {"b2": [_training([1.0, 3.0, 8.0]), _training([3.0, math.inf])]})])
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [0, 1, 2]
    assert list(line.get_ydata()) == [2.0, 3.0, 8.0]
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    assert (corners[corners[:, 0] == 0][:, 1].min(), corners[corners[:, 0] == 0][:, 1].max()) == (1.0, 3.0)


def test_long_trainings_are_averaged_over_a_fiftieth() -> None:
    """Enforces the running mean of long curves against NumPy's, and that short ones are as they are."""
    losses = np.random.default_rng(0).normal(size=200)
    panels = [Curves("p", {"b2": [_training(list(losses))]})]
    assert window(panels) == 4
    drawn = np.array(_draw(panels).axes[0].lines[0].get_ydata())
    expected = [losses[max(n - 2, 0) : n + 2].mean() for n in range(200)]
    assert drawn == pytest.approx(np.array(expected))
    assert window([Curves("p", {"b2": [_training([1.0] * 49)]})]) == window([]) == 1


def test_no_panel_has_more_lines_than_can_be_told_apart() -> None:
    """Enforces that many lines go into several panels, and that a line looks the same in all of them."""
    lines = {f"b{n}": [_training([float(n), 0.0])] for n in range(MOST_LINES + 3)}
    figure = _draw([Curves("all", lines), Curves("two", {"b0": lines["b0"], "b1": lines["b1"]})])
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [len(axis.lines) for axis in shown] == [MOST_LINES, 3, 2]
    assert [axis.get_title() for axis in shown] == ["all (1)", "all (2)", "two"]
    assert shown[0].lines[1].get_color() == shown[2].lines[1].get_color()
    assert len({line.get_color() for line in shown[0].lines}) == MOST_LINES


def test_every_fold_is_a_point_beside_mean_and_deviation() -> None:
    """Enforces that all scores can be seen, none upon another, and that bars are one standard deviation long."""
    scores = {"2": [0.5, 0.7, math.nan], "16": [0.8, 0.8, 0.8]}
    panels = {"Dice": [Scores("p", {"IN": scores, "BRN": {"16": [0.9]}})]}
    figure = draw_scores(panels, ("2", "16"), "batch size")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    points = [line for line in axis.lines if line.get_marker() == "."]
    drawn = [(x, y) for line in points for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert sorted(y for _, y in drawn) == [0.5, 0.7, 0.8, 0.8, 0.8, 0.9]
    assert len(set(drawn)) == 6
    bars = axis.containers[0].lines[2][0].get_segments()
    assert [bar[1][1] - bar[0][1] for bar in bars] == pytest.approx([2 * math.sqrt(0.02), 0], abs=1e-12)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "16"]
    assert axis.get_ylabel() == "Dice"


def test_differences_have_their_intervals_and_zero() -> None:
    """Enforces a line from low to high for every comparison, a point alone for one case, and nothing for none."""
    some = Comparison(mean=0.1, low=-0.1, high=0.2, level=0.95, num_cases=5, left_out=0, partial=0, wins=4, losses=1)
    one = Comparison(
        mean=0.3, low=math.nan, high=math.nan, level=0.95, num_cases=1, left_out=0, partial=0, wins=1, losses=0
    )
    figure = draw_differences({"Dice": {"a": some, "b": one, "c": None}, "NSD": {"a": None, "b": None, "c": None}})
    figure.draw_without_rendering()
    dice, nsd = figure.axes
    assert [list(line.get_xdata()) for line in dice.lines] == [[-0.1, 0.2], [0.1], [0.3], [0, 0]]
    assert [list(line.get_xdata()) for line in nsd.lines] == [[0, 0]]
    assert dice.get_xlabel() == "difference in Dice"
