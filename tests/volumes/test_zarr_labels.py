"""Labels on disk: written shard by shard by many processes, whole under their final name or not there."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from nnunet_norm.errors import InputImageError, OutputError
from nnunet_norm.volumes import (
    LabelVolume,
    ZarrImage,
    discard_unfinished,
    find_volumes,
    is_finished,
    layout,
    unfinished_path,
    zarr_labels,
)

SHAPE = (20, 33, 40)
CLASSES = {0: "background", 1: "cell", 7: "nucleus"}

WRITER = """
import sys
import numpy as np
from nnunet_norm.volumes import LabelVolume, layout, parts
layout.CHUNK_VOXELS, layout.SHARD_VOXELS = 8**3, 16**3
labels = np.load(sys.argv[1])
volume = LabelVolume(sys.argv[2], shape=labels.shape, class_names={0: "a", 7: "b"}, provenance={})
for region in volume.shards(parts(labels.shape, volume.shard, 2)[int(sys.argv[3])]):
    volume.write(region, labels[tuple(slice(*side) for side in region)])
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Volumes of a test have many shards, as large ones have."""
    monkeypatch.setattr(layout, "CHUNK_VOXELS", 8**3)
    monkeypatch.setattr(layout, "SHARD_VOXELS", 16**3)


def label_volume(folder, **changed):
    arguments = {"shape": SHAPE, "class_names": CLASSES, "provenance": {"model": "m", "version": 1}} | changed
    return LabelVolume(folder / "case.zarr", **arguments)


def some_labels(seed=0):
    return np.random.default_rng(seed).choice(np.array([0, 1, 7], np.uint8), SHAPE)


def contents(folder):
    """Every file of a folder and what is in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write_all(volume, labels, probabilities=None):
    for region in volume.shards():
        inside = tuple(slice(*side) for side in region)
        volume.write(region, labels[inside], None if probabilities is None else probabilities[(slice(None), *inside)])


def test_what_is_written_is_read_again(tmp_path):
    """Enforces labels, probabilities, OME-NGFF metadata, class names and provenance in a zarr that others can open."""
    labels = some_labels()
    probabilities = np.random.default_rng(1).random((3, *SHAPE), np.float32)
    volume = label_volume(
        tmp_path,
        num_probabilities=3,
        spacing=(2.0, 0.5, 0.25),
        units=("micrometer",) * 3,
        translation=(1.0, 2.0, 3.0),
    )
    assert (volume.shard, volume.chunk) == ((16, 16, 16), (8, 8, 8))
    write_all(volume, labels, probabilities)
    volume.finish()
    group = zarr.open_group(LocalStore(tmp_path / "case.zarr", read_only=True), mode="r")
    np.testing.assert_array_equal(group["0"][...], labels)
    np.testing.assert_array_equal(group["probabilities"][...], probabilities)
    assert group["0"].dtype == np.uint8
    assert group["probabilities"].shards == (1, 16, 16, 16)
    assert group.attrs["nnunet_norm"] == {"model": "m", "version": 1}
    told = group.attrs["ome"]
    assert told["version"] == "0.5"
    assert told["image-label"]["properties"][2] == {"label-value": 7, "class": "nucleus"}
    image = ZarrImage(tmp_path / "case.zarr", channels=1)
    assert (image.spacing, image.translation, image.units) == ((2.0, 0.5, 0.25), (1.0, 2.0, 3.0), ("micrometer",) * 3)
    np.testing.assert_array_equal(image.read((slice(None),) * 3)[0], labels)
    assert os.listdir(tmp_path) == ["case.zarr"]


def test_a_large_label_needs_two_bytes(tmp_path):
    """Enforces uint16 where a class has a number above 255, and a plane's spacing without z as 1."""
    volume = label_volume(tmp_path, shape=(1, 20, 20), class_names={0: "a", 300: "b"}, spacing=(999.0, 2.0, 2.0))
    volume.write(volume.whole, np.full((1, 20, 20), 300, np.uint16))
    volume.finish()
    image = ZarrImage(tmp_path / "case.zarr", channels=1)
    assert image.dtype == np.uint16
    assert image.spacing == (1.0, 2.0, 2.0)
    assert (image.read((0, slice(None), slice(None))) == 300).all()


