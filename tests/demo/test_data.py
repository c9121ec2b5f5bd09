import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnunet_norm.demo import data
from nnunet_norm.errors import OutputError, SetupError


@pytest.fixture(scope="module")
def template():
    return data.load_template()


@pytest.fixture
def toy():
    """A template of 160 small slices, in which every slice has its own brightness."""
    volume = np.broadcast_to(np.linspace(0, 1, 160, dtype=np.float32)[:, None, None], (160, 8, 6)).copy()
    return volume, (volume > 0.5).astype(np.uint8)


def test_training_validation_and_test_lie_apart():
    """Slabs of different roles share no slice, and the test slab is 8 mm away from every other."""
    test = next(slab for slab in data.SLABS if slab.role == "test")
    others = [slab for slab in data.SLABS if slab.role != "test"]
    assert all(slab.stop <= test.start - 8 or slab.start >= test.stop + 8 for slab in others)
    for slab in others:
        for other in others:
            assert slab is other or slab.stop <= other.start or other.stop <= slab.start


def test_the_template_comes_from_the_package_and_is_symmetric(template):
    """Nothing is downloaded, and a held-out hemisphere would be a mirror image: why the slabs are axial."""
    image, labels = template
    assert image.shape == labels.shape == (189, *data.FIELD_OF_VIEW)
    brain = image[:, 11:-12, 13:-14]  # the field of view adds one voxel more on the far side
    assert np.array_equal(brain, brain[:, :, ::-1])
    assert set(np.unique(labels)) == {0, 1, 2}


def test_white_matter_is_brighter_than_grey_in_the_template(template):
    """The maps and the template lie on one grid, or the labels would not follow the intensities."""
    image, labels = template
    air, grey, white = (float(np.median(image[labels == label])) for label in range(3))
    assert air < 0.1 < grey < 0.75 < white


def test_padding_puts_the_volume_in_the_middle():
    """No voxel is lost, and what is added is air."""
    volume = np.ones((2, 233, 197), dtype=np.float32)
    padded = data.pad_to_field_of_view(volume)
    assert padded.shape == (2, *data.FIELD_OF_VIEW)
    assert padded.sum() == volume.sum()
    assert padded[0, 11:-12, 13:-14].all()


def test_bias_field_is_smooth_positive_and_bounded():
    """The logarithm stays within the strength that was asked for."""
    field = data.bias_field((4, 16, 12), np.random.default_rng(0), strength=0.15)
    assert np.abs(np.log(field)).max() == pytest.approx(0.15, rel=1e-5)
    assert np.abs(np.diff(np.log(field), axis=1)).max() < 0.1


def test_air_is_rayleigh_distributed():
    """Where the template is 0 the magnitude of complex noise has the mean sigma * sqrt(pi / 2)."""
    air = np.zeros((8, 64, 64), dtype=np.float32)
    image = data.simulate_acquisition(air, np.random.default_rng(1), noise=0.04)
    assert image.mean() / image.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.02)


def test_cases_repeat_with_the_seed_and_differ_without(toy):
    """The same seed gives the same cases; another seed or another acquisition gives another image of the same labels."""
    first, again, other = (data.cut_cases(*toy, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(first, other, strict=True))
    one, two = (case for case in first if case.name.startswith("brain_z012"))
    assert np.array_equal(one.labels, two.labels)
    assert not np.array_equal(one.image, two.image)


def test_a_written_dataset_is_what_nnunet_expects(toy, tmp_path):
    """Every training case has an image and labels, the counts agree, and the test case is with neither fold."""
    cases = data.cut_cases(*toy, seed=0)
    data.write_dataset(cases, tmp_path)
    described = json.loads((tmp_path / "dataset.json").read_text())
    images, labels = sorted((tmp_path / "imagesTr").iterdir()), sorted((tmp_path / "labelsTr").iterdir())
    assert len(images) == len(labels) == described["numTraining"] == len(cases) - 1
    (fold,) = json.loads((tmp_path / "splits_final.json").read_text())
    assert {f"{name}_0000.nii.gz" for name in fold["train"] + fold["val"]} == {path.name for path in images}
    test = next(case for case in cases if case.role == "test")
    read = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "imagesTs" / f"{test.name}_0000.nii.gz")))
    assert np.array_equal(read, test.image)
    assert not list(tmp_path.rglob(".partial*"))


def test_an_image_that_cannot_be_written_is_named(tmp_path):
    """One line with the path, and nothing beside it."""
    with pytest.raises(OutputError, match=r"none/case\.nii\.gz cannot be written"):
        data.write_image(np.zeros((2, 2, 2), dtype=np.uint8), tmp_path / "none" / "case.nii.gz")
    assert not list(tmp_path.iterdir())


def test_without_nilearn_one_line_says_what_to_install(monkeypatch):
    """A missing package is named with the command that installs it."""
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(SetupError, match=r'nilearn is missing .*: pip install "nnunet_norm\[demo\]"'):
        data.load_template()
