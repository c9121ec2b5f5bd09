"""Trainers see images, or tiles, normalized by their quantiles: in training, in the final validation, and in prediction."""

import copy
import json
import logging
import os
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everybody's name for it
import torch

from nnunet_norm.errors import InputImageError
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.training.normalized_cases import StoredQuantiles


@pytest.fixture
def dataset(make_dataset):
    """One whose images are normalized by their z-score; a CT's window would leave nothing of this noise."""
    dataset = make_dataset()
    for configuration in dataset.stock["configurations"].values():
        if "normalization_schemes" in configuration:
            configuration["normalization_schemes"] = ["ZScoreNormalization"]
    return dataset


def initialized(dataset, kind, name="nnUNetTrainerBatchNorm_1epochs", **changes):
    dataset.plans(name=kind, input_normalization=kind, **changes)
    trainer = dataset.trainer(name, plans=kind)
    trainer.initialize()
    return trainer


def raw(trainer, case):
    return blosc2.open(os.path.join(trainer.preprocessed_dataset_folder, f"{case}.b2nd"), mode="r")[:]


def expected(image):
    found = image.astype(np.float64)
    for channel in found:
        low, high = np.quantile(channel, [0.01, 0.98])
        channel[...] = np.clip((channel - low) / (high - low), 0, 1)
    return found


def test_every_case_is_normalized_by_its_image(dataset, monkeypatch):
    """Enforces NumPy's result for whole cases and for the loaders' patches, labels as ever, and quantiles found once."""
    trainer = initialized(dataset, "image_quantile")
    datasets = trainer.get_tr_and_val_datasets()
    for data in datasets:
        for case in data.identifiers:
            image, labels, _, properties = data.load_case(case)
            np.testing.assert_allclose(image[:], expected(raw(trainer, case)), atol=1e-6)
            assert labels.shape == image.shape
            assert "class_locations" in properties
    _, loader = trainer.get_dataloaders()
    patches = next(loader)["data"]
    assert 0 <= patches.min() < patches.max() <= 1
    assert (patches != 0).any()
    monkeypatch.setattr("nnunet_norm.training.normalized_cases.quantiles_of", None)  # from now on nothing is measured
    again = initialized(dataset, "image_quantile").get_tr_and_val_datasets()
    for old, new in zip(datasets, again, strict=True):
        assert {case: new.known[case] for case in new.identifiers} == {
            case: old.known[case] for case in old.identifiers
        }


@pytest.mark.parametrize("kind", ["image_quantile", "tile_quantile"])
def test_outside_of_a_mask_is_what_it_is_in_inference(dataset, kind):
    """Enforces that nnU-Net's augmentation leaves the outside of a mask alone in normalized images, 0 as ever in z-scores."""
    for configuration in dataset.stock["configurations"].values():
        if "normalization_schemes" in configuration:
            configuration["use_mask_for_norm"] = [True]
    trainer = initialized(dataset, kind)
    masks = trainer.configuration_manager.use_mask_for_norm
    assert masks == [True]
    transforms = trainer.get_training_transforms(
        (16, 16, 16), (0.0, 0.0), None, (), do_dummy_2d_data_aug=False, use_mask_for_norm=masks
    )
    labels = torch.full((1, 16, 16, 16), -1, dtype=torch.int16)
    labels[:, 4:12] = 1
    found = transforms(image=torch.full((1, 16, 16, 16), 0.5), segmentation=labels)
    outside = found["image"][found["segmentation"] == 0]
    assert len(outside) > 0
    assert bool((outside == 0).all()) == (kind == "tile_quantile")


