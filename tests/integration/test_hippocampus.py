"""The whole road on hippocampus MRI: from the raw dataset to an evaluated ensemble, through nnU-Net's own programs."""

import json
import sys
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everybody's name for it
import torch

pytestmark = pytest.mark.integration

DATASET = "Dataset004_Hippocampus"
BRN, GN = "nnUNetTrainerBRN_3epochs", "nnUNetTrainerGN_2epochs"
NUM_TRAINING, NUM_TEST = 10, 2


@pytest.fixture(scope="module")
def planned(workspace):
    """The dataset with nnU-Net's own plans, and small plans derived from them."""
    cases = workspace.add_hippocampus(DATASET, NUM_TRAINING, NUM_TEST)
    folder = workspace.root / "raw" / DATASET
    (folder / "labelsTs").mkdir()
    for name, _, labels in cases[NUM_TRAINING:]:
        (folder / "labelsTs" / f"{name}.nii.gz").write_bytes(labels.read_bytes())
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    workspace.run(
        *("nnunet-norm", "plan", "-d", 4, "-c", "3d_fullres", "--plans-name", "small", "--num-stages", 3),
        *("--base-features", 8, "--patch-size", 32, 32, 32, "--iterations-per-epoch", 10),
        *("--val-iterations-per-epoch", 2, "--initial-lr", 0.01, "--seed", 1),
    )
    return folder


@pytest.fixture(scope="module")
def trained(workspace, planned):
    """BRN and GN on two folds with probabilities; one BRN training was killed in its second epoch and continued."""
    workspace.train(4, "3d_fullres", 0, BRN, "small", "--npz")
    workspace.killed_while_training(
        "Epoch 1",
        *("nnUNetv2_train", 4, "3d_fullres", 1, "-tr", BRN, "-p", "small", "-device", "cpu", "--npz"),
    )
    workspace.train(4, "3d_fullres", 1, BRN, "small", "--npz", "--c")
    for fold in (0, 1):
        workspace.train(4, "3d_fullres", fold, GN, "small", "--npz")
    return {name: workspace.model(DATASET, name, "small", "3d_fullres") for name in (BRN, GN)}


@pytest.fixture(scope="module")
def predicted(workspace, trained, planned):
    """The test images by the halo predictor with both models, and by nnU-Net's own predictor with BRN."""
    where = {}
    for key, program, trainer, workers in (  # with workers once: each imports for seconds
        ("halo", ["nnunet-norm", "predict"], BRN, 1),
        ("gaussian", ["nnUNetv2_predict"], BRN, 0),
        ("gn", ["nnunet-norm", "predict"], GN, 0),
    ):
        where[key] = workspace.root / key
        workspace.run(
            *(*program, "-i", planned / "imagesTs", "-o", where[key], "-d", 4, "-c", "3d_fullres", "-p", "small"),
            *("-tr", trainer, "-f", 0, 1, "-device", "cpu", "--save_probabilities", "-npp", workers, "-nps", workers),
        )
    return where


def test_every_fold_ends_with_predictions_probabilities_and_a_report(trained):
    for model in trained.values():
        for fold in (0, 1):
            validation = model / f"fold_{fold}" / "validation"
            segmentations = sorted(p.name.removesuffix(".nii.gz") for p in validation.glob("*.nii.gz"))
            assert len(segmentations) == NUM_TRAINING // 5
            assert sorted(p.stem for p in validation.glob("*.npz")) == segmentations
            report = json.loads((validation / "norm_report.json").read_text())
            assert report["num_cases"] == len(segmentations)
            disparity = report["train_eval_disparity"]
            assert (disparity["num_batches"], disparity["batch_size"]) == (2, 2)
            assert not list(validation.glob(".*"))  # nothing half-written


def test_the_killed_training_was_continued_on_its_schedule(trained):
    fold = trained[BRN] / "fold_1"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 3
    assert checkpoint["network_weights"]["encoder.stages.0.0.convs.0.norm.num_batches_tracked"] == 30
    logging = checkpoint["logging"]
    assert len(logging["mean_train_eval_disparity"]) == len(logging["mean_fg_dice"]) == 3
    logs = sorted(fold.glob("training_log_*.txt"), key=lambda p: p.stat().st_mtime)
    assert len(logs) == 2
    continued = logs[-1].read_text()
    assert "Epoch 0" not in continued
    assert "BatchRenorm limits: r_max 1.000, d_max 0.000" in continued  # epoch 1, still in the warm-up of 12 iterations
    assert (
        "BatchRenorm limits: r_max 2.800, d_max 4.500" in continued
    )  # epoch 2 starts after 20: 9 of 10 steps up the ramp


