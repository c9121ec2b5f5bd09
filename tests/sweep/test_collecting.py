import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnunet_norm.errors import EvaluationError, SweepError
from nnunet_norm.evaluation import Options
from nnunet_norm.sweep.collecting import CACHE, collect, compare_with_baseline
from nnunet_norm.sweep.outcomes import Spread
from nnunet_norm.sweep.pictures import difference_pictures
from nnunet_norm.sweep.report import models_table, point_rows, sentences
from nnunet_norm.sweep.tables import folds_table, number, points_table

ONE = "dataset: 4\nconfiguration: 3d_fullres\nfolds: [0]\naxes: {norm: [BRN]}\nfixed: {epochs: 2}"


def _dices(sweep, norm: str, batch: int, fold: int) -> np.ndarray:
    """Of every case and class, counted by NumPy."""
    (folder,) = (sweep.root / "results").glob(f"*/nnUNetTrainer{norm}_*_b{batch}__*/fold_{fold}/validation")
    rows = []
    for path in sorted(folder.glob("*.nii.gz")):
        ours, reference = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(where / path.name)))
            for where in (folder, sweep.preprocessed / "gt_segmentations")
        )
        both = [((ours == label) & (reference == label)).sum() for label in (1, 2)]
        rows.append([2 * n / ((ours == label).sum() + (reference == label).sum()) for label, n in enumerate(both, 1)])
    return np.array(rows)


def _point(found, norm: str, batch: int):
    return next(p for p in found.grid.points if p.values["norm"] == norm and p.values["batch_size"] == batch)


def test_scores_are_those_of_the_validation(unfinished) -> None:
    """Enforces Dice of every training as counted by NumPy: of a class the mean over cases, of all the mean over classes."""
    sweep, found, moved = unfinished
    assert len(found.done) == len(moved)
    for (norm, batch, fold), _ in moved.items():
        outcome = found.of(_point(found, norm, batch))[fold]
        expected = _dices(sweep, norm, batch, fold)
        assert outcome.num_cases == len(expected) == 2
        assert [outcome.score("Dice", label) for label in found.labels] == pytest.approx(expected.mean(0))
        assert outcome.score("Dice") == pytest.approx(expected.mean())
    baseline = [outcome.score("Dice") for outcome in found.of(found.grid.baseline)]
    spread = found.spread(found.grid.baseline, "Dice")
    assert (spread.mean, spread.deviation) == pytest.approx(
        (statistics.mean(baseline), abs(np.subtract(*baseline)) / 2**0.5)
    )
    assert dict(found.labels) == {1: "front", 2: "rear"}


def test_trainings_that_are_not_done_have_no_scores_but_curves(unfinished) -> None:
    """Enforces what an unfinished sweep has of a training that runs, and of one that has not begun."""
    found = unfinished.found
    runs, pending = found.of(_point(found, "BRN", 16))[0], found.of(_point(found, "BRN", 2))[0]
    assert (runs.missing, len(runs.epochs)) == ("checkpoint_final.pth", 2)
    assert (pending.missing, len(pending.epochs)) == ("checkpoint_final.pth", 0)
    assert math.isnan(runs.score("Dice"))
    assert math.isnan(pending.seconds)
    assert (runs.summary, runs.report, runs.num_cases) == (None, None, 0)


def test_the_baseline_is_compared_with_over_folds_that_both_have(unfinished) -> None:
    """Enforces the mean difference over the cases of common folds, and nothing where there is no such fold."""
    sweep, found, _ = unfinished
    compared = compare_with_baseline(found)
    assert found.grid.baseline.name not in compared
    base = [_dices(sweep, "InstanceNorm", 2, fold).mean(1) for fold in (0, 1)]
    both = compared[_point(found, "InstanceNorm", 16).name]["Dice"]
    expected = np.concatenate([_dices(sweep, "InstanceNorm", 16, fold).mean(1) - base[fold] for fold in (0, 1)])
    assert (both.mean, both.num_cases) == (pytest.approx(expected.mean()), 4)
    assert expected.min() <= both.low <= both.mean <= both.high <= expected.max()
    one = compared[_point(found, "BRN", 16).name]["Dice"]
    assert (one.mean, one.num_cases) == (pytest.approx((_dices(sweep, "BRN", 16, 1).mean(1) - base[1]).mean()), 2)
    assert compared[_point(found, "BRN", 2).name] == {"Dice": None, "NSD": None}


def test_what_was_evaluated_is_not_evaluated_again(pretended) -> None:
    """Enforces that a second report measures nothing, and that a prediction that changed is measured again."""
    sweep = pretended(ONE)
    (run,) = sweep.grid().runs
    sweep.finish(run, moved=0.5)
    first = collect(sweep.grid(), Options(), progress=False)
    cache = sweep.grid().folder / CACHE
    lines = cache.read_text(encoding="utf-8").count("\n")
    assert lines == 2
    again = collect(sweep.grid(), Options(), progress=False)
    assert cache.read_text(encoding="utf-8").count("\n") == lines
    assert again.done[0].summary == first.done[0].summary
    sweep.finish(run, moved=0.0)
    assert collect(sweep.grid(), Options(), progress=False).done[0].score("Dice") == 1


