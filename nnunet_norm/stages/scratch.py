"""Where the maps of a whole image lie between the pieces of a network: in memory, or in files that are mapped to it.

Maps lie channels last, so that a box of one is read in long runs, and is what the convolutions of a CPU like best.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from nnunet_norm.errors import OutputError
from nnunet_norm.stages.regions import Region, slices

logger = logging.getLogger(__name__)

FOLDER = f"nnunet_norm_scratch_{platform.node()}_"
"""Beginning of the name of a run's folder of scratch. On some shared file systems locks hold on one computer only, so each
removes what its own runs left."""


def channels_last(x: Tensor) -> Tensor:
    """A copy of (N, C, *spatial) with the channels last in memory, where torch knows such a format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    copy = torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=formats.get(x.ndim, torch.contiguous_format)
    )
    return copy.copy_(x)


class StoredMap:
    """A map (1, C, *extents) of the whole image."""

    def __init__(self, data: Tensor) -> None:
        """Take the memory, (*extents, C)."""
        self.data = data

    def read(self, region: Region) -> Tensor:
        """A copy of a region, (1, C, *region), channels last."""
        return channels_last(self.data[slices(region)].movedim(-1, 0)[None])

    def write(self, region: Region, values: Tensor) -> None:
        """Put (1, C, *region) in its place."""
        self.data[slices(region)] = values[0].movedim(0, -1)


class Scratch:
    """Scratch in a device's memory."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self.device = device

    @property
    def is_on_disk(self) -> bool:
        """Whether maps lie in files."""
        return False

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory; on the CPU if the device has not that much left."""
        try:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:
            logger.info("a map does not fit into the device's memory and is kept in that of the computer")
            return torch.empty(tuple(shape), dtype=dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed memory."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def free(self, data: Tensor) -> None:
        """Give the memory back."""
        del data

    def name_of(self, data: Tensor) -> str:
        """The name under which ``reopen`` finds a map; only of scratch on a disk."""
        raise NotImplementedError

    def reopen(self, name: str, shape: Sequence[int]) -> Tensor:
        """A map that another process left; one axis may be -1, as long as the file says. Only of scratch on a disk."""
        raise NotImplementedError


class ScratchOnDisk(Scratch):
    """Scratch in memory-mapped files of one folder, one file per map; a file is removed when its map is freed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._files: dict[int, Path] = {}
        self._made = max((int(path.stem.removeprefix("map_")) for path in folder.glob("map_*")), default=0)

    @property
    def is_on_disk(self) -> bool:
        """See ``Scratch.is_on_disk``."""
        return True

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A mapped file of zeros; its place on the disk is reserved at once.

        Raises:
            OutputError: the disk has not that much room.
        """
        count = torch.Size(shape).numel()
        self._made += 1
        path = self.folder / f"map_{self._made}.{str(dtype).removeprefix('torch.')}"
        try:
            with path.open("wb") as file:
                reserve(file.fileno(), max(count * dtype.itemsize, 1))
            data = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(tuple(shape))
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            raise OutputError(
                f"scratch of {count * dtype.itemsize} bytes cannot be made in {str(self.folder)!r} "
                f"({getattr(error, 'strerror', None) or error}): choose a --scratch folder with more room"
            ) from error
        self._files[data.data_ptr()] = path
        return data

    def name_of(self, data: Tensor) -> str:
        """See ``Scratch.name_of``."""
        return self._files[data.data_ptr()].name

    def reopen(self, name: str, shape: Sequence[int]) -> Tensor:
        """See ``Scratch.reopen``.

        Raises:
            OutputError: there is no such file, or it is not of that size.
        """
        path = self.folder / name
        dtype = getattr(torch, path.suffix.removeprefix("."), None)
        count = path.stat().st_size // dtype.itemsize if isinstance(dtype, torch.dtype) and path.is_file() else 0
        known = math.prod(edge for edge in shape if edge != -1)
        if not count or count % known or (-1 not in shape and count != known):
            raise OutputError(
                f"scratch {str(path)!r} of the prediction that is to be continued is not whole: start it again"
            )
        data = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(tuple(shape))
        self._files[data.data_ptr()] = path
        return data

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``allocate``: new files are zero."""
        return self.allocate(shape, dtype)

    def free(self, data: Tensor) -> None:
        """Remove the file; its pages go as soon as nobody refers to the map."""
        with suppress(PermissionError):  # Windows keeps files that are mapped; they go with their folder
            self._files.pop(data.data_ptr()).unlink()


def reserve(descriptor: int, size: int) -> None:
    """Make a file of that size, on file systems that can without holes: a full disk shows here and not in a write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder for one run's scratch, removed on any exit; what killed runs left is removed first.

    Raises:
        OutputError: no folder can be made there.
    """
    folder = parent / f"{FOLDER}{uuid4().hex}"
    lock = FileLock(_lock_of(folder))  # held before the folder is there, so that nobody takes it for abandoned
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        lock.acquire()
        folder.mkdir()
    except OSError as error:
        raise OutputError(
            f"scratch folder {str(parent)!r} cannot be used ({error.strerror}): choose another"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        _lock_of(folder).unlink(missing_ok=True)


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the scratch of runs that were killed: folders whose lock nobody holds.

    Returns:
        The folders that were removed.
    """
    removed = []
    for folder in sorted(path for path in parent.glob(f"{FOLDER}*") if path.is_dir()):
        try:
            with FileLock(_lock_of(folder), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
                _lock_of(folder).unlink(missing_ok=True)
        except (Timeout, PermissionError):  # somebody is at work there, or it is another user's
            continue
        if not folder.exists():
            logger.info(f"removed the scratch of a run that was killed: {folder}")
            removed.append(folder)
    return removed


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
