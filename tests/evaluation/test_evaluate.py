"""Folders of predictions against references: nnU-Net's own numbers to the last bit, and surfaces beside them."""

import json
import logging
import math
import multiprocessing.pool
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.evaluation import evaluate_predictions
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

sys.path.append(str(Path(__file__).parent))
from label_files import LABELS, SPACING, dataset, segmentation, three_cases, write, write_cases

from nnunet_norm.errors import EvaluationError, OutputError
from nnunet_norm.evaluation import SETTINGS, Options, Pair, evaluate_folder, evaluate_pairs, measuring
from nnunet_norm.metrics import hausdorff_distance_95, normalized_surface_dice

NNUNETS = {"Dice", "IoU", "FP", "TP", "FN", "TN", "n_pred", "n_ref"}


@pytest.fixture
def place(tmp_path):
    return three_cases(tmp_path)


def evaluated(place, description=None, **arguments):
    arguments = {"progress": False} | arguments
    return evaluate_folder(place / "gt", place / "pred", dataset_json=description or dataset(), **arguments)


def by_nnunet(place, monkeypatch, reader, classes, ignored=None, ending=".nii.gz"):
    """What nnU-Net's function for folders writes; its processes are threads here, which start at once."""
    context = SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
    monkeypatch.setattr(evaluate_predictions.multiprocessing, "get_context", lambda _: context)
    evaluate_predictions.compute_metrics_on_folder(
        str(place / "gt"), str(place / "pred"), str(place / "nnunet.json"), reader, ending, classes, ignored, 1
    )
    return json.loads((place / "nnunet.json").read_text())


def without_surfaces(content):
    """Only what nnU-Net has."""
    if isinstance(content, dict):
        return {key: without_surfaces(value) for key, value in content.items() if key not in {"NSD", "HD95", SETTINGS}}
    return [without_surfaces(value) for value in content] if isinstance(content, list) else content


def same(first, second):
    """Equal to the last bit, NaN included."""
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)


def test_summary_is_nnunets_with_surfaces_beside(place, monkeypatch):
    """Every number that nnU-Net writes for labels, NaN of absent classes too; the file is in its form."""
    summary = evaluated(place, options=Options(hd95=True), output_file=place / "ours.json")
    ours = json.loads((place / "ours.json").read_text())
    assert same(without_surfaces(ours), by_nnunet(place, monkeypatch, SimpleITKIO(), [1, 2, 3]))
    assert set(ours["mean"]["1"]) == NNUNETS | {"NSD", "HD95"}
    again = evaluate_predictions.load_summary_json(str(place / "ours.json"))
    assert list(again["mean"]) == list(summary["mean"]) == [1, 2, 3]
    assert same(again, summary)


def test_surfaces_are_measured_in_mm_of_the_files_spacing(place):
    """Per class and case what the metrics say of the masks, at the tolerance of the class."""
    summary = evaluated(place, options=Options({"liver": 0.5, "2": 3}, hd95=True))
    for entry in summary["metric_per_case"]:
        a, b = (SimpleITKIO().read_seg(entry[f"{what}_file"])[0][0] for what in ("reference", "prediction"))
        for label, tolerance in ((1, 0.5), (2, 3), (3, 1)):
            masks, found = (a == label, b == label, SPACING), entry["metrics"][label]
            assert found["NSD"] == pytest.approx(normalized_surface_dice(*masks, tolerance), nan_ok=True)
            assert found["HD95"] == pytest.approx(hausdorff_distance_95(*masks), nan_ok=True)
    assert summary[SETTINGS]["tolerance"] == {"1": 0.5, "2": 3, "3": 1}
    assert summary[SETTINGS]["unit"] == "mm"
    assert summary[SETTINGS]["classes"] == {"1": "liver", "2": "tumour", "3": "vessel"}


def test_absent_classes_are_left_out_of_the_means(place):
    """In neither: NaN, in no mean. In one alone: 0, which counts; and no distance."""
    summary = evaluated(place, options=Options(hd95=True))
    tumour, vessel = ([entry["metrics"][label] for entry in summary["metric_per_case"]] for label in (2, 3))
    assert [tumour[0][name] for name in ("Dice", "NSD")] == [0, 0]
    assert math.isnan(tumour[0]["HD95"])
    assert summary["mean"][2]["HD95"] == np.mean([tumour[1]["HD95"], tumour[2]["HD95"]])
    assert summary["mean"][2]["NSD"] == np.mean([case["NSD"] for case in tumour])
    assert [case["NSD"] for case in vessel if not math.isnan(case["NSD"])] == [0]
    assert summary["mean"][3]["NSD"] == 0
    assert math.isnan(summary["mean"][3]["HD95"])
    assert math.isnan(summary["foreground_mean"]["HD95"])  # as nnU-Net's mean over classes
    assert "left out" in summary[SETTINGS]["absent"]