def test_a_case_that_two_folds_validate_stays_two(pretended) -> None:
    """Enforces that a model's case is compared with that of the baseline's same fold, where splits overlap."""
    text = ONE.replace("[0]", "[0, 1]").replace("[BRN]", "[BRN, GN]")
    sweep = pretended(text)
    sweep.cases = lambda fold: ["case_00", "case_01"]
    for run in sweep.grid().runs:
        sweep.finish(run, moved={("BRN", 0): 0.0, ("BRN", 1): 0.5}.get((run.point.values["norm"], run.fold), 0.0))
    found = collect(sweep.grid(), Options(), progress=False)
    compared = compare_with_baseline(found)[found.grid.points[1].name]["Dice"]
    differences = [
        one.score("Dice") - base.score("Dice")
        for one, base in zip(found.of(found.grid.points[1]), found.of(found.grid.baseline), strict=True)
    ]
    assert compared.num_cases == 4
    assert compared.mean == pytest.approx(statistics.mean(differences))


def test_fold_all_is_in_no_mean(pretended) -> None:
    """Enforces that scores of training cases stay out of spreads and differences, unless there are no others."""
    sweep = pretended(ONE.replace("[0]", "[0, all]").replace("[BRN]", "[BRN, GN]"))
    sweep.cases = lambda fold: ["case_00", "case_01"]
    for run in sweep.grid().runs:
        sweep.finish(run, moved={("BRN", 0): 0.4, ("GN", 0): 0.8}.get((run.point.values["norm"], run.fold), 0.0))
    found = collect(sweep.grid(), Options(), progress=False)
    other = found.grid.points[1]
    assert len(found.done) == 4
    assert [outcome.run.fold for outcome in found.of(other)] == [0, "all"]
    assert found.spread(other, "Dice") == Spread.of([found.of(other)[0].score("Dice")])
    assert compare_with_baseline(found)[other.name]["Dice"].num_cases == 2
    assert folds_table(found, "Dice").rows[1][1:] == (
        number("Dice", found.of(other)[0].score("Dice")),
        "1.0000",
        number("Dice", found.of(other)[0].score("Dice")),
    )
    assert "is in no mean and no difference" in folds_table(found, "Dice").caption
    sweep.yaml.write_text(sweep.yaml.read_text(encoding="utf-8").replace("[0, all]", "[all]"), encoding="utf-8")
    alone = collect(sweep.grid(), Options(), progress=False)
    assert alone.spread(other, "Dice") == Spread(1.0, math.nan, 1)
    assert "its scores say nothing about new images." in sentences(alone, compare_with_baseline(alone))[0]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"cut"), Path.unlink], ids=["damaged", "missing"])
def test_one_bad_prediction_is_no_reason_to_report_nothing(pretended, caplog, damage) -> None:
    """Enforces scores of all other trainings, a line that names the file, and all again once it is mended."""
    sweep = pretended(ONE.replace("[0]", "[0, 1]"))
    for run in sweep.grid().runs:
        folder = sweep.finish(run, moved=0.5)
    path = folder / "validation" / "case_11.nii.gz"
    whole = path.read_bytes()
    damage(path)
    with caplog.at_level("WARNING"):
        found = collect(sweep.grid(), Options(), progress=False)
    good, bad = found.outcomes
    assert (good.fault, good.num_cases) == (None, 2)
    assert (bad.missing, bad.summary) == (None, None)
    assert "case_11" in str(bad.fault)
    assert [record.getMessage() for record in caplog.records] == [f"{bad.run.name} cannot be evaluated: {bad.fault}"]
    assert "1 of 2 trainings are done" in sentences(found, {})[0]
    assert "1 more cannot be evaluated: the table of models says why" in sentences(found, {})[0]
    assert models_table(found).rows[0][-1] == f"fold 1: {bad.fault}"
    path.write_bytes(whole)
    assert len(collect(sweep.grid(), Options(), progress=False).done) == 2


def test_distances_say_which_way_is_better(pretended) -> None:
    """Enforces a comparison over the classes that both found, and captions that count the cases where one was left out."""
    sweep = pretended(ONE.replace("[BRN]", "[BRN, GN]"))
    for run in sweep.grid().runs:
        folder = sweep.finish(run, moved=0.5)
    missed = folder / "validation" / "case_00.nii.gz"
    image = sitk.ReadImage(str(missed))
    sitk.WriteImage(sitk.ChangeLabel(image, {2: 0}), str(missed))
    found = collect(sweep.grid(), Options(hd95=True), progress=False)
    compared = compare_with_baseline(found)
    comparison = compared[found.grid.points[1].name]["HD95"]
    assert (comparison.mean, comparison.num_cases, comparison.partial) == (0, 2, 1)
    caption = points_table(found, compared).caption
    assert (
        "HD95: smaller is better. It is compared over the classes that both models found; in up to 1 case others"
        in caption
    )
    (picture,) = difference_pictures(found, compared)
    assert picture.caption.endswith("HD95: smaller is better.")
    assert [row["HD95_difference_partial"] for row in point_rows(found, compared)] == [0, 1]


def test_refusals_name_the_file_or_the_class(pretended) -> None:
    """Enforces one line for a tolerance of no class, before anything is measured, and for a report that cannot be read."""
    sweep = pretended(ONE)
    (run,) = sweep.grid().runs
    with pytest.raises(EvaluationError, match="'liver': there is no such class; choose from front, rear"):
        collect(sweep.grid(), Options(tolerance={"liver": 1}), progress=False)
    folder = sweep.finish(run, moved=0.5) / "validation"
    (folder / "norm_report.json").write_text("{", encoding="utf-8")
    with pytest.raises(SweepError, match=r"norm_report.json cannot be read"):
        collect(sweep.grid(), Options(), progress=False)
