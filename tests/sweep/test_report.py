import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_norm.cli import main
from nnunet_norm.errors import OutputError
from nnunet_norm.sweep.collecting import compare_with_baseline
from nnunet_norm.sweep.report import sentences, write_report


@pytest.fixture(scope="module")
def written(unfinished, tmp_path_factory):
    found = unfinished.found
    return write_report(found, compare_with_baseline(found), tmp_path_factory.mktemp("report") / "made" / "here")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_needs_nothing_else(written) -> None:
    """Enforces one file without scripts and links, with its pictures within, and nothing half-written beside it."""
    text = written.html.read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="([^"]{0,15})', text)) == {"data:image/png;"}
    assert "<script" not in text
    assert text.count("<figure>") == 4
    assert "5 of 8 trainings are done: 4 models (2 x norm, 2 x batch size) in 2 folds." in text
    assert sorted(path.name for path in written.html.parent.iterdir()) == [
        "points.csv",
        "report.html",
        "report.md",
        "runs.csv",
    ]


def test_markdown_has_all_tables(written) -> None:
    """Enforces a heading, a table and a caption for every one, with columns that every row has."""
    text = written.markdown.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "All models",
        "By norm",
        "By batch size",
        *(f"{metric} by {what}" for what in ("fold", "class") for metric in ("Dice", "NSD")),
        "What the trainers measured",
        "Models",
    ]
    for part in text.split("## ")[1:]:
        table = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1
    assert "fold 0: no checkpoint_final.pth, 2 of 3 epochs" in text


def test_runs_are_one_row_per_metric_and_class(written, unfinished) -> None:
    """Enforces the long table's numbers to the last bit, and that what is not done is not in it."""
    found = unfinished.found
    rows = _read(written.runs)
    values = {(r["model"], r["fold"], r["metric"], r["class"]): r["value"] for r in rows}
    assert len(values) == len(rows) == 5 * (2 * 3 + 6)
    for outcome in found.done:
        model, fold = outcome.run.point.name, str(outcome.run.fold)
        assert float(values[model, fold, "NSD", "rear"]) == outcome.score("NSD", 2)
        assert float(values[model, fold, "Dice", "all"]) == outcome.score("Dice")
    assert {(r["norm"], r["batch_size"], r["cases"]) for r in rows} == {
        ("InstanceNorm", "2", "2"),
        ("InstanceNorm", "16", "2"),
        ("BRN", "16", "2"),
    }


def test_points_are_one_row_each(written, unfinished) -> None:
    """Enforces mean, deviation, difference and interval of every model, and empty cells for what is not there."""
    found, compared = unfinished.found, compare_with_baseline(unfinished.found)
    rows = _read(written.points)
    assert [row["model"] for row in rows] == [point.name for point in found.grid.points]
    assert [row["baseline"] for row in rows] == ["False", "True", "False", "False"]
    first, base, one_fold, nothing = rows
    score, comparison = found.spread(found.grid.points[0], "Dice"), compared[first["model"]]["Dice"]
    assert (float(first["Dice_mean"]), float(first["Dice_sd"])) == (score.mean, score.deviation)
    keys = ("Dice_difference", "Dice_difference_low", "Dice_difference_high")
    assert [float(first[key]) for key in keys] == [comparison.mean, comparison.low, comparison.high]
    assert (float(first["tile_mismatch_alone"]), float(first["max_dist_alone"])) == (0.04, 7.5)
    assert (one_fold["Dice_sd"], one_fold["folds_done"], one_fold["max_dist_alone"]) == ("", "1", "")
    assert (nothing["Dice_mean"], nothing["Dice_difference"], nothing["Dice_difference_cases"]) == ("", "", "0")
    assert base["Dice_difference"] == ""


def test_the_best_is_named_with_what_it_is_worth(unfinished) -> None:
    """Enforces the best by mean Dice, its difference over common cases, and that it was chosen on these cases."""
    found = unfinished.found
    compared = compare_with_baseline(found)
    far, best, how = sentences(found, compared)
    assert far.endswith("of models with other folds done compare the differences only.")
    assert best.startswith("Highest mean Dice: BRN, b16 with 0.")
    assert "over 2 common cases. It is the best of 3 on the cases by which it was chosen" in best
    assert how.startswith("NSD (surface Dice) at a tolerance of 0.5 mm, in the images' own spacing.")
    nothing = replace(found, outcomes=tuple(replace(o, summary=None) for o in found.outcomes), settings={})
    assert sentences(nothing, compare_with_baseline(nothing))[1:] == ["No validation is there yet."]
    each = {**found.settings, "tolerance": {"1": 0.5, "2": 2.0}}
    assert "at a tolerance of 0.5 mm for front, 2 mm for rear" in sentences(replace(found, settings=each), compared)[-1]


def test_a_folder_that_cannot_be_made_is_refused(unfinished, tmp_path) -> None:
    """Enforces one line that names it."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        OutputError, match=r"file/report cannot be made \(Not a directory\): choose another folder with -o"
    ):
        write_report(unfinished.found, {}, tmp_path / "file" / "report")


def test_the_command_writes_where_it_is_told(unfinished, pretended_folders, tmp_path, capsys) -> None:
    """Enforces the command with its flags, what it prints, and one line for what it cannot do."""
    grid = str(unfinished.sweep.yaml)
    arguments = [
        "sweep",
        "report",
        grid,
        "-o",
        str(tmp_path / "here"),
        "-np",
        "1",
        "--tolerance",
        "0.5",
        "--disable_progress_bar",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 of 8 trainings are done")
    assert "| InstanceNorm | 16         | 2 of 2 |" in printed
    assert printed.rstrip().endswith("runs.csv")
    assert (tmp_path / "here" / "report.html").is_file()
    for wrong, words in (
        (["-np", "0"], "-np 0 must be at least 1"),
        (["--tolerance", "liver=1"], "tolerance of 'liver': there is no such class; choose from front, rear"),
        (["-f", "7"], "folds has 7"),
    ):
        assert main([*arguments[:5], *wrong]) == 2
        refusal = capsys.readouterr().err
        assert words in refusal
        assert refusal.count("\n") == 1
