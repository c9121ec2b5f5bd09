"""``nnunet-norm evaluate``: the flags, the table, and refusals in one line."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "evaluation"))
from label_files import dataset, segmentation, three_cases, write

from nnunet_norm.cli import main
from nnunet_norm.commands.metric_options import parse_tolerance
from nnunet_norm.errors import EvaluationError


@pytest.fixture
def place(tmp_path):
    return three_cases(tmp_path)


def evaluate(place, *arguments):
    return main(["evaluate", str(place / "gt"), str(place / "pred"), "-np", "1", "--disable_progress_bar", *arguments])


def refusal(capsys, place, *arguments):
    """The one line on stderr of a call that is refused."""
    assert evaluate(place, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def rows(output):
    """The cells of every line of the table, by the first one."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in output.splitlines()
        if line[:2] == "| " and "---" not in line
    ]
    return {cells[0]: dict(zip(lines[0], cells, strict=True)) for cells in lines}


def test_table_and_file(place, capsys):
    """Beside the predictions as nnU-Net has it; means and tolerance per class, and in how many cases it is not there."""
    assert evaluate(place, "--tolerance", "2", "tumour=0.5", "--hd95") == 0
    said = capsys.readouterr().out
    summary = json.loads((place / "pred" / "summary.json").read_text())
    table = rows(said)
    assert list(table) == ["class", "1 liver", "2 tumour", "3 vessel", "mean"]
    for key, name in (("1", "1 liver"), ("2", "2 tumour")):
        for metric, digits in (("Dice", 4), ("NSD", 4), ("HD95", 2)):
            cell = table[name][f"{metric} mm" if metric == "HD95" else metric]
            assert cell == f"{summary['mean'][key][metric]:.{digits}f}"
    assert [table[name]["at mm"] for name in ("1 liver", "2 tumour")] == ["2", "0.5"]
    absences = ("absent in", "missed in", "made up in")
    assert [table["2 tumour"][column] for column in absences] == ["0", "1", "0"]
    assert [table["3 vessel"][column] for column in absences] == ["2", "0", "1"]
    assert table["3 vessel"]["HD95 mm"] == "-"
    assert "left out of the means" in said
    assert said.splitlines()[-1] == str(place / "pred" / "summary.json")


def test_files_may_lie_elsewhere(place, capsys):
    """-djfile and -o as nnUNetv2_evaluate_folder has them; without --hd95 no such column; --chill."""
    (place / "pred" / "dataset.json").rename(place / "elsewhere.json")
    write(place / "gt" / "more.nii.gz", segmentation(5))
    more = ("-djfile", str(place / "elsewhere.json"), "-o", str(place / "mine.json"))
    assert "no prediction in" in refusal(capsys, place, *more)
    assert evaluate(place, *more, "--chill") == 0
    said = capsys.readouterr().out
    assert said.startswith("3 cases")
    assert "HD95 mm" not in said
    assert {"mean", "foreground_mean", "metric_per_case", "nnunet_norm"} == set(
        json.loads((place / "mine.json").read_text())
    )
    assert not (place / "pred" / "summary.json").exists()


def test_refusals_are_one_line(place, capsys):
    assert "-np 0 must be at least 1" in refusal(capsys, place, "-np", "0")
    assert "--tolerance 'liver=x'" in refusal(capsys, place, "--tolerance", "liver=x")
    assert "choose from liver, tumour, vessel" in refusal(capsys, place, "--tolerance", "spleen=2")
    assert "'out.txt' must end in .json" in refusal(capsys, place, "-o", "out.txt")
    assert "none.json cannot be read" in refusal(capsys, place, "-djfile", str(place / "none.json"))
    (place / "pred" / "dataset.json").write_text("{")
    assert "is not JSON" in refusal(capsys, place)
    (place / "pred" / "dataset.json").write_text("[]")
    assert "no description of plans or a dataset" in refusal(capsys, place)
    (place / "pred" / "dataset.json").write_text(json.dumps(dataset({"organ": 1})))
    assert "labels of dataset.json" in refusal(capsys, place)
    assert main(["evaluate", str(place / "gt"), str(place / "nowhere")]) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err


def test_only_a_summary_is_overwritten(place, capsys):
    """A file of another kind stays as it is, also where it is in the way by a slip of the hand; a summary is replaced."""
    described = (place / "pred" / "dataset.json").read_bytes()
    assert "dataset.json' is there and no summary" in refusal(capsys, place, "-o", str(place / "pred" / "dataset.json"))
    assert (place / "pred" / "dataset.json").read_bytes() == described
    (place / "notes.json").write_text("by hand")
    assert "would be overwritten; choose another file with -o" in refusal(
        capsys, place, "-o", str(place / "notes.json")
    )
    assert evaluate(place) == evaluate(place, "--tolerance", "2") == 0
    assert json.loads((place / "pred" / "summary.json").read_text())["nnunet_norm"]["tolerance"]["1"] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["2"], {"*": 2.0}),
        (["liver=3", "1.5"], {"liver": 3.0, "*": 1.5}),
        (["(1, 2)=3"], {"(1, 2)": 3.0}),
        (["a=b=3"], {"a=b": 3.0}),
    ],
)
def test_tolerance_is_one_for_all_or_by_class(words, expected):
    assert parse_tolerance(words) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["wide"], "'wide': give MM, or LABEL=MM"),
        (["liver="], "'liver=': give MM"),
        (["-1"], "'-1': give 0 mm or more"),
        (["liver=nan"], "'liver=nan': give 0 mm or more"),
        (["1", "2"], "'2': there is one for all already"),
        (["liver=1", "liver=2"], "'liver=2': there is one for liver already"),
    ],
)
def test_a_tolerance_that_says_nothing_is_refused(words, told):
    with pytest.raises(EvaluationError, match=told):
        parse_tolerance(words)
