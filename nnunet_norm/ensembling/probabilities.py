"""Probabilities in nnU-Net's ``.npz`` files, read piece by piece: no more than one piece of a file is in memory."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_norm.errors import EnsembleError

MEMBER = "probabilities"
"""nnU-Net's key."""

VOXELS = 2**20
"""Voxels of one class that are read at a time."""

TOLERANCE = 1e-3
"""How far beyond 0 and 1 a probability may lie: half precision and sums round."""


@dataclass(frozen=True)
class Header:
    """What a file says of its array before it is read.

    Attributes:
        shape: (K, x, y, z).
        dtype: floating point.
        fortran: whether the first axis varies fastest in the file, which numpy may choose for one class.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Header]]:
    """The array's bytes behind its header.

    Raises:
        EnsembleError: the file cannot be read, is not whole, or holds something else; also out of the block.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{MEMBER}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            if dtype.kind != "f" or len(shape) < 3 or not math.prod(shape):
                raise EnsembleError(
                    f"{path} holds {dtype} of shape {shape}, and no probabilities: predict the case again"
                )
            yield stream, Header(tuple(shape), dtype, bool(fortran))
    except KeyError as error:
        raise EnsembleError(f"{path} has no {MEMBER!r}: give folders that nnU-Net wrote with probabilities") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, EnsembleError):
            raise
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise EnsembleError(f"{path} cannot be read ({why}): copy it again, or predict the case again") from error


def read_header(path: Path) -> Header:
    """Shape and type, without reading the array.

    Raises:
        EnsembleError: the file cannot be read, or holds something else than probabilities.
    """
    with _opened(path) as (_, header):
        return header


def read_pieces(path: Path) -> Iterator[tuple[int, slice, NDArray[Any]]]:
    """Every piece of the array in order: its class, the voxels of the flat image, and their values in the file's type.

    Of an array in Fortran's order all is read at once.

    Raises:
        EnsembleError: the file is not whole, or has values that are no probabilities; both can show late.
    """
    with _opened(path) as (stream, header):
        classes, *extent = header.shape
        count = math.prod(extent)
        whole = None
        if header.fortran:
            flat = np.frombuffer(_exactly(stream, classes * count * header.dtype.itemsize), header.dtype)
            whole = np.ascontiguousarray(flat.reshape(header.shape, order="F")).reshape(classes, count)
        for number in range(classes):
            for start in range(0, count, VOXELS):
                place = slice(start, min(start + VOXELS, count))
                if whole is not None:
                    values = whole[number, place]
                else:
                    data = _exactly(stream, (place.stop - start) * header.dtype.itemsize)
                    values = np.frombuffer(data, header.dtype)
                _check(values, path, number)
                yield number, place, values
        if stream.read(1):  # reading on to the end also has the checksum compared
            raise EnsembleError(f"{path} is longer than its header says: copy it again, or predict the case again")


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it ends too early")
    return data


def _check(values: NDArray[Any], path: Path, number: int) -> None:
    low, high = float(values.min()), float(values.max())
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:  # false for NaN, too, which both pass on
        return
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        what = f"has {bad} values that are not finite (NaN or infinity) among the probabilities of class {number}"
    else:
        what = f"has values from {low:g} to {high:g} for class {number}, and probabilities lie between 0 and 1"
    raise EnsembleError(f"{path} {what}: predict the case again")
