"""Zarr images of every kind as (C, z, y, x), and what is refused."""

import ast
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from zarrs import ome, write_array, write_group

from nnunet_norm import volumes
from nnunet_norm.errors import InputImageError, SetupError
from nnunet_norm.volumes import ZarrImage, find_volumes, holds_volumes, is_volume
from nnunet_norm.volumes.ome import Level

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 1000, (2, 9, 11, 13)).astype(np.uint16)
WHOLE = (slice(None),) * 3


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("names", "index", "channels"),
    [
        (None, (0,), 1),
        (None, (), 2),
        (None, (0, 0), 1),
        (("c", "y", "x"), (slice(None), 0), 2),
        (("z", "y", "x", "c"), "zyxc", 2),
        (("t", "x", "y", "c", "z"), "xycz", 2),
        (("row", "column", "z"), (0,), 1),
    ],
)
def test_axes_are_told_by_name_or_rank(tmp_path, zarr_format, names, index, channels):
    """Enforces (C, z, y, x) from any axes: those that an array names, else those of its rank."""
    if isinstance(index, str):
        stored = IMAGE.transpose(["czyx".index(axis) for axis in index])
        stored = stored[None] if "t" in names else stored
        expected = IMAGE
    else:
        stored = IMAGE[index]
        expected = IMAGE[:, :1] if names == ("c", "y", "x") else IMAGE[:channels, : 1 if stored.ndim == 2 else None]
    image = ZarrImage(write_array(tmp_path / "a.zarr", stored, zarr_format=zarr_format, names=names), channels=channels)
    assert image.shape == expected.shape
    assert image.spacing is None
    read = image.read(WHOLE)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)


def test_regions_are_read_as_numpy_indexes(tmp_path):
    """Enforces slices, negative indices and numbers that drop an axis, across the borders of chunks and shards."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", IMAGE, chunks=(1, 4, 4, 4), shards=(2, 8, 8, 8)), channels=2)
    assert image.chunk == (4, 4, 4)
    for region in [(3, slice(2, 9), slice(-5, None)), (slice(1, 8), -1, 0), (slice(4, 2), slice(None), slice(0, 99))]:
        np.testing.assert_array_equal(image.read(region), IMAGE[(slice(None), *region)])
    with pytest.raises(IndexError, match="step"):
        image.read((slice(0, 9, 2), 0, 0))
    with pytest.raises(IndexError, match="index 9 is outside an axis of extent 9"):
        image.read((9, 0, 0))


@pytest.mark.parametrize("dtype", ["bool", "int8", ">i4", "uint64", "float16", "float64"])
def test_values_are_cast_as_by_numpy(tmp_path, dtype):
    """Enforces float32 from every type that has numbers."""
    values = RNG.normal(0, 50, (3, 4, 5)).astype(dtype)
    read = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=1).read(WHOLE)
    np.testing.assert_array_equal(read[0], values.astype(np.float32))


@pytest.mark.parametrize(("version", "zarr_format"), [("0.4", 2), ("0.5", 3)])
def test_levels_of_an_ome_zarr(tmp_path, version, zarr_format):
    """Enforces that a level is found by number or path, with its own spacing, units, place and channels."""
    half = IMAGE[:, :, ::2, ::2]
    told = ome(
        "tczyx",
        [(1, 1, 2, 0.5, 0.5), (1, 1, 2, 1, 1)],
        version=version,
        names=["DAPI", "GFP"],
        shared=(60, 1, 1, 2, 2),
        translations=[(0, 0, 1, 2, 3), (0, 0, 1, 2.25, 3.25)],
    )
    path = write_group(tmp_path / "x.ome.zarr", {"s0": IMAGE[None], "s1": half[None]}, told, zarr_format=zarr_format)
    image = ZarrImage(path, channels=2)
    assert (image.name, image.level) == ("x", "s0")
    assert (image.spacing, image.translation) == ((2.0, 1.0, 1.0), (1.0, 4.0, 6.0))
    assert image.units == ("micrometer",) * 3
    assert image.channel_names == ("DAPI", "GFP")
    np.testing.assert_array_equal(image.read(WHOLE), IMAGE)
    for level in (1, "1", "s1"):
        coarse = ZarrImage(path, channels=2, level=level)
        assert coarse.spacing == (2.0, 2.0, 2.0)
        np.testing.assert_array_equal(coarse.read(WHOLE), half)
    assert image.shape_of(image.levels[1]) == half.shape[1:]
    with pytest.raises(InputImageError, match=r"level 7 does not exist: choose the level from 0 \(s0\), 1 \(s1\)"):
        ZarrImage(path, channels=2, level="7")


def test_spacing_that_is_not_told_is_unknown(tmp_path):
    """Enforces None where there is no scale, and nnU-Net's 999 on the z axis that a plane does not have."""
    path = write_group(tmp_path / "x.zarr", {"s0": IMAGE[0, 0]}, ome("yx", [(0.5, 0.25)], unit=None))
    image = ZarrImage(path, channels=1)
    assert (image.shape, image.spacing, image.units) == ((1, 1, 11, 13), (999.0, 0.5, 0.25), (None, None, None))
    path = write_group(tmp_path / "y.zarr", {"s0": IMAGE[0]}, ome("zyx", [None]))
    assert ZarrImage(path, channels=1).spacing is None