def test_a_killed_training_ends_with_the_very_weights_and_statistics_of_one_that_was_not(workspace, planned):
    """FrozenBN, killed in its warm-up: re-estimated statistics, learning rates and optimizer are the same to the last bit."""
    trainer = "nnUNetTrainerFrozenBN_3epochs"
    for name in ("straight", "killed"):
        workspace.run(
            *("nnunet-norm", "plan", "-d", 4, "-c", "3d_fullres", "-p", "small", "--plans-name", name),
            *("--iterations-per-epoch", 4, "--population-samples", 6, "--frozen-share", 0.5),
        )
    workspace.train(4, "3d_fullres", 0, trainer, "straight")
    workspace.killed_while_training(
        "are frozen from epoch 1 on",
        *("nnUNetv2_train", 4, "3d_fullres", 0, "-tr", trainer, "-p", "killed", "-device", "cpu"),
    )
    workspace.train(4, "3d_fullres", 0, trainer, "killed", "--c")
    straight, killed = (
        torch.load(
            workspace.model(DATASET, trainer, name, "3d_fullres") / "fold_0" / "checkpoint_final.pth",
            weights_only=False,
        )
        for name in ("straight", "killed")
    )
    assert all(torch.equal(killed["network_weights"][k], v) for k, v in straight["network_weights"].items())
    for mine, theirs in zip(*(c["optimizer_state"]["state"].values() for c in (killed, straight)), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    assert killed["logging"]["lrs"] == straight["logging"]["lrs"]


def test_the_halo_predictor_says_what_it_did(predicted, planned):
    for key, population in (("halo", "stored"), ("gn", "image")):
        (file,) = predicted[key].glob("halo_prediction*.json")
        record = json.loads(file.read_text())
        assert set(record) == {image.name.removesuffix("_0000.nii.gz") for image in (planned / "imagesTs").iterdir()}
        for plan in record.values():
            assert (plan["plan"], plan["population"], plan["exact"]) == ("stages", population, True)


def test_predictions_have_the_geometry_of_their_images(predicted, planned):
    for folder in predicted.values():
        for image in (planned / "imagesTs").iterdir():
            expected = sitk.ReadImage(str(image))
            found = sitk.ReadImage(str(folder / image.name.replace("_0000", "")))
            assert found.GetSize() == expected.GetSize()
            np.testing.assert_allclose(found.GetSpacing(), expected.GetSpacing())


def test_nnunets_predictor_takes_the_same_model_and_says_nearly_the_same(predicted):
    """One network, two predictors: the images are smaller than two tiles, so they differ at padded borders only."""
    for path in predicted["halo"].glob("*.npz"):
        mine = np.load(path)["probabilities"]
        theirs = np.load(predicted["gaussian"] / path.name)["probabilities"]
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).mean() < 0.05


