"""The datasets of ``experimental_batches.py``: groups of images that stay different, since nothing normalizes them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nnunet_datasets import Dataset
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from PIL import Image

from nnunet_norm.experimental_batches import FILE_NAME
from nnunet_norm.writing import write_json

VNC = {"train": range(14), "test": range(17, 20)}
ISBI = {"train": range(20), "test": range(22, 30)}
"""Sections of both stacks; those between are used for nothing, so that no test section touches one that was seen."""

HELD_OUT = 0.2
"""Share of each group of the hippocampus."""

PERCENTILE, SCALES = 99, {"below 300": 300.0, "300 to 1e5": 1e5, "above 1e5": float("inf")}
"""Groups of the hippocampus: by this percentile of a case's intensities."""


@dataclass(frozen=True)
class Case:
    """An image with its labels.

    Attributes:
        name: identifier.
        group: its experimental batch.
        role: "train" or "test".
        image: file.
        labels: file.
        label_of: which label a value of the file stands for; None: as they are.
    """

    name: str
    group: str
    role: str
    image: Path
    labels: Path
    label_of: Callable[[np.ndarray], np.ndarray] | None = None


def electron_microscopy(data: Path) -> list[Case]:
    """Two stacks of the nerve cord of Drosophila, of different sources: VNC and ISBI 2012; membrane against all else."""
    vnc, isbi = data / "vnc_sstem", data / "isbi2012_em" / "train"
    cases = []
    for role in ("train", "test"):
        for n in VNC[role]:
            files = (vnc / "raw" / f"{n:02}.png", vnc / "labels" / f"{n:02}.png")
            cases.append(Case(f"vnc_{n:02}", "VNC", role, *files, lambda labels: labels == 1))
        for n in ISBI[role]:
            files = (isbi / "image" / f"{n}.png", isbi / "label" / f"{n}.png")
            cases.append(Case(f"isbi_{n:02}", "ISBI", role, *files, lambda labels: labels == 0))
    return cases


def hippocampus(data: Path) -> list[Case]:
    """MRI whose intensity scales differ by three orders of magnitude; the last cases of every group are held out."""
    folder = data / "hippocampus_msd04"
    groups: dict[str, list[Path]] = {name: [] for name in SCALES}
    for file in sorted((folder / "images").glob("*.nii.gz")):
        level = np.percentile(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), PERCENTILE)
        groups[next(name for name, below in SCALES.items() if level < below)].append(file)
    cases = []
    for group, files in groups.items():
        for number, file in enumerate(files):
            role = "train" if number < round((1 - HELD_OUT) * len(files)) else "test"
            cases.append(Case(file.name.removesuffix(".nii.gz"), group, role, file, folder / "labels" / file.name))
    return cases


UNSCALED = "noNorm"
"""The channel name for which nnU-Net's planner chooses to normalize nothing."""

EM = Dataset("Dataset011_TwoStacks", "2d", "rgb_to_0_1", {"background": 0, "membrane": 1}, ".png", ())
"""All images are divided by 255, whichever they are."""

MRI = Dataset("Dataset012_ThreeScales", "2d", UNSCALED, {"background": 0, "anterior": 1, "posterior": 2}, ".nii.gz", ())

DATA = {"em": (EM, electron_microscopy, (128, 128)), "hippocampus": (MRI, hippocampus, (48, 48))}
"""Dataset, its cases, and the patch."""


def make_raw(dataset: Dataset, cases: list[Case], folder: Path) -> None:
    """nnU-Net's raw dataset, dataset.json last. Held-out cases are also nnU-Net's validation set, which chooses nothing."""
    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for case in cases:
        for end in ("Tr", "Ts") if case.role == "test" else ("Tr",):
            shutil.copy(case.image, folder / f"images{end}" / f"{case.name}_0000{dataset.ending}")
            target = folder / f"labels{end}" / f"{case.name}{dataset.ending}"
            if case.label_of is None:
                shutil.copy(case.labels, target)
            else:
                labels = case.label_of(np.asarray(Image.open(case.labels).convert("L")))
                Image.fromarray(labels.astype(np.uint8)).save(target)
    split = {"train": [c.name for c in cases if c.role == "train"], "val": [c.name for c in cases if c.role == "test"]}
    write_json(folder / "splits_final.json", [split])
    write_json(folder / FILE_NAME, {"batches": {case.name: case.group for case in cases}})
    description = {"channel_names": {"0": dataset.channel}, "labels": dataset.labels, "file_ending": dataset.ending}
    write_json(folder / "dataset.json", description | {"numTraining": len(cases)})


def differences(preprocessed: Path, cases: list[Case]) -> dict[str, dict[str, float]]:
    """Per group, over all voxels of its preprocessed images: mean, standard deviation, percentiles, number of cases.

    ``of_means`` is the standard deviation of the images' means: differences between groups beyond it are not those of images.
    """
    folder = next(
        path for path in sorted(preprocessed.iterdir()) if path.is_dir() and path.name.startswith("nnUNetPlans")
    )
    dataset = infer_dataset_class(str(folder))(str(folder))
    found = {}
    for group in sorted({case.group for case in cases}):
        images = [np.asarray(dataset.load_case(c.name)[0][:], np.float32).ravel() for c in cases if c.group == group]
        every = np.concatenate(images).astype(np.float64)
        low, middle, high = np.percentile(every, [1, 50, 99])
        found[group] = {
            "cases": len(images),
            "mean": float(every.mean()),
            "std": float(every.std()),
            "of_means": float(np.std([image.mean(dtype=np.float64) for image in images])),
            "percentile_1": float(low),
            "median": float(middle),
            "percentile_99": float(high),
        }
    return found


def read_labels(path: Path) -> np.ndarray:
    """Labels as stored."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("L"))
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def of_preprocessed(work: Path, dataset: Dataset) -> Path:
    """The preprocessed folder."""
    return work / "nnUNet_preprocessed" / dataset.name


def schemes(work: Path, dataset: Dataset) -> list[str]:
    """How nnU-Net's plans normalize the images."""
    plans = json.loads((of_preprocessed(work, dataset) / "nnUNetPlans.json").read_text())
    found: list[str] = plans["configurations"][dataset.configuration]["normalization_schemes"]
    return found