def test_an_output_has_its_name_only_when_it_is_finished(tmp_path):
    """Enforces that an unfinished output is not found, not read, and not taken for finished under any name."""
    volume = label_volume(tmp_path)
    path = tmp_path / "case.zarr"
    write_all(volume, some_labels())
    assert not is_finished(path)
    assert not path.exists()
    assert unfinished_path(path) == tmp_path / ".case.zarr.unfinished"
    assert unfinished_path(path).is_dir()
    with pytest.raises(InputImageError, match="holds none"):
        find_volumes(tmp_path)
    unfinished_path(path).rename(path)
    assert not is_finished(path)
    with pytest.raises(InputImageError, match="unfinished"):
        find_volumes(tmp_path)
    path.rename(unfinished_path(path))
    volume.finish()
    assert is_finished(path)


@pytest.mark.parametrize(
    "region", [((0, 8), (0, 33), (0, 40)), ((4, 20), (0, 16), (0, 16)), ((0, 16), (0, 16), (0, 48))]
)
def test_regions_that_share_a_shard_are_refused(tmp_path, region):
    """Enforces whole shards: two writers of one would silently lose data."""
    with pytest.raises(OutputError, match=r"'case\.zarr' is not made of whole shards of \(16, 16, 16\)"):
        label_volume(tmp_path).write(region, np.zeros([b - a for a, b in region], np.uint8))


@pytest.mark.parametrize("together", [True, False])
def test_the_order_and_size_of_writes_does_not_matter(tmp_path, together):
    """Enforces the same bytes on disk from one large write and from shards in any order, also written twice."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    labels = some_labels()
    labels[:16, :16, :16] = 0
    first, second = label_volume(tmp_path / "a"), label_volume(tmp_path / "b")
    first.write(first.whole, labels)
    if together:
        second.write(second.whole, some_labels(5))  # to be replaced, also where there is nothing to be stored
    for region in reversed(list(second.shards())):
        second.write(region, labels[tuple(slice(*side) for side in region)])
    assert contents(first.unfinished) == contents(second.unfinished)
    assert not (first.unfinished / "0/c/0/0/0").exists()


def test_a_torn_shard_is_written_again(tmp_path):
    """Enforces that a shard which a power cut left behind is replaced and not read, and nothing of a killed write is left."""
    labels = some_labels()
    volume = label_volume(tmp_path)
    write_all(volume, labels)
    before = contents(volume.unfinished / "0")
    for file in (volume.unfinished / "0/c").rglob("2"):
        if file.is_file():
            file.write_bytes(b"torn")
            file.with_name("2.0123.partial").write_bytes(b"torn")
    write_all(volume, labels)
    volume.finish()
    assert contents(tmp_path / "case.zarr" / "0") == before
    np.testing.assert_array_equal(ZarrImage(tmp_path / "case.zarr", channels=1).read((slice(None),) * 3)[0], labels)


def test_processes_share_an_output(tmp_path):
    """Enforces that two processes at once make one output, each its part, equal to that of one process."""
    np.save(tmp_path / "labels.npy", some_labels())
    path = tmp_path / "case.zarr"
    arguments = [sys.executable, "-c", WRITER, str(tmp_path / "labels.npy"), str(path)]
    processes = [subprocess.Popen([*arguments, str(part)]) for part in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    volume = LabelVolume(path, shape=SHAPE, class_names={0: "a", 7: "b"}, provenance={})
    volume.finish()
    np.testing.assert_array_equal(ZarrImage(path, channels=1).read((slice(None),) * 3)[0], some_labels())
    assert sorted(os.listdir(tmp_path)) == ["case.zarr", "labels.npy"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": (20, 33, 41)}, r"shape.* there, .* now"),
        ({"provenance": {"model": "n", "version": 1}}, r"nnunet_norm\.model: 'm' there, 'n' now"),
        ({"num_probabilities": 2}, "begun with other settings"),
    ],
)
def test_an_output_begun_with_other_settings_is_refused(tmp_path, changed, message):
    """Enforces that nobody writes into another run's output; what was begun is left as it is."""
    before = contents(label_volume(tmp_path).unfinished)
    with pytest.raises(OutputError, match=message) as told:
        label_volume(tmp_path, **changed)
    assert "\n" not in str(told.value)
    assert contents(tmp_path / ".case.zarr.unfinished") == before
    assert os.listdir(tmp_path) == [".case.zarr.unfinished"]
    discard_unfinished(tmp_path / "case.zarr")
    assert os.listdir(tmp_path) == []
    discard_unfinished(tmp_path / "case.zarr")
    label_volume(tmp_path, **changed)


