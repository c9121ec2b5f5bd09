"""Labels and probabilities that are put together box by box are those of nnU-Net's export of all logits at once."""

import numpy as np
import pytest
import torch
from export_cases import LABELS, REGIONS, export_case, random_partition, with_overlap

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.assembly import Assembly, LogitsToLabels
from nnunet_norm.prediction.resampling import box_resampler

MANY = {"background": 0} | {f"organ {i}": i for i in range(1, 61)}
IGNORE = {**LABELS, "ignore": 4}
REGIONS_AND_IGNORE = {**REGIONS, "ignore": 4}
UP = {"shape": (14, 15, 16), "cropped": (19, 21, 17)}
CROP = ((2, 0), (1, 3), (0, 4))

CASES = {
    "finer spacing": UP,
    "coarser spacing": {"shape": (14, 15, 16), "cropped": (9, 12, 7)},
    "some of both": {"shape": (14, 15, 16), "cropped": (9, 20, 16)},
    "thick slices": {"shape": (6, 16, 17), "cropped": (9, 21, 13), "spacing": (5, 1, 1)},
    "thick slices, as many": {"shape": (6, 16, 17), "cropped": (6, 21, 13), "spacing": (5, 1, 1), "crop": CROP},
    "thick slices on axis 1": {"shape": (16, 6, 17), "cropped": (21, 9, 13), "spacing": (1, 5, 1)},
    "thick slices on axis 2": {
        "shape": (16, 17, 6),
        "cropped": (21, 13, 4),
        "spacing": (1, 1, 5),
        "forward": (2, 0, 1),
    },
    "CT-like": {
        "shape": (12, 20, 20),
        "cropped": (18, 31, 31),
        "spacing": (1.5, 1.5, 1.5),
        "labels": MANY,
        "crop": CROP,
    },
    "regions": {**UP, "labels": REGIONS, "class_order": (1, 2, 3), "crop": CROP},
    "ignore label": {**UP, "labels": IGNORE},
    "regions and ignore label": {**UP, "labels": REGIONS_AND_IGNORE, "class_order": (2, 1, 3), "forward": (1, 0, 2)},
    "cropped": {**UP, "crop": CROP},
    "transposed": {**UP, "forward": (1, 2, 0)},
    "cropped and transposed": {**UP, "crop": CROP, "forward": (2, 0, 1)},
    "not resampled": {"shape": (14, 15, 16), "cropped": (14, 15, 16), "crop": CROP, "forward": (2, 1, 0)},
    "2d configuration": {"shape": (6, 19, 20), "cropped": (6, 25, 17), "spacing": (1, 1), "crop": CROP},
    "2d configuration, thick slices": {
        "shape": (6, 19, 20),
        "cropped": (6, 25, 17),
        "spacing": (1, 1),
        "target": (6, 0.76, 1.18),
        "forward": (2, 1, 0),
    },
}


def put_together(case, generator, pieces=7, voxels=1234, **options):
    """All boxes of a random partition, some of them twice; so many voxels are resampled at a time."""
    resampler = box_resampler(case.plans_manager, case.configuration_manager, case.properties, case.logits.shape)
    assembly = Assembly(case.plans_manager, case.label_manager, case.properties, **options)
    labels = LogitsToLabels(resampler, assembly, at_most_bytes=4 * len(case.logits) * voxels)
    cores = random_partition(resampler.in_shape, generator, pieces)
    for core in [*cores, *cores[:3]]:
        region = with_overlap(core, resampler.overlap, resampler.in_shape)
        labels.add(core, region, case.logits[(slice(None), *region)])
    return assembly


@pytest.mark.parametrize("name", CASES)
def test_segmentation_is_that_of_nnunet(name):
    """Shape, dtype and every voxel, for several partitions."""
    case = export_case(**CASES[name])
    expected = case.expected()
    assert len(np.unique(expected)) >= min(4, len(case.label_manager.all_labels))
    for seed in range(3):
        found = put_together(case, np.random.default_rng(seed))
        assert found.probabilities is None
        assert found.segmentation.dtype == expected.dtype
        assert np.array_equal(found.segmentation, expected)


@pytest.mark.parametrize("name", CASES)
def test_probabilities_are_those_of_nnunet(name):
    """Every voxel of the segmentation and, to the last bit, of the probabilities, what was cropped away included.

    But for the crop's last voxels, as many as do not fill a vector: there torch rounds nnU-Net's differently.
    """
    case = export_case(**CASES[name])
    segmentation, probabilities = case.expected(probabilities=True)
    for seed in range(3):
        found = put_together(case, np.random.default_rng(seed), probabilities=True)
        assert np.array_equal(found.segmentation, segmentation)
        assert_equal_probabilities(found.probabilities, probabilities, case)


