import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.evaluation import accumulate_cv_results
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from predicted import DATASET, read, write_crossvalidation, write_folder, write_references

from nnunet_norm.ensembling import Model, Search, crossvalidation, instructions_of, search, table_of, write_findings
from nnunet_norm.ensembling.instructions import commands_of
from nnunet_norm.ensembling.models import postprocessing_of_ensemble
from nnunet_norm.errors import EnsembleError, SetupError
from nnunet_norm.evaluation import Options

KEEP_LARGEST = remove_all_but_largest_component_from_segmentation
FOLDS = {0: ("a", "b"), 1: ("c",)}
CASES = ("a", "b", "c")
NAMES = ("nnUNetTrainerBRN__p__3d_fullres", "nnUNetTrainer__q__2d", "nnUNetTrainerGN__p__3d_fullres")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Three models: a bad one, and two good ones with independent errors, of which the second is the better."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setattr(accumulate_cv_results, name, str(tmp_path / name.removeprefix("nnUNet_")))
    write_references(tmp_path, CASES)
    folders = [
        write_crossvalidation(tmp_path, name, FOLDS, quality, seed=i)
        for i, (name, quality) in enumerate(zip(NAMES, (0.05, 0.35, 0.3), strict=True))
    ]
    return [Model(folder, (0, 1)) for folder in folders]


@pytest.fixture(autouse=True)
def determined(monkeypatch):
    """Calls of nnU-Net's determine_postprocessing, whose pools of processes take long; it finds nothing here."""
    calls = []

    def determine(folder, reference, *rest, **options):
        calls.append(folder)
        os.mkdir(f"{folder}/postprocessed")
        with open(f"{folder}/postprocessing.pkl", "wb") as file:
            pickle.dump(([], []), file)

    monkeypatch.setattr(search, "determine_postprocessing", determine)
    return calls


def find(models, **options):
    return Search(progress=False, **options).run(models)


def dice_of(labels, root):
    """Mean over classes of the mean over cases, counted here."""
    scores = []
    for label in (1, 2):
        of = []
        for case in CASES:
            truth = read(root / "preprocessed" / DATASET / "gt_segmentations" / f"{case}.nii.gz") == label
            mine = labels(case) == label
            of.append(2 * (truth & mine).sum() / (truth.sum() + mine.sum()))
        scores.append(np.mean(of))
    return np.mean(scores)


def test_models_and_pairs_are_scored_on_all_folds(models, tmp_path):
    """By Dice as it is counted here; a pair by the labels of the averaged probabilities. The best is chosen."""
    found = find(models)
    assert [len(one.models) for one in found.candidates] == [1, 1, 1, 2, 2, 2]

    def probabilities(model, case):
        (path,) = model.folder.glob(f"fold_*/validation/{case}.npz")
        return np.load(path)["probabilities"]

    for one in found.candidates:
        labels = lambda case, of=one.models: sum(probabilities(model, case) for model in of).argmax(0)  # noqa: E731
        assert one.score("Dice") == pytest.approx(dice_of(labels, tmp_path), abs=1e-12)
    assert found.best.models == (models[1], models[2])
    assert found.best.score("Dice") > max(one.score("Dice") for one in found.candidates if one is not found.best)
    assert found.best.folder.name == f"ensemble___{NAMES[1]}___{NAMES[2]}___0_1"
    assert found.best.folder.parent == tmp_path / "results" / DATASET / "ensembles"


def test_summaries_are_nnunets_with_more(models):
    """What nnU-Net's function counts, to the last bit, and the surface Dice; where nnU-Net's commands look for it."""
    found = find(models[:2], options=Options(tolerance=2.0))
    for one in found.candidates:
        summary = json.loads((one.folder / "summary.json").read_text())
        assert [case["prediction_file"].rsplit("/")[-1] for case in summary["metric_per_case"]] == [
            f"{c}.nii.gz" for c in CASES
        ]
        for case in summary["metric_per_case"]:
            counted = compute_metrics(case["reference_file"], case["prediction_file"], SimpleITKIO(), [1, 2])["metrics"]
            for label, metrics in counted.items():
                assert {name: case["metrics"][str(label)][name] for name in metrics} == metrics
            assert 0 <= case["metrics"]["1"]["NSD"] <= 1
        assert {path.name for path in one.folder.glob("*.json")} >= {"plans.json", "dataset.json", "summary.json"}