def test_what_is_there_is_replaced_only_if_wanted(tmp_path):
    """Enforces a refusal before anything is written, and with ``overwrite`` the old output until the new is finished."""
    path = tmp_path / "case.zarr"
    old = label_volume(tmp_path)
    write_all(old, some_labels())
    old.finish()
    with pytest.raises(OutputError, match=r"case\.zarr' is there already"):
        label_volume(tmp_path)
    new = label_volume(tmp_path, overwrite=True)
    write_all(new, some_labels(3))
    np.testing.assert_array_equal(ZarrImage(path, channels=1).read((slice(None),) * 3)[0], some_labels())
    new.finish()
    np.testing.assert_array_equal(ZarrImage(path, channels=1).read((slice(None),) * 3)[0], some_labels(3))
    assert os.listdir(tmp_path) == ["case.zarr"]


@pytest.mark.parametrize("step", [0, 1])
def test_finishing_can_be_repeated_after_a_crash(tmp_path, monkeypatch, step):
    """Enforces that an end between any two renames loses nothing, and that finishing again completes it."""
    old = label_volume(tmp_path)
    write_all(old, some_labels())
    old.finish()
    new = label_volume(tmp_path, overwrite=True)
    write_all(new, some_labels(3))
    renames = []

    def rename(source, target):
        if len(renames) == step:
            raise KeyboardInterrupt
        renames.append(os.replace(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(zarr_labels.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            new.finish()
    label_volume(tmp_path, overwrite=True).finish()
    read = ZarrImage(tmp_path / "case.zarr", channels=1).read((slice(None),) * 3)[0]
    np.testing.assert_array_equal(read, some_labels(3))
    assert os.listdir(tmp_path) == ["case.zarr"]


def test_data_are_on_the_disk_when_write_returns(tmp_path, monkeypatch):
    """Enforces fsync of the shard's file and of every folder that leads to it."""
    volume = label_volume(tmp_path)
    synced = []
    sync = os.fsync

    def fsync(descriptor):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), volume.unfinished))
        sync(descriptor)

    monkeypatch.setattr(zarr_labels.os, "fsync", fsync)
    volume.write(((16, 20), (32, 33), (0, 16)), np.ones((4, 1, 16), np.uint8))
    assert synced == ["0/c/1/2/0", "0/c/1/2", "0/c/1", "0/c", "0"]


@contextlib.contextmanager
def files_at_most(size):
    """No file can grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """Enforces an error with its reason and remedy, a disk that is left as it was, and that writing can go on."""
    labels = np.random.default_rng(0).integers(0, 8, SHAPE, np.uint8)
    volume = label_volume(tmp_path)
    before = contents(tmp_path)
    with (
        pytest.raises(OutputError, match=r"case\.zarr' cannot be written \(File too large\): make room"),
        files_at_most(1000),
    ):
        write_all(volume, labels)
    assert contents(tmp_path) == before

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(zarr_labels.os, "fsync", full)
        with pytest.raises(OutputError, match=r"\(No space left on device\): make room, or choose another folder"):
            write_all(volume, labels)
        with pytest.raises(OutputError, match="No space left"):
            LabelVolume(tmp_path / "other.zarr", shape=SHAPE, class_names=CLASSES, provenance={})
    assert os.listdir(tmp_path) == [".case.zarr.unfinished"]
    write_all(volume, labels)
    volume.finish()


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    """Enforces the refusal of a folder that cannot be written to."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"case\.zarr' cannot be written \(Not a directory\)"):
        label_volume(tmp_path / "file")


def test_metadata_follow_the_caller(tmp_path):
    """Enforces chunks, codecs and keys that do not depend on what a version of zarr takes by default."""
    label_volume(tmp_path)
    stored = json.loads((tmp_path / ".case.zarr.unfinished/0/zarr.json").read_text())
    assert stored["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    assert stored["dimension_names"] == ["z", "y", "x"]
    inner = stored["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "zstd"]
    assert inner[1]["configuration"] == {"level": 3, "checksum": False}
