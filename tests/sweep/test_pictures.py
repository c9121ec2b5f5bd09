from dataclasses import replace

from nnunet_norm.evaluation import Options
from nnunet_norm.sweep.collecting import collect, compare_with_baseline
from nnunet_norm.sweep.pictures import curve_pictures, difference_pictures, score_pictures


def test_figures_of_an_unfinished_sweep_say_what_they_show(unfinished) -> None:
    """Enforces PNG files, and captions that name lines, panels and spread; a factor that does not vary has no figure."""
    found = unfinished.found
    pictures = [
        *difference_pictures(found, compare_with_baseline(found)),
        *score_pictures(found),
        *curve_pictures(found),
    ]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)
    assert [picture.title for picture in pictures] == [
        "Differences to the baseline",
        "Scores against batch size",
        "Curves: training loss by batch size",
        "Curves: pseudo Dice by batch size",
    ]
    differences, scores, losses, _ = (picture.caption for picture in pictures)
    assert "baseline (InstanceNorm, b2)" in differences
    assert "a line for every norm. Small points: single folds" in scores
    assert "a line for every batch size, a panel for every norm" in losses


def test_every_training_has_its_curve_once(pretended) -> None:
    """Enforces figures by batch and by patch where a sweep varies one at a time, and one for a single model."""
    sweep = pretended(
        "dataset: 4\nconfiguration: 3d_fullres\nrecipe: amos\nfolds: [0]\nfixed: {epochs: 2}\n"
        "axes: {norm: [BRN], setting: [p160, p288, b4, b16]}"
    )
    for run in sweep.grid().runs:
        sweep.train(run, epochs=2, moved=0.0)
    pictures = curve_pictures(collect(sweep.grid(), Options(), progress=False))
    assert [picture.title.removeprefix("Curves: ") for picture in pictures] == [
        f"{value} by {factor}" for value in ("training loss", "pseudo Dice") for factor in ("batch size", "patch size")
    ]
    (sweep.yaml).write_text("dataset: 4\nconfiguration: 3d_fullres\nfolds: [0]\naxes: {norm: [GN]}", encoding="utf-8")
    sweep.train(sweep.grid().runs[0], epochs=1, moved=0.0)
    pictures = curve_pictures(collect(sweep.grid(), Options(), progress=False))
    assert [picture.title for picture in pictures] == ["Curves: training loss", "Curves: pseudo Dice"]


def test_no_figure_is_empty(unfinished) -> None:
    """Enforces that a sweep of which nothing was trained has no figures, instead of empty ones."""
    found = unfinished.found
    nothing = tuple(replace(outcome, summary=None, epochs=()) for outcome in found.outcomes)
    empty = replace(found, outcomes=nothing)
    assert [
        *difference_pictures(empty, compare_with_baseline(empty)),
        *score_pictures(empty),
        *curve_pictures(empty),
    ] == []