def test_what_was_done_is_not_done_again(models, monkeypatch, determined):
    """A second search copies, averages and measures nothing; after a fold has predicted anew, what depends on it is made."""
    first = find(models[:2])
    assert len(determined) == 1
    monkeypatch.setattr(accumulate_cv_results, "accumulate_cv_results", None)
    stamps = {path: path.stat().st_mtime_ns for one in first.candidates for path in one.folder.glob("*.nii.gz")}
    second = find(models[:2])
    assert [one.summary for one in second.candidates] == [one.summary for one in first.candidates]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(determined) == 1


def test_a_fold_that_predicted_anew_is_taken_in(models, tmp_path):
    """Its cases are joined and averaged again, and cases of an older split do not count."""
    before = find(models[:2])
    write_folder(before.candidates[2].folder, 5, cases=("old",))
    shutil.copy(before.candidates[0].folder / "a.nii.gz", before.candidates[0].folder / "old.nii.gz")
    write_crossvalidation(tmp_path, NAMES[0], {1: ("c",)}, 3.0, seed=9)
    after = find(models[:2])
    for number in (0, 2):
        assert after.candidates[number].score("Dice") > before.candidates[number].score("Dice")
        assert not (after.candidates[number].folder / "old.nii.gz").exists()
    assert after.candidates[1].summary == before.candidates[1].summary


def _determined(folder):
    """What nnU-Net's commands leave of a postprocessing."""
    (folder / "postprocessed").mkdir()
    files = [folder / "postprocessing.pkl", folder / "postprocessing.json", folder / "postprocessed" / "a.nii.gz"]
    for path in files:
        path.write_bytes(pickle.dumps(([], [])))
    return files


def test_a_models_own_postprocessing_stays_while_its_predictions_do(models, tmp_path, monkeypatch):
    """Also where nnU-Net or a copy has joined the folds; once a fold predicts otherwise it is that of another model."""
    monkeypatch.setattr(accumulate_cv_results, "compute_metrics_on_folder", lambda *args: None)  # slow
    files = []
    for number, model in enumerate(models[:2]):
        joined = model.folder / "crossval_results_folds_0_1"
        if number == 0:  # by nnU-Net
            accumulate_cv_results.accumulate_cv_results(str(model.folder), str(joined), [0, 1], 1)
        else:  # by an earlier search, then moved
            find([model])
            shutil.rmtree(joined / "postprocessed")
            (joined / "made_from.json").unlink()
        files += _determined(joined)
    stamps = {path: path.stat().st_mtime_ns for path in files}
    find(models, metric="NSD")
    assert {path: path.stat().st_mtime_ns for path in files} == stamps
    assert models[0].postprocessing().path == files[0]
    write_crossvalidation(tmp_path, NAMES[0], {1: ("c",)}, 3.0, seed=9)
    with pytest.raises(EnsembleError, match=r"postprocessing\.pkl was determined before .*c\.nii\.gz was written anew"):
        models[0].postprocessing()
    find(models)
    assert [path.exists() for path in files] == [False] * 3 + [True] * 3
    assert not list(models[0].folder.glob(".*"))


def test_a_pair_that_was_once_the_best_loses_its_postprocessing(models, tmp_path):
    """After a member was trained anew, before and after the next search, of which another may be the best."""
    pair = find(models).best
    assert postprocessing_of_ensemble(pair.models).path.parent == pair.folder
    write_crossvalidation(tmp_path, NAMES[2], FOLDS, 20.0, seed=9)
    with pytest.raises(EnsembleError, match=r"was determined before .*fold_0/validation/a\.npz was written anew"):
        postprocessing_of_ensemble(pair.models)
    assert find(models).best.models == (models[2],)
    with pytest.raises(EnsembleError, match="was written anew: search again with nnunet-norm ensemble --find, or name"):
        postprocessing_of_ensemble(pair.models)


def test_probabilities_of_an_earlier_training_are_refused(models):
    """They lie beside the labels of the new one if it was validated without --npz."""
    validation = models[1].folder / "fold_1" / "validation"
    checkpoint = validation.parent / "checkpoint_final.pth"
    checkpoint.touch()
    for path in validation.iterdir():
        os.utime(path, ns=(checkpoint.stat().st_mtime_ns,) * 2)
    find(models[:2])
    os.utime(validation / "c.npz", ns=(checkpoint.stat().st_mtime_ns - 1,) * 2)
    with pytest.raises(
        EnsembleError,
        match=r"only probabilities of an earlier training of 1 validation cases \(c\), whose \.npz are older",
    ):
        find(models[:2])
    assert len(find(models[:2], num_candidates=1).candidates) == 2