def test_the_ensemble_of_two_predictors_and_norms_is_evaluated_by_nnunet(workspace, predicted, planned):
    output = workspace.root / "ensemble"
    workspace.run("nnUNetv2_ensemble", "-i", predicted["halo"], predicted["gn"], "-o", output, "-np", 1)
    assert len(list(output.glob("*.nii.gz"))) == NUM_TEST
    for path in output.glob("*.nii.gz"):
        name = path.name.replace(".nii.gz", ".npz")
        mean = np.mean([np.load(predicted[key] / name)["probabilities"] for key in ("halo", "gn")], 0)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), mean.argmax(0))
    workspace.run(
        *("nnUNetv2_evaluate_folder", planned / "labelsTs", output, "-djfile", output / "dataset.json"),
        *("-pfile", predicted["halo"] / "plans.json", "-np", 1),
    )
    summary = json.loads((output / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == NUM_TEST


def test_find_best_configuration_compares_the_trainers(workspace, trained):
    output = workspace.run(
        *(
            "nnUNetv2_find_best_configuration",
            4,
            "-c",
            "3d_fullres",
            "-p",
            "small",
            "-tr",
            BRN,
            GN,
            "-f",
            0,
            1,
            "-np",
            1,
        )
    ).stdout
    for trainer in (BRN, GN):
        assert f"{trainer}__small__3d_fullres: 0." in output
    assert "nnUNetv2_predict" in output


def test_a_finished_training_is_validated_again(workspace, trained):
    report = trained[BRN] / "fold_0" / "validation" / "norm_report.json"
    before = json.loads(report.read_text())
    report.unlink()
    workspace.train(4, "3d_fullres", 0, BRN, "small", "--val")
    after = json.loads(report.read_text())
    assert after == before


def test_a_model_travels_as_nnunets_zip_file(workspace, trained, predicted, planned, tmp_path):
    archive = tmp_path / "model.zip"
    workspace.run(
        *("nnUNetv2_export_model_to_zip", "-d", 4, "-o", archive, "-c", "3d_fullres", "-tr", BRN, "-p", "small"),
        *("-f", 0, 1),
    )
    with zipfile.ZipFile(archive) as file:
        assert f"{DATASET}/{BRN}__small__3d_fullres/fold_1/checkpoint_final.pth" in file.namelist()
    elsewhere = tmp_path / "results"
    elsewhere.mkdir()
    workspace.run("nnUNetv2_install_pretrained_model_from_zip", archive, nnUNet_results=str(elsewhere))
    workspace.run(
        *("nnunet-norm", "predict", "-i", planned / "imagesTs", "-o", tmp_path / "out", "-d", 4, "-c", "3d_fullres"),
        *("-p", "small", "-tr", BRN, "-f", 0, 1, "-device", "cpu", "-npp", 0, "-nps", 0),
        nnUNet_results=str(elsewhere),
    )
    for path in predicted["halo"].glob("*.nii.gz"):
        mine = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / path.name)))
        np.testing.assert_array_equal(mine, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def test_pretrained_weights_of_gn_start_a_training_with_brn(workspace, trained, tmp_path):
    weights = tmp_path / "gn.pth"
    workspace.run(
        *("nnunet-norm", "export", "--pretrained", "-d", 4, "-c", "3d_fullres", "-tr", GN, "-p", "small", "-f", 0),
        *("-o", weights),
    )
    trainer = "nnUNetTrainerBRN_1epochs"
    workspace.train(4, "3d_fullres", 0, trainer, "small", "-pretrained_weights", weights)
    fold = workspace.model(DATASET, trainer, "small", "3d_fullres") / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["network_weights"]["encoder.stages.0.0.convs.0.norm.num_batches_tracked"] == 10


def test_an_exported_model_predicts_the_same_where_this_package_is_not(
    workspace, trained, predicted, planned, tmp_path
):
    said = workspace.run(
        *("nnunet-norm", "export", "-d", 4, "-c", "3d_fullres", "-tr", BRN, "-p", "small", "--plans-name", "small_BRN")
    ).stdout
    assert "nnUNetv2_predict -d Dataset004_Hippocampus -c 3d_fullres -p small_BRN -f 0 1" in said
    code = (
        "import sys; sys.modules['nnunet_norm'] = None; "
        "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    )
    workspace.run(
        *(sys.executable, "-W", "ignore", "-c", code, "-i", planned / "imagesTs", "-o", tmp_path / "out", "-d", 4),
        *("-c", "3d_fullres", "-p", "small_BRN", "-f", 0, 1, "-device", "cpu", "--save_probabilities"),
        *("-npp", 0, "-nps", 0),
        nnUNet_extTrainer="",
    )
    archive = tmp_path / "model.zip"
    workspace.run(
        *("nnUNetv2_export_model_to_zip", "-d", 4, "-o", archive, "-c", "3d_fullres", "-p", "small_BRN", "-f", 0, 1)
    )
    assert zipfile.is_zipfile(archive)
    paths = sorted(predicted["gaussian"].glob("*.npz"))
    assert len(paths) == NUM_TEST
    for path in paths:
        mine, theirs = (np.load(folder / path.name)["probabilities"] for folder in (tmp_path / "out", path.parent))
        assert np.array_equal(mine, theirs)
        mine, theirs = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{path.stem}.nii.gz")))
            for folder in (tmp_path / "out", path.parent)
        )
        assert np.array_equal(mine, theirs)
