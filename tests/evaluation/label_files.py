"""Small segmentations on the disk, with their references."""

import json

import numpy as np
import SimpleITK as sitk  # noqa: N813

LABELS = {"background": 0, "liver": 1, "tumour": 2, "vessel": 3}
SPACING = (3.0, 1.0, 0.5)
"""Of the axes of the array, in mm."""

SHAPE = (7, 12, 14)


def dataset(labels=LABELS, ending=".nii.gz", **more):
    return {"labels": labels, "file_ending": ending, "channel_names": {"0": "CT"}, "numTraining": 3, **more}


def write(path, array, spacing=SPACING):
    """Write labels; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    if path.suffix == ".gz":
        image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))


def segmentation(seed, labels=(0, 1, 2), shape=SHAPE):
    """Blobs of labels."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise += sum(np.roll(noise, 1, axis) for axis in range(len(shape)))
    ranks = noise.ravel().argsort().argsort().reshape(shape)
    return np.asarray(labels)[ranks * len(labels) // noise.size]


def write_cases(folder, **cases):
    """``gt`` and ``pred`` with a file per case, and dataset.json beside the predictions."""
    for case, (reference, prediction) in cases.items():
        write(folder / "gt" / f"{case}.nii.gz", reference)
        write(folder / "pred" / f"{case}.nii.gz", prediction)
    (folder / "pred" / "dataset.json").write_text(json.dumps(dataset()))
    return folder


def three_cases(folder):
    """One with a tumour that is missed, one with a vessel that is made up, and one without a vessel anywhere."""
    a, b, c = (segmentation(seed) for seed in range(3))
    moved = [np.roll(one, 1, axis) for axis, one in enumerate((a, b, c))]
    moved[0][moved[0] == 2] = 0
    moved[1][0, 0, :3] = 3
    return write_cases(folder, **{f"case_{i}": pair for i, pair in enumerate(zip((a, b, c), moved, strict=True))})
