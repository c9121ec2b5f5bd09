"""Statistics of other images, from a training to an ensemble: nnU-Net's own programs take every recalibrated model."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.integration

DATASET = "Dataset904_Recalibrated"
BRN, INSTANCE = "nnUNetTrainerBRN_1epochs", "nnUNetTrainerInstanceNorm_1epochs"
NUM_TRAINING, NUM_TEST = 5, 3
HERE = ("-device", "cpu", "-npp", 0)


@pytest.fixture(scope="module")
def images(workspace):
    """Small plans, a training with either norm, and test images of two experimental batches."""
    cases = workspace.add_hippocampus(DATASET, NUM_TRAINING, NUM_TEST)
    folder = workspace.root / "raw" / DATASET
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 904, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    workspace.run(
        *("nnunet-norm", "plan", "-d", 904, "-c", "3d_fullres", "--plans-name", "small", "--num-stages", 3),
        *("--base-features", 4, "--patch-size", 32, 32, 32),
        *("--iterations-per-epoch", 4, "--val-iterations-per-epoch", 1),
    )
    for trainer in (BRN, INSTANCE):
        workspace.train(904, "3d_fullres", 0, trainer, "small")
    test = [case[0] for case in cases[NUM_TRAINING:]]
    content = {"batches": dict(zip(test, ("one", "two", "one"), strict=True)), "controls": [test[0], test[1]]}
    (workspace.root / "batches.json").write_text(json.dumps(content))
    return folder / "imagesTs"


def probabilities(folder):
    return {path.stem: np.load(path)["probabilities"] for path in sorted(folder.glob("*.npz"))}


@pytest.fixture
def recalibrated(workspace, images, tmp_path):
    """Recalibrate a trainer's model, and predict by its new name with nnU-Net and on the fly: folder, name, predictions."""

    def run(trainer):
        model = ("-d", 904, "-c", "3d_fullres", "-p", "small", "-tr", trainer)
        said = workspace.run("nnunet-norm", "recalibrate", *model, "-i", images, *HERE).stdout
        assert "all norms in one pass over 3 images or slices" in said
        name = "nnUNetTrainer" if trainer == INSTANCE else trainer
        by_name = ("-d", 904, "-c", "3d_fullres", "-p", "small_recalibrated", "-tr", name)
        common = ("-i", images, "-f", 0, "--save_probabilities", "-device", "cpu", "-npp", 0, "-nps", 0)
        workspace.run("nnUNetv2_predict", *by_name, *common, "-o", tmp_path / "by_name")
        workspace.run("nnunet-norm", "predict", *by_name, *common, "-o", tmp_path / "halo")
        workspace.run("nnunet-norm", "predict", *model, *common, "--population", "batch", "-o", tmp_path / "on_the_fly")
        found = {place: probabilities(tmp_path / place) for place in ("by_name", "halo", "on_the_fly")}
        for case in found["halo"]:
            assert np.array_equal(found["halo"][case], found["on_the_fly"][case])
            assert np.abs(found["halo"][case] - found["by_name"][case]).mean() < 0.05
        return workspace.model(DATASET, name, "small_recalibrated", "3d_fullres"), found

    return run


def test_instance_norm_becomes_a_model_of_nnunets_own(recalibrated):
    """Found by its name, without this package's trainers; predicted on the fly the same, to the last bit."""
    new, _ = recalibrated(INSTANCE)
    assert json.loads((new / "nnunet_norm.json").read_text())["num_images"] == NUM_TEST


def test_nnunet_runs_and_ensembles_a_recalibrated_model(workspace, images, recalibrated, tmp_path):
    """By name and by folder the same, to the last bit, and so on the fly; the predictions are ensembled."""
    new, found = recalibrated(BRN)
    common = ("-i", images, "-f", 0, "--save_probabilities", "-device", "cpu", "-npp", 1, "-nps", 1)
    workspace.run("nnUNetv2_predict_from_modelfolder", "-m", new, *common, "-o", tmp_path / "by_folder")
    for case, expected in found["by_name"].items():
        assert np.array_equal(probabilities(tmp_path / "by_folder")[case], expected)
    record = json.loads((tmp_path / "on_the_fly" / "halo_prediction.json").read_text())
    assert {how["population_of"] for how in record.values()} == {"folder, 3 images"}
    workspace.run(
        "nnUNetv2_ensemble", "-i", tmp_path / "halo", tmp_path / "by_name", "-o", tmp_path / "ensemble", "-np", 1
    )
    assert len(list((tmp_path / "ensemble").glob("*.nii.gz"))) == NUM_TEST


def test_every_experimental_batch_on_the_fly_as_by_its_own_model(workspace, images, tmp_path):
    """Statistics of the controls; the second batch's case is predicted with its model as with the batch's statistics."""
    model = ("-d", 904, "-c", "3d_fullres", "-p", "small", "-tr", BRN)
    batches = ("--batches", workspace.root / "batches.json", "--controls")
    workspace.run("nnunet-norm", "recalibrate", *model, "-i", images, *batches, *HERE)
    names = [workspace.model(DATASET, BRN, f"small_recalibrated_{batch}", "3d_fullres") for batch in ("one", "two")]
    assert [json.loads((name / "nnunet_norm.json").read_text())["num_images"] for name in names] == [1, 1]
    common = ("-i", images, "-f", 0, "--save_probabilities", "-nps", 0, *HERE)
    workspace.run(
        "nnunet-norm", "predict", *model, *common, "--population", "batch", *batches, "-o", tmp_path / "on_the_fly"
    )
    workspace.run("nnunet-norm", "predict", "-m", names[1], *common, "-o", tmp_path / "two")
    record = json.loads((tmp_path / "on_the_fly" / "halo_prediction.json").read_text())
    (case,) = [name for name, how in record.items() if how["population_of"] == "experimental batch 'two', 1 control"]
    assert np.array_equal(probabilities(tmp_path / "on_the_fly")[case], probabilities(tmp_path / "two")[case])
