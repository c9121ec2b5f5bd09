"""Folders of probabilities as nnU-Net's predictors and validations leave them, drawn at random."""

import json

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_models import plans as tiny_plans

SHAPE = (6, 7, 8)
LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
DATASET = "Dataset901_Tiny"


def dataset(labels=None, **changes):
    """A dataset.json."""
    labels = LABELS if labels is None else labels
    regions = any(isinstance(value, list) for value in labels.values())
    order = {"regions_class_order": list(range(1, len(labels)))} if regions else {}
    return (
        {"channel_names": {"0": "T0"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"} | order | changes
    )


def properties(shape=SHAPE, spacing=(1.0, 2.0, 3.0), origin=(0.0, 0.0, 0.0)):
    """What nnU-Net's reader and preprocessing tell of an image."""
    stuff = {"spacing": spacing[::-1], "origin": origin, "direction": tuple(np.eye(3).ravel())}
    return {
        "sitk_stuff": stuff,
        "spacing": list(np.array(spacing)),  # numpy's numbers, as nnU-Net's reader has them
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
        "class_locations": {1: np.arange(8).reshape(2, 4), 2: []},
    }


def draw(seed, dataset_json, shape=SHAPE, dtype=np.float32):
    """Probabilities (K, *shape)."""
    heads = PlansManager(tiny_plans()).get_label_manager(dataset_json).num_segmentation_heads
    values = np.random.default_rng(seed).random((heads, *shape))
    return (values if "regions_class_order" in dataset_json else values / values.sum(0)).astype(dtype)


def write_case(folder, case, probabilities, dataset_json, **given):
    """The three files of a case, as nnU-Net's export writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{case}.npz", probabilities=probabilities)
    told = properties(probabilities.shape[1:], **given)
    save_pickle(told, str(folder / f"{case}.pkl"))
    manager = PlansManager(tiny_plans()).get_label_manager(dataset_json)
    segmentation = manager.convert_probabilities_to_segmentation(probabilities.astype(np.float32))
    SimpleITKIO().write_seg(segmentation, str(folder / f"{case}.nii.gz"), told)


def write_descriptions(folder, dataset_json, plans=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(tiny_plans() if plans is None else plans))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))


def write_folder(folder, seed, cases=("x", "y"), *, labels=None, dtype=np.float32, shape=SHAPE):
    """A folder of predictions; the same case of another seed has other probabilities."""
    described = dataset(labels)
    write_descriptions(folder, described)
    for number, case in enumerate(cases):
        write_case(folder, case, draw(100 * seed + number, described, shape, dtype), described)
    return folder


def read(path):
    """A segmentation (x, y, z)."""
    return SimpleITKIO().read_seg(str(path))[0][0]


def write_crossvalidation(root, name, folds, quality, *, seed=0):
    """A model folder whose folds have predicted the cases that ``folds`` lists; the higher ``quality``, the better."""
    described = dataset()
    folder = root / "results" / DATASET / name
    _, plans_name, configuration = name.split("__")
    configurations = {configuration: tiny_plans()["configurations"]["3d_fullres"]}
    write_descriptions(folder, described, tiny_plans() | {"plans_name": plans_name, "configurations": configurations})
    for fold, cases in folds.items():
        validation = folder / f"fold_{fold}" / "validation"
        for case in cases:
            truth = read(root / "preprocessed" / DATASET / "gt_segmentations" / f"{case}.nii.gz").astype(int)
            noise = draw([seed, fold, *map(ord, case)], described, truth.shape)
            mixed = (noise + quality * np.eye(3, dtype=np.float32)[truth].transpose(3, 0, 1, 2)) / (1 + quality)
            write_case(validation, case, mixed, described)
        (validation / "summary.json").write_text("{}")
    return folder


def write_references(root, cases, seed=0):
    """The references of the dataset, in the preprocessed and in the raw folder."""
    for place in (root / "preprocessed" / DATASET / "gt_segmentations", root / "raw" / DATASET / "labelsTr"):
        place.mkdir(parents=True)
        for number, case in enumerate(cases):
            labels = np.zeros(SHAPE, np.uint8)
            generator = np.random.default_rng(seed + number)
            labels[1:5, 1:4, 1:6], labels[2:5, 4:6, 2:6] = 1, 2
            labels[generator.integers(0, 6), :, 0] = 1
            SimpleITKIO().write_seg(labels, str(place / f"{case}.nii.gz"), properties())