def test_processes_find_the_quantiles_that_the_first_one_lacks(dataset, monkeypatch):
    """Enforces that all have all of them, and the file too, though another process has already read some from it."""
    trainer = initialized(dataset, "image_quantile")
    cases = [f"case{number}" for number in range(5)]
    own, shared, barrier = threading.local(), {}, threading.Barrier(2)

    def gathered(value):
        shared[own.rank] = value
        barrier.wait()
        found = [copy.deepcopy(shared[rank]) for rank in range(2)]
        barrier.wait()
        return found

    def run(rank):
        own.rank = rank
        data = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
        data.known = dict.fromkeys(cases[1::2], ((7.0, 8.0),)) if rank else {}
        data.find_quantiles()
        return data.known

    processes = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: own.rank, get_world_size=lambda: 2)
    monkeypatch.setattr("nnunet_norm.training.normalized_cases.dist", processes)
    monkeypatch.setattr("nnunet_norm.training.normalized_cases.gathered", gathered)
    with ThreadPool(2) as pool:
        first, second = pool.map(run, range(2), chunksize=1)
    assert sorted(first) == cases
    assert first == second == StoredQuantiles(dataset.folder / "nnUNetPlans_3d_fullres", ".b2nd").read()


def test_cases_that_have_changed_are_measured_again(dataset, caplog):
    """Enforces that stored quantiles belong to the file that is there; a folder that cannot be written is no error."""
    trainer = initialized(dataset, "image_quantile")
    trainer.get_tr_and_val_datasets()
    stored = StoredQuantiles(dataset.folder / "nnUNetPlans_3d_fullres", ".b2nd")
    assert sorted(stored.read()) == [f"case{number}" for number in range(5)]
    os.utime(stored.folder / "case3.b2nd", ns=(1, 1))
    assert sorted(stored.read()) == ["case0", "case1", "case2", "case4"]
    stored.path.write_text('{"case0": 3}')
    assert stored.read() == {}
    stored.path.unlink()
    stored.path.mkdir()
    with caplog.at_level(logging.INFO):
        stored.add({"case0": ((0.0, 1.0),)})
    assert caplog.messages[-1].startswith("the quantiles of the cases are not kept: ")


@pytest.mark.parametrize("kind", ["image_quantile", "tile_quantile"])
def test_a_training_ends_in_a_validation_that_says_how(dataset, kind, tmp_path):
    """Enforces seams with tile statistics and none with the image's, in the report, and the same labels for new images."""
    trainer = initialized(dataset, kind, iterations_per_epoch=1)
    trainer.run_training()
    trainer.perform_actual_validation()
    folder = Path(trainer.output_folder, "validation")
    report = json.loads((folder / "norm_report.json").read_text())
    assert report["input_normalization"] == kind
    assert report["tile_mismatch"]["verdict"].startswith("no") == (kind == "image_quantile")
    assert {plan["population"] for plan in report["predictor"]["plans"]} == {"stored"}
    log = Path(trainer.log_file).read_text()
    assert ("every image by its quantiles" in log) == (kind == "image_quantile")
    assert ("WARNING: input_normalization tile_quantile: every tile" in log) == (kind == "tile_quantile")
    assert "--population" not in log

    predictor = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, fold_norms=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    validated = min(folder.glob("*.nii.gz"))
    image = str(dataset.root / "raw" / validated.name.replace(".nii.gz", "_0000.nii.gz"))
    (tmp_path / "out").mkdir()
    predictor.predict_from_files_sequential([[image]], [str(tmp_path / "out" / "case")])
    labels, wanted = (
        sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in (tmp_path / "out" / "case.nii.gz", validated)
    )
    assert (labels == wanted).mean() > 0.999
    (how,) = json.loads((tmp_path / "out" / "halo_prediction.json").read_text()).values()
    assert how["input_normalization"] == kind


def test_images_that_are_not_normalized_are_refused(dataset):
    """Enforces one line for z-scores, from nnU-Net's predictor and from arrays handed to this package's."""
    trainer = initialized(dataset, "image_quantile")
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3, False)
    with pytest.raises(InputImageError, match=r"predict with nnunet-norm predict$"):
        network(torch.zeros(1, 1, 16, 16, 16))
    predictor = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json, "x", None
    )
    trainer.set_deep_supervision_enabled(False)
    with pytest.raises(InputImageError, match=r"from -1\.5 to 2, .* 0 to 1 \(input_normalization image_quantile\)"):
        predictor.predict_sliding_window_return_logits(torch.tensor([-1.5, 2.0]).repeat(1, 16, 16, 8))