def assert_equal_probabilities(found, expected, case):
    """To the last bit, but for up to 15 voxels at the end."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    different = (found != expected).any(axis=0).transpose(np.argsort(case.plans_manager.transpose_backward))
    crop = tuple(slice(*pair) for pair in case.properties["bbox_used_for_cropping"])
    inside = different[crop].reshape(-1)
    assert inside.sum() == different.sum()
    assert not inside[: len(inside) // 16 * 16].any()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["finer spacing", "regions"])
def test_probabilities_do_not_depend_on_the_boxes(name, threads):
    """The same bits from one box and from many, in any number of threads: an interrupted run may go on elsewhere."""
    case = export_case(**{**CASES[name], "cropped": (31, 33, 35)})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = put_together(case, np.random.default_rng(0), pieces=1, voxels=10**6, probabilities=True)
        torch.set_num_threads(threads)
        for seed in range(3):
            found = put_together(case, np.random.default_rng(seed), pieces=9, probabilities=True)
            assert np.array_equal(found.segmentation, expected.segmentation)
            assert np.array_equal(found.probabilities, expected.probabilities)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("labels", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_dtype_is_the_smallest_that_nnunet_would_take(labels, dtype):
    """From 255 foreground labels on the segmentation has 16 bits."""
    case = export_case((3, 4, 5), (4, 4, 5), labels={"background": 0} | {f"c{i}": i for i in range(1, labels)})
    found = put_together(case, np.random.default_rng(0)).segmentation
    assert found.dtype == dtype == case.expected().dtype
    assert np.array_equal(found, case.expected())


def test_mapped_files_keep_what_an_interrupted_run_has_put(tmp_path):
    """Boxes put into mapped files are still there after they were opened again, probabilities and margins included."""
    case = export_case(**CASES["cropped and transposed"])
    resampler = box_resampler(case.plans_manager, case.configuration_manager, case.properties, case.logits.shape)
    cores = random_partition(resampler.in_shape, np.random.default_rng(0))
    asked = []

    def allocate(name, shape, dtype):
        file = tmp_path / name
        asked.append(name)
        return np.memmap(file, dtype, "r+" if file.exists() else "w+", shape=shape)

    for part in (cores[:4], cores[4:]):
        assembly = Assembly(
            case.plans_manager, case.label_manager, case.properties, probabilities=True, allocate=allocate
        )
        labels = LogitsToLabels(resampler, assembly)
        for core in part:
            region = with_overlap(core, resampler.overlap, resampler.in_shape)
            labels.add(core, region, case.logits[(slice(None), *region)])
        for mapped in (assembly.segmentation, assembly.probabilities):
            mapped.flush()
    segmentation, probabilities = case.expected(probabilities=True)
    assert asked == ["segmentation", "probabilities"] * 2
    assert np.array_equal(assembly.segmentation, segmentation)
    assert_equal_probabilities(np.asarray(assembly.probabilities), probabilities, case)


def test_resampled_logits_are_held_in_bounded_boxes():
    """No more than asked for is resampled at a time."""
    case = export_case(**CASES["CT-like"])
    resampler = box_resampler(case.plans_manager, case.configuration_manager, case.properties, case.logits.shape)
    assembly = Assembly(case.plans_manager, case.label_manager, case.properties)
    whole = tuple(slice(0, n) for n in resampler.in_shape)
    sizes = []
    put = assembly.put
    assembly.put = lambda out, logits: (sizes.append(logits.nbytes), put(out, logits))
    LogitsToLabels(resampler, assembly, at_most_bytes=100_000).add(whole, whole, case.logits)
    assert max(sizes) <= 100_000 < sum(sizes) / 10
    assert sum(sizes) == 4 * len(case.logits) * np.prod(resampler.out_shape)
    assert np.array_equal(assembly.segmentation, case.expected())


def test_a_core_without_its_overlap_is_refused():
    """And nothing is put."""
    case = export_case(**UP)
    resampler = box_resampler(case.plans_manager, case.configuration_manager, case.properties, case.logits.shape)
    labels = LogitsToLabels(resampler, Assembly(case.plans_manager, case.label_manager, case.properties))
    core = (slice(0, 7), slice(0, 15), slice(0, 16))
    with pytest.raises(TilingError, match=r"but those of \[0:7, 0:15, 0:16\] were given"):
        labels.add(core, core, case.logits[:, :7])
    assert not labels.assembly.segmentation.any()