def test_arrays_of_a_plain_group_are_levels(tmp_path):
    """Enforces that a group without multiscales is read if it is clear which array is meant."""
    one = write_group(tmp_path / "one.zarr", {"raw": IMAGE[0]}, {})
    assert ZarrImage(one, channels=1).levels == (Level("raw"),)
    two = write_group(tmp_path / "two.zarr", {"raw": IMAGE[0], "labels": IMAGE[1]}, {})
    np.testing.assert_array_equal(ZarrImage(two, channels=1, level="raw").read(WHOLE)[0], IMAGE[0])
    with pytest.raises(InputImageError, match=r"which array is meant: choose the level from 0 \(labels\), 1 \(raw\)"):
        ZarrImage(two, channels=1)


def test_identity_tells_images_apart(tmp_path):
    """Enforces an identity that is JSON, the same for a copy elsewhere, and another for other metadata."""
    identities = [
        ZarrImage(write_array(tmp_path / name / "a.zarr", values, **given), channels=1).identity()
        for name, values, given in [
            ("a", IMAGE[0], {}),
            ("b", IMAGE[0], {}),
            ("c", IMAGE[0], {"fill_value": 7}),
            ("d", IMAGE[0, :5], {}),
        ]
    ]
    assert json.loads(json.dumps(identities[0])) == identities[0] == identities[1]
    assert identities[0] != identities[2] != identities[3]
    assert str(tmp_path) not in json.dumps(identities)
    assert identities[3]["shape"] == [1, 5, 11, 13]


def test_images_can_be_sent_to_other_processes(tmp_path):
    """Enforces that an image survives pickling."""
    image = ZarrImage(write_array(tmp_path / "a.zarr", IMAGE), channels=2)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(WHOLE), IMAGE)


def test_volumes_are_found_by_case(tmp_path):
    """Enforces one volume or a folder of them, by case, without hidden and other folders."""
    for name in ("b.zarr", "a.ome.zarr", ".c.zarr.unfinished", ".d.zarr"):
        write_array(tmp_path / name, IMAGE)
    (tmp_path / "other").mkdir()
    assert [(v.case, v.path.name) for v in find_volumes(tmp_path)] == [("a", "a.ome.zarr"), ("b", "b.zarr")]
    assert [v.case for v in find_volumes(tmp_path / "b.zarr")] == ["b"]
    assert holds_volumes(tmp_path)
    assert not is_volume(tmp_path)
    assert is_volume(tmp_path / "b.zarr")
    assert not holds_volumes(tmp_path / "b.zarr")
    assert not holds_volumes(tmp_path / "other")
    with pytest.raises(InputImageError, match=r"'.*other' is no zarr folder and holds none"):
        find_volumes(tmp_path / "other")
    write_array(tmp_path / "b.ome.zarr", IMAGE)
    with pytest.raises(InputImageError, match=r"'b\.ome\.zarr' and 'b\.zarr' are both case 'b'"):
        find_volumes(tmp_path)
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "b.ome.zarr").rename(tmp_path / "e.zarr")
    with pytest.raises(InputImageError, match=r"'empty\.zarr' is no zarr"):
        find_volumes(tmp_path)


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (IMAGE[:, None], None, r"rank 5, shape \(2, 1, 9, 11, 13\): its axes must be \(y, x\), \(z, y, x\)"),
        (IMAGE[0, 0, 0], None, r"rank 1, shape \(13,\)"),
        (IMAGE[0], None, r"has 1 channel \(axes z, y, x, shape \(9, 11, 13\)\), the model needs 2"),
        (IMAGE.transpose(1, 2, 3, 0), None, r"has 9 channels \(axes c, z, y, x.*needs 2: .* name the axes"),
        (IMAGE[:, 0, None], ("c", "t", "y", "x"), None),
        (IMAGE[:, :3], ("c", "t", "y", "x"), r"has 3 points in time"),
        (IMAGE.astype(np.complex64), None, "values of type complex64"),
        (IMAGE[:, :0], None, r"shape \(2, 0, 11, 13\) is empty"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, values, names, message):
    """Enforces one line for a wrong rank, number of channels, several times, and values that are no numbers."""
    path = write_array(tmp_path / "a.zarr", values, names=names)
    if message is None:
        assert ZarrImage(path, channels=2).shape == (2, 1, 11, 13)
        return
    with pytest.raises(InputImageError, match=f"volume 'a' .*{message}") as told:
        ZarrImage(path, channels=2)
    assert "\n" not in str(told.value)


