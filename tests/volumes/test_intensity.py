"""Streamed normalization against nnU-Net's own preprocessing of the whole array."""

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from zarrs import managers, ome, write_array, write_group

from nnunet_norm.errors import InputImageError, PlansError
from nnunet_norm.inputs import normalize_image
from nnunet_norm.volumes import (
    Intensities,
    NormalizedVolume,
    ZarrImage,
    intensity,
    measure_intensities,
    refuse_resampling,
)
from nnunet_norm.volumes.intensity import Moments, blocks

SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)


def by_nnunet(values, plans, configuration):
    """(normalized image, properties) of nnU-Net's preprocessor."""
    properties = {"spacing": [1.0, 1.0, 1.0]}
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        values, None, properties, plans, configuration, {"channel_names": {}, "labels": {}}
    )
    return data, properties


def five_channels(dtype, *, border=True):
    """An image whose channels differ in offset and range, with holes, and zeros around it that differ per channel."""
    rng = np.random.default_rng(1)
    values = rng.gamma(2.0, 20.0, (5, 14, 17, 20))
    values[1] -= 30 if np.dtype(dtype).kind == "f" else 0
    values[3] += 100
    values[4] = np.clip(values[4], 0, 255)
    values[:3, 5:7, 6:9, 7:9] = 0  # not in all: the smallest value of the box is not 0 in the others
    if border:
        values[:, :2], values[:, 12:], values[:, :, :3], values[..., 18:] = 0, 0, 0, 0
        values[0, 3], values[2, ..., 4] = 0, 0
    return values.astype(dtype)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("dtype", ["uint16", "float32", "float64"])
@pytest.mark.parametrize("border", [True, False])
def test_a_volume_is_normalized_as_nnunet_does_it(tmp_path, monkeypatch, transpose, dtype, border):
    """Enforces nnU-Net's cropped, transposed and normalized image, with all its schemes, from many blocks."""
    monkeypatch.setattr(intensity, "BLOCK_VALUES", 5 * 8**3)
    values = five_channels(dtype, border=border)
    plans, configuration = managers(SCHEMES, transpose=transpose)
    expected, properties = by_nnunet(values, plans, configuration)
    image = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=5)
    assert len(list(blocks(image))) > 4
    found = measure_intensities(image, plans, configuration)
    volume = NormalizedVolume(image, found, transpose)
    assert volume.shape == expected.shape
    assert volume.ndim == 4
    for key in ("bbox_used_for_cropping", "shape_before_cropping", "shape_after_cropping_and_before_resampling"):
        assert volume.properties()[key] == properties[key]
    whole = volume[:]
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, torch.from_numpy(expected), rtol=1e-5, atol=2e-6)
    exact = [1, 2, 3, 4]  # whose parameters are not sums of many values
    assert torch.equal(whole[exact], torch.from_numpy(np.ascontiguousarray(expected[exact])))


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(2, 5), slice(0, 9), slice(-3, None)),
        (slice(None), 4, slice(1, 3), slice(None)),
        (2, slice(None), -1, 0),
        (slice(1, 3), slice(3, 3), slice(None), slice(0, 99)),
        (slice(None), 1),
        0,
    ],
)
def test_parts_are_indexed_as_a_tensor(tmp_path, index):
    """Enforces that any part equals the same part of the whole, in extents as in values."""
    values = five_channels("float32")
    plans, configuration = managers(SCHEMES, transpose=(1, 2, 0))
    image = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=5)
    volume = NormalizedVolume(image, measure_intensities(image, plans, configuration), (1, 2, 0))
    part = volume[index]
    assert part.is_contiguous()
    assert torch.equal(part, volume[:][index])


