"""The datasets of ``whole_image_statistics.py``: preparation, training by nnU-Net's own programs, and the test images."""

import itertools
import sys

import numpy as np
import SimpleITK as sitk  # noqa: N813
from nnunet_datasets import ONE_CORE, Dataset, make_raw, prepare, program
from PIL import Image

from nnunet_norm.demo.steps import continue_flag
from nnunet_norm.writing import is_whole_checkpoint, written_beside

TRAINER, EPOCHS, ITERATIONS = "nnUNetTrainer_5epochs", 5, 250
PLANS = "small"
VNC_ROLES = {"train": range(14), "val": range(14, 15), "test": range(17, 20)}
"""Sections; 15 and 16 are used for nothing, so that no test section touches one that was seen."""

HELD_OUT, VALIDATION = 50, 10
"""Cases of the hippocampus, counted from the last name: for the test, and before those for nnU-Net's own validation."""

CELL, GRID = (36, 50, 36), (1, 5, 5)
"""Voxels (z, y, x) that a case has in the mosaic, its median size, and how many cases lie side by side."""


DATASETS = {
    "vnc": Dataset(
        "Dataset005_VNC",
        "2d",
        "EM",
        {"background": 0, "membrane": 1, "mitochondria": 2, "glia": 3, "synapse": 4},
        ".png",
        ("--num-stages", "6", "--patch-size", "256", "256", "--base-features", "16", "--batch-size", "2"),
    ),
    "hippocampus": Dataset(
        "Dataset004_Hippocampus",
        "3d_fullres",
        "MRI",
        {"background": 0, "anterior": 1, "posterior": 2},
        ".nii.gz",
        ("--base-features", "16", "--batch-size", "2"),
    ),
}
EXPERIMENTS = {"vnc": "vnc", "hippocampus": "hippocampus", "hippocampus_sparse": "hippocampus"}
"""What is predicted, and the dataset whose model predicts it."""


def cases_of(which, data):
    """Every case as (name, role, image, labels)."""
    if which == "vnc":
        folder = data / "vnc_sstem"
        files = {role: [f"{i:02}.png" for i in sections] for role, sections in VNC_ROLES.items()}
        sub = "raw"
    else:
        folder, sub = data / "hippocampus_msd04", "images"
        names = sorted(p.name for p in (folder / sub).glob("*.nii.gz"))
        files = {"train": names[: -HELD_OUT - VALIDATION], "val": names[-HELD_OUT - VALIDATION : -HELD_OUT]}
        files["test"] = names[-HELD_OUT:]
    return [
        (f"case_{name.split('.')[0]}", role, folder / sub / name, folder / "labels" / name)
        for role in files
        for name in files[role]
    ]


def train(dataset, cases, work):
    """The trained model's folder; what is there already is not made again."""
    run = program(work, f"{dataset.name}.log")
    prepare(dataset, work, lambda folder: make_raw(dataset, cases, folder))
    fold = work / "nnUNet_results" / dataset.name / f"{TRAINER}__{PLANS}__{dataset.configuration}" / "fold_0"
    if not (work / "nnUNet_preprocessed" / dataset.name / f"{PLANS}.json").exists():
        run(
            "nnunet-norm",
            "plan",
            "-d",
            dataset.number,
            "-c",
            dataset.configuration,
            "--plans-name",
            PLANS,
            *dataset.plan,
        )
    if not (is_whole_checkpoint(fold / "checkpoint_final.pth") and (fold / "validation" / "summary.json").exists()):
        what = (dataset.number, dataset.configuration, "0", "-tr", TRAINER, "-p", PLANS)
        run(sys.executable, "-c", ONE_CORE, *what, "-device", "cpu", *continue_flag(fold))
    return fold.parent


def fit(array, shape):
    """The middle of ``array``, continued as its own mirror image where it is smaller than ``shape``."""
    missing = [max(0, n - have) for n, have in zip(shape, array.shape, strict=True)]
    array = np.pad(array, [(m // 2, m - m // 2) for m in missing], mode="symmetric")
    starts = [(have - n) // 2 for n, have in zip(shape, array.shape, strict=True)]
    return array[tuple(slice(s, s + n) for s, n in zip(starts, shape, strict=True))]


def make_mosaic(cases, folder, sparse):
    """Image and labels of held-out cases side by side, each scaled by its own mean and standard deviation.

    In the sparse mosaic every fourth cell holds a case and all else is air: noise around the cases' darkest per cent.
    """
    shape = tuple(c * g for c, g in zip(CELL, GRID, strict=True))
    image = np.random.default_rng(0).normal(-2.4, 0.1, shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    cells = [cell for cell in itertools.product(*map(range, GRID)) if not sparse or not (cell[1] % 2 or cell[2] % 2)]
    for cell, (_, _, scan, reference) in zip(cells, cases, strict=False):
        box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(cell, CELL, strict=True))
        scan, reference = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (scan, reference))
        scan = scan.astype(np.float32)
        image[box] = fit((scan - scan.mean()) / scan.std(), CELL)
        labels[box] = fit(reference, CELL)
    folder.mkdir(parents=True, exist_ok=True)
    for array, name in ((labels, "labels.nii.gz"), (image, "image_0000.nii.gz")):
        with written_beside(folder / name) as beside:
            sitk.WriteImage(sitk.GetImageFromArray(array), str(beside))
    return folder / "image_0000.nii.gz", folder / "labels.nii.gz"


def test_images(experiment, cases, work):
    """What is predicted, as (name, image file, label file)."""
    test = [case for case in cases if case[1] == "test"]
    if experiment == "vnc":
        return [(name, image, labels) for name, _, image, labels in test]
    return [("mosaic", *make_mosaic(test, work / "mosaics" / experiment, sparse=experiment.endswith("sparse")))]


def read_labels(path):
    """Labels (z, y, x)."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("L"))[None]
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