def test_regions_and_ignored_voxels(tmp_path, monkeypatch):
    """Regions are the classes, with nnU-Net's keys; what the reference ignores counts for nothing, surfaces included."""
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    reference, prediction = segmentation(0, (0, 1, 2)), segmentation(1, (0, 1, 2))
    reference[:, 8:] = 3
    prediction[:, :8] = np.where(reference[:, :8] == 3, 0, reference[:, :8])
    write_cases(tmp_path, a=(reference, prediction), b=(reference, np.roll(prediction, 1, 2)))
    description = dataset(labels, regions_class_order=[1, 2])
    summary = evaluated(tmp_path, description, output_file=tmp_path / "ours.json")
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert same(without_surfaces(ours), by_nnunet(tmp_path, monkeypatch, SimpleITKIO(), [(1, 2), 2], 3))
    assert list(summary["mean"]) == [(1, 2), 2]
    assert ours[SETTINGS]["classes"] == {"(1, 2)": "whole", "2": "core"}
    assert [summary["metric_per_case"][0]["metrics"][one]["NSD"] for one in ((1, 2), 2)] == [1, 1]
    assert 0 < summary["metric_per_case"][1]["metrics"][2]["NSD"] < 1


def test_slices_without_spacing(tmp_path, monkeypatch):
    """PNG, which nnU-Net reads as one slice with a spacing of 999: measured in the plane, a voxel is 1 mm."""
    a, b = segmentation(0, shape=(20, 30)), segmentation(1, shape=(20, 30))
    for folder, array in (("gt", a), ("pred", b)):
        write(tmp_path / folder / "x.png", array)
    summary = evaluated(
        tmp_path, dataset({"background": 0, "one": 1, "two": 2}, ".png"), output_file=tmp_path / "o.json"
    )
    expected = by_nnunet(tmp_path, monkeypatch, NaturalImage2DIO(), [1, 2], ending=".png")
    assert same(without_surfaces(json.loads((tmp_path / "o.json").read_text())), expected)
    (entry,) = summary["metric_per_case"]
    assert entry["metrics"][1]["NSD"] == normalized_surface_dice(a == 1, b == 1, (1, 1), 1)


def test_processes_find_the_same(place, tmp_path):
    """Spawned processes; the order is that of the cases. Two of three are known, so that one process is enough."""
    alone = evaluated(place, cache_file=tmp_path / "cache.jsonl")
    lines = (tmp_path / "cache.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cache.jsonl").write_text(lines[0] + lines[2])
    assert same(evaluated(place, num_processes=2, cache_file=tmp_path / "cache.jsonl"), alone)


def counted(monkeypatch):
    """The cases that are measured from now on."""
    seen = []
    measure = measuring.Measuring.__call__

    def measured(self, pair):
        seen.append(pair.case)
        return measure(self, pair)

    monkeypatch.setattr(measuring.Measuring, "__call__", measured)
    return seen


def test_finished_cases_are_not_measured_again(place, monkeypatch, tmp_path):
    """By size and time of the files, by tolerance and metrics; several evaluations share a cache."""
    seen, cache = counted(monkeypatch), tmp_path / "cache.jsonl"
    first = evaluated(place, cache_file=cache)
    assert seen == ["case_0", "case_1", "case_2"]
    assert same(evaluated(place, cache_file=cache), first)
    assert len(seen) == 3
    write(place / "pred" / "case_1.nii.gz", segmentation(9))
    again = evaluated(place, cache_file=cache)
    assert seen[3:] == ["case_1"]
    assert again["mean"][1]["Dice"] != first["mean"][1]["Dice"]
    evaluated(place, cache_file=cache, options=Options(2.0))
    assert seen[4:] == ["case_0", "case_1", "case_2"]
    assert same(evaluated(place, cache_file=cache), again)
    evaluated(place, cache_file=cache, options=Options(hd95=True))
    assert len(seen) == 10


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_line_that_was_cut_off_costs_one_case(place, monkeypatch, tmp_path, damage):
    """Whoever was killed while writing; and the next line is not lost with it."""
    seen, cache = counted(monkeypatch), tmp_path / "cache.jsonl"
    expected = evaluated(place, cache_file=cache)
    lines = cache.read_text().splitlines(keepends=True)
    last = {"cut": lines[2][:-40], "other": "[1]\n\n{}\n"}[damage]
    cache.write_text("".join([*lines[:2], last]))
    assert same(evaluated(place, cache_file=cache), expected)
    assert same(evaluated(place, cache_file=cache), expected)
    assert seen[3:] == ["case_2"]