def test_pairs_whose_folder_cannot_have_its_name_are_refused_first(models, tmp_path):
    """Both are named, before anything is computed; without pairs they can be compared."""
    long = [f"nnUNetTrainer{kind}__{'p' * 100}__3d_fullres" for kind in ("BRN", "GN")]
    longer = [Model(write_crossvalidation(tmp_path, name, FOLDS, 1.0), (0, 1)) for name in long]
    with pytest.raises(EnsembleError, match=rf"pair {long[0]} and {long[1]} would have a name of 2\d\d bytes.*255"):
        find([models[0], *longer])
    assert not list(tmp_path.glob("results/*/*/crossval*"))
    assert len(find(longer, num_candidates=1).candidates) == 2


def test_pairs_of_the_best_models_only(models):
    """--candidates leaves out pairs with others, and with 1 all of them; then probabilities are not needed."""
    assert [one.name for one in find(models, num_candidates=2).candidates[3:]] == [f"{NAMES[1]} + {NAMES[2]}"]
    for path in models[0].folder.glob("fold_*/validation/*.npz"):
        path.unlink()
    assert len(find(models, num_candidates=2).candidates) == 4
    assert len(find(models, num_candidates=1).candidates) == 3
    with pytest.raises(EnsembleError, match="has no probabilities of 3 validation cases"):
        find(models)


def test_the_table_and_the_commands_name_the_best(models, tmp_path):
    """In the printed text and in the files; a program finds the same in the JSON."""
    found = find(models, options=Options(tolerance=1.5))
    table, text = table_of(found), instructions_of(found)
    best = f"{NAMES[1]} + {NAMES[2]}"
    assert table.splitlines()[2].endswith(f"| {best.ljust(max(len(one.name) for one in found.candidates))} |")
    assert f"{found.best.score('Dice'):.4f}*" in table
    assert "3 cases; NSD at 1.5 mm" in table
    assert f"nnunet-norm ensemble -d {DATASET} -m {NAMES[1]} {NAMES[2]} -f 0 1 -i INPUT_FOLDER -o OUTPUT_FOLDER" in text
    assert "there is none to apply" in text
    written, results = write_findings(found, tmp_path / "found")
    assert written.read_text().startswith(table)
    content = json.loads(results.read_text())
    assert content["best"] == [NAMES[1], NAMES[2]]
    assert content["candidates"][0]["Dice"] == found.candidates[0].score("Dice")
    single = find(models, num_candidates=1)
    wanted = f"nnunet-norm predict -d {DATASET} -i INPUT_FOLDER -o OUTPUT_FOLDER -f 0 1 -tr nnUNetTrainer -c 2d -p q"
    assert wanted in instructions_of(single)


@pytest.mark.parametrize("inherited", [False, True])
def test_a_cascade_is_predicted_by_itself(models, inherited):
    """Its second stage needs the predictions of the first, so that a pair with it is averaged from folders."""
    path = models[1].folder / "plans.json"
    plans = json.loads(path.read_text())
    second = {"previous_stage": "3d_lowres"}
    plans["configurations"] |= {"base": second, "2d": {"inherits_from": "base"}} if inherited else {"2d": second}
    path.write_text(json.dumps(plans))
    found = find(models)
    before, first, other, average = instructions_of(found).splitlines()[1:5]
    assert before.endswith("-o OUTPUT_FOLDER_MODEL_1_PREV_STAGE -f 0 1 -tr nnUNetTrainer -c 3d_lowres -p q")
    assert first.endswith(
        "-o OUTPUT_FOLDER_MODEL_1 -f 0 1 -tr nnUNetTrainer -c 2d -p q "
        "-prev_stage_predictions OUTPUT_FOLDER_MODEL_1_PREV_STAGE --save_probabilities"
    )
    assert other.endswith("-o OUTPUT_FOLDER_MODEL_2 -f 0 1 -tr nnUNetTrainerGN -c 3d_fullres -p p --save_probabilities")
    assert average == "nnunet-norm ensemble -i OUTPUT_FOLDER_MODEL_1 OUTPUT_FOLDER_MODEL_2 -o OUTPUT_FOLDER"
    alone = commands_of(found.candidates[1])
    assert [line.split(" -p q")[1] for line in alone] == ["", " -prev_stage_predictions OUTPUT_FOLDER_PREV_STAGE"]


