"""Ensembles beside nnU-Net's own commands, on hippocampus MRI: the same files, the same choice, and what they cannot do.

Nothing is trained. Validations are the references with noise, so that an ensemble is better than its members; the models that
predict have random weights.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

sys.path += [str(Path(__file__).parent.parent / name) for name in ("prediction", "ensembling")]
from predicted import write_descriptions
from trained_models import flat, write_trained

pytestmark = pytest.mark.integration

DATASET = "Dataset905_Ensembled"
LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}
FIRST, SECOND = "nnUNetTrainerBRN__small__3d_fullres", "nnUNetTrainerGN__small__3d_fullres"
OTHER = "nnUNetTrainer__flat__2d"


def described(folder):
    """The dataset.json and plans.json of a model, for this dataset."""
    plans = json.loads((folder / "plans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    _, plans_name, _ = folder.name.split("__")
    write_descriptions(
        folder, dataset | {"labels": LABELS}, plans | {"dataset_name": DATASET, "plans_name": plans_name}
    )
    return json.loads((folder / "plans.json").read_text())


def two_dimensional(folder):
    """Name the model's configuration 2d."""
    plans = described(folder)
    plans["configurations"]["2d"] = plans["configurations"].pop("3d_fullres")
    (folder / "plans.json").write_text(json.dumps(plans))
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.save(checkpoint | {"init_args": {"configuration": "2d"}}, path)


def validated(folder, fold, case, reference, quality):
    """Write what a fold predicted of a case: its reference, noise, and specks far from it."""
    labels, told = SimpleITKIO().read_seg(str(reference))
    truth = labels[0].astype(int)
    generator = np.random.default_rng([len(folder.name), fold, *map(ord, case)])
    noise = generator.random((3, *truth.shape), dtype=np.float32)
    values = noise + quality * np.eye(3, dtype=np.float32)[truth].transpose(3, 0, 1, 2)
    values[0] += 0.4
    values /= values.sum(0)
    validation = folder / f"fold_{fold}" / "validation"
    validation.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(validation / f"{case}.npz", probabilities=values)
    (validation / f"{case}.pkl").write_bytes(pickle.dumps(told | {"shape_before_cropping": truth.shape}))
    SimpleITKIO().write_seg(values.argmax(0), str(validation / f"{case}.nii.gz"), told)
    (validation / "summary.json").write_text("{}")


@pytest.fixture(scope="module")
def models(workspace):
    """The dataset, and three models of it: two that nnU-Net can compare, and one of other plans and dimensions."""
    cases = workspace.add_hippocampus(DATASET, 4, 2)
    preprocessed = workspace.root / "preprocessed" / DATASET
    shutil.copytree(workspace.root / "raw" / DATASET / "labelsTr", preprocessed / "gt_segmentations")
    results = workspace.root / "results" / DATASET
    results.mkdir(parents=True)
    folders = [
        write_trained(results / FIRST, "nnUNetTrainerBRN", folds=(0, 1)),
        write_trained(results / SECOND, "nnUNetTrainerGN", folds=(0, 1)),
        write_trained(results / OTHER, "nnUNetTrainerBRN", folds=(0,), change=flat),
    ]
    for folder, quality in zip(folders[:2], (0.5, 0.6), strict=True):
        described(folder)
        for number, (case, _, labels) in enumerate(cases[:4]):
            validated(folder, number % 2, case, labels, quality)
    two_dimensional(folders[2])
    shutil.copy(folders[0] / "plans.json", preprocessed / "small.json")
    return folders


def files(folder):
    """The files of a folder that hold voxels or probabilities."""
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def test_the_search_is_nnunets(workspace, models):
    """The same labels in the same folders, the same scores, choice and postprocessing, and commands that work on them."""
    workspace.run(
        *("nnUNetv2_find_best_configuration", 905, "-c", "3d_fullres", "-p", "small"),
        *("-tr", "nnUNetTrainerBRN", "nnUNetTrainerGN", "-f", 0, 1, "-np", 1),
    )
    results = workspace.root / "results" / DATASET
    theirs = json.loads((results / "inference_information.json").read_text())
    folders = {folder.name: folder / "crossval_results_folds_0_1" for folder in models[:2]}
    (pair,) = (results / "ensembles").iterdir()
    folders[pair.name] = pair
    kept = {name: shutil.move(folder, workspace.root / "theirs" / name) for name, folder in folders.items()}

    said = workspace.run(
        "nnunet-norm", "ensemble", "--find", "-d", 905, "-m", FIRST, SECOND, "-f", 0, 1, "-np", 1
    ).stdout
    ours = json.loads((results / "ensemble_results.json").read_text())
    scores = {
        Path(one["folder"]).name if len(one["models"]) > 1 else one["models"][0]: one for one in ours["candidates"]
    }
    assert {name: one["Dice"] for name, one in scores.items()} == theirs["all_results"]
    assert scores[pair.name]["Dice"] > max(scores[name]["Dice"] for name in (FIRST, SECOND))
    assert ours["best"] == [FIRST, SECOND]
    for name, folder in folders.items():
        assert len(files(folder)) == 4
        assert files(folder) == files(Path(kept[name]))
    assert theirs["best_model_or_ensemble"]["postprocessing_file"] == ours["postprocessing"]
    steps = [json.loads((folder / "postprocessing.json").read_text()) for folder in (pair, Path(kept[pair.name]))]
    assert steps[0]["postprocessing_kwargs"] == steps[1]["postprocessing_kwargs"]
    assert ours["postprocessing_steps"] == len(steps[1]["postprocessing_fns"]) > 0
    assert files(pair / "postprocessed") == files(Path(kept[pair.name]) / "postprocessed")
    assert ours["commands"][0] in said
    assert "nnUNetv2_apply_postprocessing -i OUTPUT_FOLDER" in said


def test_models_that_nnunet_cannot_average_in_one_go(workspace, models):
    """Other trainers, plans, dimensions and folds: what nnUNetv2_ensemble makes of their predictions, to the last voxel."""
    images, out = workspace.root / "raw" / DATASET / "imagesTs", workspace.root / "out"
    workspace.run(
        *("nnunet-norm", "ensemble", "-d", 905, "-m", FIRST, f"{OTHER}:0", "-f", 0, 1, "-i", images, "-o", out),
        *("-device", "cpu", "-npp", 0, "-nps", 0, "-np", 1, "--save_npz", "--keep_members"),
    )
    members = [out / "members" / name for name in (f"{FIRST}__fold_0_1", f"{OTHER}__fold_0")]
    theirs, again = workspace.root / "theirs" / "out", workspace.root / "again"
    workspace.run("nnUNetv2_ensemble", "-i", *members, "-o", theirs, "--save_npz", "-np", 1)
    workspace.run("nnunet-norm", "ensemble", "-i", *members, "-o", again, "--save_npz", "-np", 2)
    assert len(files(theirs)) == 2
    assert files(out) == files(again) == files(theirs)
    assert all(len(np.unique(SimpleITKIO().read_seg(str(path))[0])) > 1 for path in out.glob("*.nii.gz"))
    for path in theirs.glob("*.npz"):
        expected = np.load(path)["probabilities"]
        for folder in (out, again):
            np.testing.assert_array_equal(np.load(folder / path.name)["probabilities"], expected)
