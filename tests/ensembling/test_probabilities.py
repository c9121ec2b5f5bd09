import io
import zipfile

import numpy as np
import pytest

from nnunet_norm.ensembling import probabilities
from nnunet_norm.ensembling.probabilities import read_header, read_pieces
from nnunet_norm.errors import EnsembleError


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(probabilities, "VOXELS", 100)


def drawn(shape=(3, 6, 7, 8), dtype=np.float32):
    return np.random.default_rng(0).random(shape).astype(dtype)


def joined(path, shape):
    """The whole array, from its pieces."""
    found = np.full((shape[0], int(np.prod(shape[1:]))), np.nan)
    for number, place, values in read_pieces(path):
        assert len(values) <= 100
        found[number, place] = values
    return found.reshape(shape)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pieces_are_the_array(tmp_path, dtype, order, save):
    """Whatever type and order numpy wrote it in, compressed or not; the header is known before."""
    array = np.asarray(drawn(dtype=dtype), order=order)
    save(tmp_path / "x.npz", probabilities=array)
    header = read_header(tmp_path / "x.npz")
    assert (header.shape, header.dtype, header.fortran) == (array.shape, array.dtype, order == "F")
    np.testing.assert_array_equal(joined(tmp_path / "x.npz", array.shape), array)


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "1 values that are not finite"), (np.inf, "1 values"), (2, "to 2 for")]
)
def test_what_is_no_probability_is_named_with_file_and_class(tmp_path, value, what):
    """NaN, infinity and logits do not enter an average unseen."""
    array = drawn()
    array[1, 2, 3, 4] = value
    np.savez_compressed(tmp_path / "x.npz", probabilities=array)
    with pytest.raises(EnsembleError, match=rf"x\.npz has .*{what}.*class 1"):
        joined(tmp_path / "x.npz", array.shape)


def test_a_damaged_byte_is_noticed(tmp_path):
    """The checksum is compared, though the array is read in pieces."""
    np.savez(tmp_path / "x.npz", probabilities=drawn())
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[2000] ^= 1  # of the last bits of a mantissa: still a probability
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(EnsembleError, match=r"x\.npz cannot be read \(Bad CRC-32"):
        joined(tmp_path / "x.npz", (3, 6, 7, 8))


def test_a_file_that_is_cut_off_or_something_else_is_refused(tmp_path):
    """Files of another kind, of another content, without the key, too short and too long."""
    with pytest.raises(EnsembleError, match=r"x\.npz cannot be read \(No such file"):
        read_header(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "x.npz", probabilities=drawn())
    content = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(EnsembleError, match=r"x\.npz cannot be read \(File is not a zip file\)"):
        read_header(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", logits=drawn())
    with pytest.raises(EnsembleError, match="has no 'probabilities'"):
        read_header(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", probabilities=np.ones((2, 3, 4, 5), np.int64))
    with pytest.raises(EnsembleError, match=r"holds int64 of shape \(2, 3, 4, 5\)"):
        read_header(tmp_path / "x.npz")
    buffer = io.BytesIO()
    np.save(buffer, drawn())
    for change, why in ((buffer.getvalue()[:-4], "it ends too early"), (buffer.getvalue() + b"more", "is longer")):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("probabilities.npy", change)
        with pytest.raises(EnsembleError, match=why):
            joined(tmp_path / "x.npz", (3, 6, 7, 8))
