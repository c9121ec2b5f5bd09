import math
from dataclasses import replace

import pytest

from nnunet_norm.sweep.collecting import compare_with_baseline
from nnunet_norm.sweep.outcomes import Spread
from nnunet_norm.sweep.tables import (
    classes_table,
    detail_tables,
    difference,
    factor_tables,
    folds_table,
    measured_tables,
    number,
    points_table,
    spread,
)


def _rows(table) -> list[dict[str, str]]:
    """Rows by their columns; of two columns of one name the first."""
    return [dict(zip(reversed(table.header), reversed(row), strict=True)) for row in table.rows]


@pytest.fixture
def compared(unfinished):
    return compare_with_baseline(unfinished.found)


def test_cells_say_what_is_there_and_no_more() -> None:
    """Enforces the decimals of scores and of mm, that one fold has no spread, and a dash for no value."""
    assert spread("Dice", Spread(0.91234, 0.01, 3)) == "0.9123 ± 0.0100"
    assert spread("HD95", Spread(3.14159, 0.01, 3)) == "3.14 ± 0.01"
    assert spread("Dice", Spread(0.5, math.nan, 1)) == "0.5000"
    assert spread("Dice", Spread(math.nan, math.nan, 0)) == number("NSD", math.nan) == difference("Dice", None) == "-"


def test_a_difference_has_its_interval(unfinished, compared) -> None:
    """Enforces signs, brackets, and no interval of a single case."""
    point = unfinished.found.grid.points[0]
    found = replace(compared[point.name]["Dice"], mean=-0.01, low=-0.02, high=0.003)
    assert difference("Dice", found) == "-0.0100 [-0.0200, +0.0030]"
    assert difference("Dice", replace(found, low=math.nan, high=math.nan)) == "-0.0100"
    assert difference("HD95", replace(found, mean=1.5)) == "+1.50 [-0.02, +0.00]"


def test_every_point_has_a_row_also_where_nothing_is_done(unfinished, compared) -> None:
    """Enforces how far each model is, its levels, the baseline's mark, and dashes for what is not there."""
    found = unfinished.found
    rows = _rows(points_table(found, compared))
    assert [(row["norm"], row["batch size"], row["folds"]) for row in rows] == [
        ("InstanceNorm", "16", "2 of 2"),
        ("InstanceNorm", "2", "2 of 2"),
        ("BRN", "16", "1 of 2"),
        ("BRN", "2", "0 of 2"),
    ]
    first, base, one_fold, nothing = rows
    assert base["Dice"] == spread("Dice", found.spread(found.grid.baseline, "Dice"))
    assert (base["difference"], base["cases"]) == ("baseline", "-")
    assert first["difference"] == difference("Dice", compared[found.grid.points[0].name]["Dice"])
    assert (first["cases"], one_fold["cases"]) == ("4", "2")
    assert "±" not in one_fold["Dice"]
    assert [nothing[key] for key in ("Dice", "difference", "NSD", "cases", "disparity", "tile mismatch")] == ["-"] * 6
    assert (first["disparity"], one_fold["disparity"], one_fold["tile mismatch"]) == ("0.0000", "0.0200", "0.0000")


def test_a_factor_table_changes_one_thing(unfinished, compared) -> None:
    """Enforces that all but the factor is the baseline's, that the caption says so, and that sizes rise."""
    by_norm, by_batch = factor_tables(unfinished.found, compared)
    assert by_norm.title == "By norm"
    assert [row["norm"] for row in _rows(by_norm)] == ["InstanceNorm", "BRN"]
    assert "in norm alone (all with batch size 2)" in by_norm.caption
    assert [row["folds"] for row in _rows(by_norm)] == ["2 of 2", "0 of 2"]
    assert [row["batch size"] for row in _rows(by_batch)] == ["2", "16"]
    assert "in batch size alone (all with norm InstanceNorm)" in by_batch.caption


def test_folds_and_classes(unfinished) -> None:
    """Enforces every fold's score in its column, and every class's spread in its own."""
    found = unfinished.found
    by_fold = folds_table(found, "Dice")
    assert by_fold.header == ("model", "fold 0", "fold 1", "mean ± SD")
    for point, row in zip(found.grid.points, by_fold.rows, strict=True):
        assert list(row[1:3]) == [number("Dice", outcome.score("Dice")) for outcome in found.of(point)]
    assert by_fold.rows[1][0] == "InstanceNorm, b2 (baseline)"
    by_class = classes_table(found, "NSD")
    assert by_class.header == ("model", "front", "rear", "all")
    assert by_class.rows[0][1] == spread("NSD", found.spread(found.grid.points[0], "NSD", 1))


def test_what_trainers_measured(unfinished) -> None:
    """Enforces means over folds, "no" for rounding, statistics of tiles alone where a norm has them, and no empty table."""
    found = unfinished.found
    (table,) = measured_tables(found)
    assert table.header == (
        "model",
        "disparity",
        "tile mismatch",
        "max dist",
        "tile mismatch, alone",
        "max dist, alone",
        "seconds",
    )
    assert table.rows[0][1:] == ("0.0000", "0.0000", "no", "0.0400", "7.5", "16.0")
    assert table.rows[2][1:] == ("0.0200", "0.0000", "no", "-", "-", "9.0")  # of the fold that runs too
    assert table.rows[3][1:] == ("-",) * 6
    stock = replace(found, outcomes=tuple(replace(outcome, report=None, epochs=()) for outcome in found.outcomes))
    assert measured_tables(stock) == []
    assert len(detail_tables(stock)) == 4