def test_regions_are_carried_to_the_file_and_back(tmp_path):
    """Enforces that labels written to ``to_file`` come to lie where the network saw them."""
    values = five_channels("float32")
    plans, configuration = managers(SCHEMES, transpose=(1, 2, 0))
    image = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=5)
    volume = NormalizedVolume(image, measure_intensities(image, plans, configuration), (1, 2, 0))
    region = ((1, 6), (2, 9), (0, 7))
    place = volume.to_file(region)
    there = values[2][tuple(slice(*side) for side in place)].transpose(1, 2, 0)  # channel 2 is not normalized
    seen = volume[(slice(2, 3), *(slice(*side) for side in region))][0]
    np.testing.assert_array_equal(there, seen.numpy())
    assert volume.from_file(place) == region
    assert volume.from_file(tuple((0, n) for n in values.shape[1:])) == tuple((0, n) for n in volume.shape[1:])
    assert volume.from_file(((0, 2), (0, 17), (0, 20))) is None


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_images_are_normalized_as_nnunet_does_it(tmp_path, value):
    """Enforces nnU-Net's smallest divisor, and its box of an image of zeros: all of it."""
    values = np.full((4, 5, 6, 7), value, np.float32)
    plans, configuration = managers(SCHEMES[:4])
    expected, _ = by_nnunet(values, plans, configuration)
    image = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=4)
    volume = NormalizedVolume(image, measure_intensities(image, plans, configuration), (0, 1, 2))
    assert torch.equal(volume[:], torch.from_numpy(expected))


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    zeros=st.integers(0, 50),
)
def test_moments_do_not_depend_on_the_parts(values, cuts, zeros):
    """Enforces moments and extremes of all values, however they are cut, with zeros added at the end."""
    moments = Moments()
    array = np.array(values, np.float32)
    for part in np.split(array, sorted(cuts)):
        moments.add(part)
    joined = moments.with_zeros(len(values) + zeros)
    everything = np.concatenate([array, np.zeros(zeros, np.float32)]).astype(np.float64)
    assert joined.count == len(everything)
    assert joined.extremes == (everything.min(), everything.max())
    np.testing.assert_allclose(joined.mean, everything.mean(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(joined.deviations / joined.count, everything.var(), rtol=1e-9, atol=1e-9)


def test_moments_of_a_large_offset_keep_their_digits():
    """Enforces float64 moments: the deviation of values that are large and close to each other."""
    moments = Moments()
    array = (1e6 + np.random.default_rng(0).normal(0, 1, 10**5)).astype(np.float32)
    for part in np.array_split(array, 7):
        moments.add(part)
    np.testing.assert_allclose(moments.deviations / moments.count, array.astype(np.float64).var(), rtol=1e-9)


def test_intensities_survive_json(tmp_path):
    """Enforces that a resumed run normalizes with exactly the same numbers."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", five_channels("float32")), channels=5)
    found = measure_intensities(image, *managers(SCHEMES))
    assert Intensities.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_blocks_cover_the_image_with_whole_chunks(tmp_path, monkeypatch):
    """Enforces that every chunk is read once, and that a block is not larger than said."""
    monkeypatch.setattr(intensity, "BLOCK_VALUES", 600)
    image = ZarrImage(write_array(tmp_path / "a.zarr", np.zeros((9, 11, 13), np.uint8), chunks=(4, 5, 6)), channels=1)
    seen = np.zeros((9, 11, 13), int)
    for block in blocks(image):
        assert all(start % edge == 0 for (start, _), edge in zip(block, (4, 5, 6), strict=True))
        inside = seen[tuple(slice(*side) for side in block)]
        assert inside.size <= 600
        inside += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schemes": ["MyNormalization"]}, r"normalization 'MyNormalization' of channel 0 cannot be streamed"),
        ({"schemes": SCHEMES[:1], "masks": [True]}, r"use_mask_for_norm true \(channel 0\) needs the mask"),
    ],
)
def test_what_one_pass_cannot_do_is_refused(tmp_path, changed, message):
    """Enforces one line for unknown schemes and for statistics inside a mask."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", np.ones((4, 4, 4))), channels=1)
    with pytest.raises(PlansError, match=message):
        measure_intensities(image, *managers(**changed))


def test_another_preprocessor_is_refused(tmp_path):
    """Enforces that only the preprocessing that is known to be this one is streamed."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", np.ones((4, 4, 4))), channels=1)
    plans, configuration = managers(SCHEMES[:1])
    configuration.configuration["preprocessor_name"] = "MyPreprocessor"
    with pytest.raises(PlansError, match="preprocessor 'MyPreprocessor' cannot be streamed"):
        measure_intensities(image, plans, configuration)


def test_a_mask_that_nnunet_ignores_is_no_obstacle(tmp_path):
    """Enforces that ``use_mask_for_norm`` counts only where nnU-Net uses it."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", np.ones((4, 4, 4))), channels=1)
    found = measure_intensities(image, *managers(["CTNormalization"], masks=[True]))
    assert found.channels[0].scale == 1.5