def test_postprocessing_that_helps_is_told(models, determined, monkeypatch):
    """With the command of nnU-Net that applies it, and the flag that does so in one go."""
    keep = ([KEEP_LARGEST], [{"labels_or_regions": 1}])

    def determine(folder, *rest, **options):
        os.mkdir(f"{folder}/postprocessed")
        Path(folder, "postprocessing.pkl").write_bytes(pickle.dumps(keep))

    monkeypatch.setattr(search, "determine_postprocessing", determine)
    found = find(models)
    text = instructions_of(found)
    assert "nnU-Net's postprocessing (1 step) raises its Dice here:" in text
    assert (
        f"-pp_pkl_file {found.best.folder / 'postprocessing.pkl'} -plans_json {found.best.folder / 'plans.json'}"
        in text
    )
    assert "--postprocessing after" in text
    assert postprocessing_of_ensemble(found.best.models) == found.postprocessing


def test_the_other_metric_can_choose(models):
    """The best by NSD is the one with the highest; where it differs from the best by Dice, both are told."""
    found = find(models, metric="NSD")
    assert found.best.score("NSD") == max(one.score("NSD") for one in found.candidates)
    assert instructions_of(found).startswith(f"Best by NSD ({found.best.score('NSD'):.4f})")


def _no_fold(models):
    shutil.rmtree(models[1].folder / "fold_1")


def _not_validated(models):
    (models[1].folder / "fold_1" / "validation" / "summary.json").unlink()


def _no_case(models):
    (models[1].folder / "fold_0" / "validation" / "b.nii.gz").unlink()


def _no_npz(models):
    (models[1].folder / "fold_1" / "validation" / "c.npz").unlink()


def _twice(models):
    for end in (".nii.gz", ".npz", ".pkl"):
        shutil.copy(
            models[1].folder / "fold_0/validation" / f"b{end}", models[1].folder / "fold_1/validation" / f"b{end}"
        )


def _no_model(models):
    shutil.rmtree(models[1].folder)


def _other_dataset(models):
    path = models[1].folder / "plans.json"
    path.write_text(path.read_text().replace(DATASET, "Dataset902_Other"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_no_fold, rf"fold 1 of model {NAMES[1]} is not trained and validated \(folds that are: 0\)"),
        (_not_validated, rf"fold 1 of model {NAMES[1]} is not trained and validated \(folds that are: 0\)"),
        (_no_case, rf"model {NAMES[1]} has not predicted 1 of 3 cases that others have \(b\)"),
        (_no_npz, rf"cases \(c\): make them with nnunet-norm train {DATASET} 2d 1 -tr nnUNetTrainer -p q --val --npz$"),
        (_twice, rf"model {NAMES[1]}: folds 0 and 1 have both predicted case 'b'"),
        (_no_model, rf"model {NAMES[1]} is not in .*{DATASET}: train it, or leave it out"),
        (_other_dataset, rf"models of different datasets: {NAMES[1]} is of Dataset902_Other, {NAMES[0]} of {DATASET}"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_computed(models, change, what):
    """In one line, with the command that helps where there is one."""
    change(models)
    with pytest.raises(EnsembleError, match=what):
        find(models[:2])
    assert not list(models[0].folder.glob("crossval*"))


def test_folds_and_folders_that_cannot_be_searched(models, monkeypatch):
    """Fold all has no cross-validation; nnU-Net's folders have to be set."""
    with pytest.raises(EnsembleError, match=r"fold all of model .* has seen every case"):
        find([Model(models[0].folder, ("all",))])
    with pytest.raises(EnsembleError, match="is given twice"):
        find([models[0], models[0]])
    with pytest.raises(EnsembleError, match=f"{NAMES[1]} is given with 1, {NAMES[0]} with 0, 1: give them all with -f"):
        find([models[0], Model(models[1].folder, (1,))])
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(SetupError, match="nnUNet_raw is not set"):
        find(models[:1])


def test_an_interrupted_evaluation_goes_on(models, monkeypatch):
    """Files that were joined stay joined, and cases that were measured are not measured again."""
    evaluate = search.evaluate_folder
    monkeypatch.setattr(search, "evaluate_folder", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find(models[:1])
    stamps = [path.stat().st_mtime_ns for path in sorted(models[0].folder.glob("crossval*/*.nii.gz"))]
    monkeypatch.setattr(search, "evaluate_folder", evaluate)
    find(models[:1])
    assert [path.stat().st_mtime_ns for path in sorted(models[0].folder.glob("crossval*/*.nii.gz"))] == stamps
    assert crossvalidation.crossvalidation_of(models[0]).joined.is_dir()