def test_interrupted_evaluation_goes_on_beside_its_output(place, monkeypatch, caplog):
    """Finished cases lie beside summary.json until that is whole; then nothing else is left."""
    seen = counted(monkeypatch)
    interrupting = measuring.Measuring.__call__

    def interrupted(self, pair):
        if pair.case == "case_2" and len(seen) == 2:
            raise KeyboardInterrupt
        return interrupting(self, pair)

    monkeypatch.setattr(measuring.Measuring, "__call__", interrupted)
    output = place / "pred" / "summary.json"
    with pytest.raises(KeyboardInterrupt):
        evaluated(place, output_file=output)
    assert not output.exists()
    monkeypatch.setattr(measuring.Measuring, "__call__", interrupting)
    with caplog.at_level(logging.INFO, logger="nnunet_norm"):
        evaluated(place, output_file=output)
    assert seen == ["case_0", "case_1", "case_2"]
    assert "2 of 3 cases were measured before" in caplog.text
    assert {path.name for path in (place / "pred").iterdir()} == {
        "dataset.json", "summary.json", *(f"case_{i}.nii.gz" for i in range(3)),
    }  # fmt: skip


def test_what_cannot_be_compared_is_named_and_nothing_else_is_lost(place, monkeypatch, tmp_path):
    """One line for all such cases; the others are kept."""
    seen, cache = counted(monkeypatch), tmp_path / "cache.jsonl"
    write(place / "pred" / "case_0.nii.gz", segmentation(0, shape=(7, 12, 13)))
    (place / "pred" / "case_1.nii.gz").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"case_0.*shape \(7, 12, 13\), the reference \(7, 12, 14\)") as refusal:
        evaluated(place, cache_file=cache)
    assert "case_1.nii.gz' cannot be read" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(EvaluationError):
        evaluated(place, cache_file=cache)
    assert seen == ["case_0", "case_1", "case_2", "case_0", "case_1"]


@pytest.mark.parametrize(
    ("file", "array", "spacing", "told"),
    [
        ("pred", segmentation(0, (0, 1, 7, 9)), SPACING, r"prediction .*values \(7, 9\) that are no label"),
        ("gt", segmentation(0, (0, 1, 8)), SPACING, r"reference .*values \(8\) that are no label"),
        ("pred", segmentation(0), (3.0, 1.0, 0.6), r"spacing \[3.0, 1.0, 0.6\d*\] mm, the reference \[3.0, 1.0, 0.5\]"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(place, file, array, spacing, told):
    write(place / file / "case_0.nii.gz", array, spacing)
    with pytest.raises(EvaluationError, match=told):
        evaluated(place)


def test_rounding_of_a_header_is_no_other_spacing(place):
    """Headers in single precision, or of another tool."""
    write(place / "pred" / "case_0.nii.gz", segmentation(0), (3.0, 1.00001, 0.5))
    assert len(evaluated(place)["metric_per_case"]) == 3


def test_a_reference_that_cannot_be_read_is_one_line(place, capfd):
    """nnU-Net finds its reader by reading the first file, and prints a traceback where that fails."""
    (place / "gt" / "case_0.nii.gz").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"gt/case_0.nii.gz' cannot be read"):
        evaluated(place)
    assert "Traceback" not in capfd.readouterr().err
    for case in ("case_1", "case_2"):
        (place / "gt" / f"{case}.nii.gz").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"none of nnU-Net's readers for '.nii.gz' .* or any other of 3"):
        evaluated(place)


def test_refusals_before_anything_is_measured(place, monkeypatch):
    seen = counted(monkeypatch)
    with pytest.raises(EvaluationError, match=r"'summary.txt' must end in .json"):
        evaluated(place, output_file="summary.txt")
    with pytest.raises(EvaluationError, match="no case to compare"):
        evaluate_pairs([], dataset_json=dataset())
    with pytest.raises(EvaluationError, match=r"tolerance of 'spleen'.* choose from liver, tumour, vessel"):
        evaluated(place, options=Options({"spleen": 1}))
    with pytest.raises(EvaluationError, match="no file_ending"):
        evaluated(place, {"labels": LABELS})
    with pytest.raises(OutputError, match=r"missing/\.summary\.json\.cases cannot be written"):
        evaluated(place, output_file=place / "missing" / "summary.json")
    assert not seen


def test_pairs_may_lie_anywhere(place):
    """The order is the caller's, and one case may be predicted twice, by two models."""
    pairs = [
        Pair("b", str(place / "gt" / "case_0.nii.gz"), str(place / "pred" / "case_0.nii.gz")),
        Pair("b", str(place / "gt" / "case_0.nii.gz"), str(place / "gt" / "case_0.nii.gz")),
    ]
    summary = evaluate_pairs(pairs, dataset_json=dataset(), progress=False)
    assert [entry["prediction_file"] for entry in summary["metric_per_case"]] == [pair.prediction for pair in pairs]
    assert [entry["metrics"][2]["Dice"] for entry in summary["metric_per_case"]] == [0, 1]