def test_folders_that_are_no_images_are_refused(tmp_path):
    """Enforces one line for a folder without metadata, a group without image, damaged metadata and missing levels."""
    (tmp_path / "no.zarr").mkdir()
    with pytest.raises(InputImageError, match=r"'.*no\.zarr' is no zarr"):
        ZarrImage(tmp_path / "no.zarr", channels=1)
    series = write_group(tmp_path / "series.zarr", {}, {"bioformats2raw.layout": 3})
    write_group(series / "0", {"s0": IMAGE}, ome("czyx", [(1, 1, 1, 1)]))
    with pytest.raises(InputImageError, match=r"no multiscales\): name one of the groups in it: 0"):
        ZarrImage(series, channels=2)
    lacking = write_group(tmp_path / "l.zarr", {"s0": IMAGE}, ome("czyx", [(1, 1, 1, 1)] * 2))
    with pytest.raises(InputImageError, match=r"'l\.zarr' is unfinished or damaged: its metadata name s1"):
        ZarrImage(lacking, channels=2)
    wrong = write_group(tmp_path / "w.zarr", {"s0": IMAGE}, ome("czyx", [(1, 1, -1, 1)]))
    with pytest.raises(InputImageError, match=r"OME-Zarr metadata of 'w\.zarr' are not valid .*-1"):
        ZarrImage(wrong, channels=2)
    for name, content in [("zarr.json", "{"), ("zarr.json", "[]"), ("zarr.json", '{"node_type": "array"}')]:
        broken = write_array(tmp_path / "b.zarr", IMAGE, overwrite=True)
        (broken / name).write_text(content)
        with pytest.raises(InputImageError, match=r"b\.zarr.*(cannot be read|no JSON object|cannot be opened)") as told:
            ZarrImage(broken, channels=2)
        assert "\n" not in str(told.value)
    array = write_array(tmp_path / "a.zarr", IMAGE)
    with pytest.raises(InputImageError, match="level 1 of volume 'a': it is a single array"):
        ZarrImage(array, channels=2, level=1)


@pytest.mark.parametrize("marked", ["name", "file"])
def test_an_unfinished_output_is_refused(tmp_path, marked):
    """Enforces that what a prediction has not finished is not taken for an image, however it was renamed."""
    path = write_array(tmp_path / (".a.zarr.unfinished" if marked == "name" else "a.zarr"), IMAGE)
    if marked == "file":
        (path / ".unfinished").touch()
    with pytest.raises(InputImageError, match=r"a\.zarr.* is unfinished"):
        ZarrImage(path, channels=2)


@pytest.mark.parametrize(("zarr_format", "file"), [(2, "0.1.0.0"), (3, "c/0/1/0/0")])
@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_chunk_that_cannot_be_decoded_is_told(tmp_path, zarr_format, file, content):
    """Enforces the region in the message, for chunks that are empty, something else, or cut off."""
    path = write_array(tmp_path / "a.zarr", IMAGE, zarr_format=zarr_format)
    chunk = path / file
    chunk.write_bytes(chunk.read_bytes()[:-9] if content is None else content)
    image = ZarrImage(path, channels=2)
    np.testing.assert_array_equal(image.read((slice(0, 8), slice(None), slice(None))), IMAGE[:, :8])
    with pytest.raises(
        InputImageError, match=r"volume 'a' cannot be read in z 8:9, y 0:11, x 0:13 \(.+\): copy"
    ) as told:
        image.read((slice(8, 9), slice(None), slice(None)))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("float16", np.inf), ("float64", 1e300)])
def test_values_that_are_not_finite_are_told(tmp_path, dtype, value):
    """Enforces how many, where, and that a number too large for float32 is one of them."""
    values = np.zeros((2, 9, 11, 13), dtype)
    values[1, 4, 5, 6:8] = value
    image = ZarrImage(write_array(tmp_path / "a.zarr", values), channels=2)
    message = (
        r"volume 'a' has 2 values .* in z 3:9, y 0:11, x 0:13, the first in channel 1 at \(z, y, x\) = \(4, 5, 6\)"
    )
    with pytest.raises(InputImageError, match=message):
        image.read((slice(3, 9), slice(None), slice(None)))


def test_zarr_is_imported_when_it_is_needed(tmp_path, monkeypatch):
    """Enforces that no module imports zarr, that volumes are found without it, and one clear line where it is needed."""
    folder = Path(volumes.__file__).parent
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    assert not [node for node in imports if ast.unparse(node).split()[1].split(".")[0] == "zarr"]
    path = write_array(tmp_path / "a.zarr", IMAGE)
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert [v.case for v in find_volumes(path)] == ["a"]
    with pytest.raises(SetupError, match=r"needs the package zarr .*pip install 'nnunet_norm\[volumes\]'"):
        ZarrImage(path, channels=2)