def test_rgb_outside_its_range_is_refused(tmp_path):
    """Enforces nnU-Net's assertion as one line."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", np.full((4, 4, 4), 256, np.uint16)), channels=1)
    with pytest.raises(InputImageError, match=r"volume 'a' has values from 256 to 256 in channel 0: RGBTo01"):
        measure_intensities(image, *managers(["RGBTo01Normalization"]))


SCALES = [(2, 0.5, 0.5), (2, 1, 1), (4, 2, 2)]


def levels(tmp_path, unit="millimeter"):
    """An OME-Zarr with three levels of the spacings ``SCALES``."""
    arrays = {f"s{i}": np.ones((40 // (1 + i // 2), 80 >> i, 80 >> i), np.uint8) for i in range(3)}
    return write_group(tmp_path / "v.zarr", arrays, ome("zyx", SCALES, unit=unit))


@pytest.mark.parametrize(
    ("level", "spacing", "transpose", "unit"),
    [
        (0, (2, 0.5, 0.5), (0, 1, 2), "millimeter"),
        (1, (1, 2, 1), (1, 0, 2), "millimeter"),
        (1, (1.0, 1.0), (0, 1, 2), "millimeter"),
        (0, (2.01, 0.501, 0.499), (0, 1, 2), None),
        (0, (0.002, 0.0005, 0.0005), (0, 1, 2), "micrometer"),
        (0, (2, 0.5, 0.5), (0, 1, 2), "micrometer"),
    ],
)
def test_spacings_that_fit_are_accepted(tmp_path, level, spacing, transpose, unit):
    """Enforces nnU-Net's own criterion, the shape, on the axes of the plans, in the unit written or in millimetres."""
    image = ZarrImage(levels(tmp_path, unit), channels=1, level=level)
    refuse_resampling(image, *managers(SCHEMES[:1], spacing=spacing, transpose=transpose))


@pytest.mark.parametrize(
    ("level", "spacing", "message"),
    [
        (0, (2, 1, 1), r"spacing of 2 x 0\.5 x 0\.5 \(millimeter; .*have 2 x 1 x 1, .* choose level 's1'"),
        (0, (1.0, 1.0), r"spacing of 0\.5 x 0\.5 \(.*have 1 x 1, .* choose level 's1', which has it, or train"),
        (2, (3, 1, 1), r"spacing of 4 x 2 x 2 .*: resample the volume to it, or train"),
        (0, (2, 0.5, 0.51), "2 x 0.5 x 0.51"),
    ],
)
def test_plans_that_would_resample_are_refused(tmp_path, level, spacing, message):
    """Enforces one line with both spacings, and the level that fits if there is one."""
    image = ZarrImage(levels(tmp_path), channels=1, level=level)
    with pytest.raises(PlansError, match=message):
        refuse_resampling(image, *managers(SCHEMES[:1], spacing=spacing))


def test_without_spacing_that_of_the_plans_is_taken(tmp_path, caplog):
    """Enforces that a volume without spacing, or a model trained without, is predicted, and that the log says so."""
    caplog.set_level(logging.INFO, "nnunet_norm.volumes")
    plain = ZarrImage(write_array(tmp_path / "p.zarr", np.ones((4, 4, 4))), channels=1)
    refuse_resampling(plain, *managers(SCHEMES[:1], spacing=(3, 1, 1)))
    assert "'p' tells no spacing: it is taken to have that of the plans, [3, 1, 1]" in caplog.text
    image = ZarrImage(levels(tmp_path), channels=1)
    refuse_resampling(image, *managers(SCHEMES[:1], spacing=(1.0, 1.0), reader="NaturalImage2DIO"))
    assert "'v': the model was trained on images without spacing" in caplog.text


@pytest.mark.parametrize("border", [True, False])
def test_quantiles_are_those_of_the_normalized_image(tmp_path, monkeypatch, border):
    """Enforces the exact quantiles of what nnU-Net's schemes give, from many blocks, and back from the file beside it."""
    monkeypatch.setattr(intensity, "BLOCK_VALUES", 5 * 8**3)
    values = five_channels("float32", border=border)
    plans, configuration = managers(SCHEMES)
    expected, _ = by_nnunet(values, plans, configuration)
    normalize_image(expected)
    image = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=5)
    found = measure_intensities(image, plans, configuration, input_normalization="image_quantile")
    whole = NormalizedVolume(image, found, (0, 1, 2))[:]
    torch.testing.assert_close(whole, torch.from_numpy(expected), rtol=1e-5, atol=2e-6)
    assert whole.min() == 0
    assert whole.max() == 1
    again = Intensities.from_dict(json.loads(json.dumps(found.as_dict())))
    assert again == found
