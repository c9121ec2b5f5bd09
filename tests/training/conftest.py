"""A dataset of a few small volumes, preprocessed by nnU-Net itself, on which trainers run in this process."""

import json
import multiprocessing
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - everybody's name for it
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_norm.planning import derive_plans, save_plans
from nnunet_norm.training.progress import NormLogger

STOCK_PLANS = Path(__file__).parents[1] / "stock_plans"
SPACING = (2.0, 0.7, 0.7)
PLAIN = {"background": 0, "kidney": 1, "tumor": 2}


def volume(seed, shape=(18, 26, 22)):
    """A bright ball with a brighter core in noise, and its labels."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    distance = np.sqrt(((grid - rng.uniform(8, 12, 3)[:, None, None, None]) ** 2).sum(0))
    labels = (distance < 7).astype(np.uint8) + (distance < 3.5)
    return (labels * 2.0 + rng.normal(size=shape)).astype(np.float32), labels


class TinyDataset:
    """The folders of one dataset, and trainers on it."""

    def __init__(self, root, labels=PLAIN, regions_class_order=None, stock="nnUNetPlans", edit=None):
        self.root, self.name = root, "Dataset990_Abdomen"
        self.folder = root / "preprocessed" / self.name
        self.dataset_json = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 5}
        if regions_class_order:
            self.dataset_json["regions_class_order"] = regions_class_order
        self.stock = json.loads((STOCK_PLANS / f"{stock}.json").read_text())
        (self.folder / "gt_segmentations").mkdir(parents=True)
        (root / "raw").mkdir()
        (self.folder / "dataset.json").write_text(json.dumps(self.dataset_json))
        (self.folder / "dataset_fingerprint.json").write_text("{}")
        for seed in range(5):
            image, segmentation = volume(seed)
            self._write(root / "raw" / f"case{seed}_0000.nii.gz", image)
            self._write(
                self.folder / "gt_segmentations" / f"case{seed}.nii.gz", edit(segmentation) if edit else segmentation
            )

    @staticmethod
    def _write(path, array):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING[::-1])
        sitk.WriteImage(image, str(path))

    def plans(self, configuration="3d_fullres", name="tiny", patch=None, **changes):
        """Derive and save small plans, and preprocess what they need."""
        patch = patch or ([16, 16] if configuration == "2d" else [16, 16, 16])
        changes = {"num_stages": 3, "base_features": 4, "batch_size": 2, "iterations_per_epoch": 3} | changes
        plans = derive_plans(
            self.stock, configuration, plans_name=name, patch_size=patch, val_iterations_per_epoch=2, **changes
        )
        save_plans(plans, self.folder, overwrite=True)
        self.preprocess(plans, configuration)
        return plans

    def preprocess(self, plans, configuration):
        manager = PlansManager(plans)
        config = manager.get_configuration(configuration)
        folder = self.folder / config.data_identifier
        if folder.exists():
            return
        folder.mkdir()
        for seed in range(5):
            config.preprocessor_class(verbose=False).run_case_save(
                str(folder / f"case{seed}"),
                [str(self.root / "raw" / f"case{seed}_0000.nii.gz")],
                str(self.folder / "gt_segmentations" / f"case{seed}.nii.gz"),
                manager,
                config,
                self.dataset_json,
            )

    def trainer(self, name, configuration="3d_fullres", plans="tiny", fold=0, continued=False):
        """What ``nnUNetv2_train`` makes of its arguments, on the CPU."""
        return get_trainer_from_args(self.name, configuration, fold, name, plans, continued, device=torch.device("cpu"))


@pytest.fixture
def nnunet_environment(tmp_path, monkeypatch):
    """nnU-Net's folders below ``tmp_path``, its trainers' folder set to ours, and no worker processes."""
    from importlib.resources import files

    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(files("nnunet_norm.trainers")))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    # Spawned workers import torch for seconds each; threads do the same work here.
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: SimpleNamespace(Pool=lambda _: ThreadPool(1))
    )
    # nnU-Net draws its picture of 16 million pixels after every epoch.
    monkeypatch.setattr(NormLogger, "plot_progress_png", lambda self, output_folder: None)
    return tmp_path


@pytest.fixture
def dataset(nnunet_environment):
    """A dataset with two labels and small 3d plans."""
    dataset = TinyDataset(nnunet_environment)
    dataset.plans()
    return dataset


@pytest.fixture
def make_dataset(nnunet_environment):
    """A dataset of another kind: labels, regions, ignore label."""
    return lambda **kwargs: TinyDataset(nnunet_environment, **kwargs)
