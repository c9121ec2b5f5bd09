"""``LabelVolume``: a segmentation on disk that several processes write, each its own shards."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_norm.errors import OutputError
from nnunet_norm.stages import regions
from nnunet_norm.stages.regions import Region, extent_of, slices
from nnunet_norm.volumes import opening
from nnunet_norm.volumes.layout import shard_and_chunk, shards
from nnunet_norm.volumes.ome import SPATIAL, label_attributes
from nnunet_norm.writing import sync

LABELS = "0"
"""The array of labels within the group: the only level of the OME-Zarr image."""

PROBABILITIES = "probabilities"
"""The array of probabilities (K, z, y, x) within the group."""


class LabelVolume:
    """An OME-Zarr image of labels (format 3, OME-NGFF 0.5), put together in a hidden folder beside its final name.

    Any number of processes may open the same one with the same arguments: the first makes it, and the others find it.
    Each must write shards of its own, because a shard is a file that is written as a whole. Where nothing is written,
    labels are 0. What is written is on the disk when ``write`` returns; writing it again changes nothing.

    Args:
        path: the final name.
        shape: (z, y, x).
        class_names: name of every label there can be. The largest decides between uint8 and uint16.
        provenance: what produced it, for JSON; attribute "nnunet_norm".
        num_probabilities: number of classes or regions K whose probabilities are stored too, as float32; 0 for none.
        spacing: size of a voxel on z, y and x; None if unknown.
        units: of the spacing.
        translation: place of the first voxel; None if unknown.
        num_parts: how many parts it is to be divided into (see ``shard_and_chunk``).
        overwrite: replace what has the final name, when this is finished.

    Attributes:
        shard: extents (z, y, x) of a shard. Probabilities have one of these extents per class.
        chunk: extents of the chunks in it.

    Raises:
        OutputError: there is something under the final name; an unfinished one differs from this; it cannot be written.
        SetupError: zarr is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        shape: Sequence[int],
        class_names: Mapping[int, str],
        provenance: Mapping[str, Any],
        num_probabilities: int = 0,
        spacing: Sequence[float] | None = None,
        units: Sequence[str | None] = (None, None, None),
        translation: Sequence[float] | None = None,
        num_parts: int = 1,
        overwrite: bool = False,
    ) -> None:
        self.path, self.overwrite = Path(os.path.abspath(path)), overwrite
        self.unfinished = unfinished_path(self.path)
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(np.uint8 if max(class_names) < 2**8 else np.uint16)
        assert min(class_names) >= 0, class_names
        assert max(class_names) < 2**16, class_names
        self.num_probabilities = num_probabilities
        self.shard, self.chunk = label_layout(self.shape, num_probabilities, num_parts)
        self._refuse_existing()
        name = self.path.name.removesuffix(".zarr").removesuffix(".ome")
        told = label_attributes(name, LABELS, spacing, units, translation, class_names)
        with _told(self.path):
            self._build(told | {"nnunet_norm": dict(provenance)})
        self._labels = self._opened(LABELS)
        self._probabilities = self._opened(PROBABILITIES) if num_probabilities else None

    @property
    def whole(self) -> Region:
        """The region of the whole volume."""
        return regions.whole(self.shape)

    def shards(self, region: Region | None = None) -> Iterator[Region]:
        """The shards of a region that is made of whole shards, or of the volume, in the order of z, y, x."""
        yield from shards(region or self.whole, self.shard)

    def write(
        self, region: Region, labels: NDArray[np.integer[Any]], probabilities: NDArray[np.float32] | None = None
    ) -> dict[str, int]:
        """Write a region of whole shards; it is on the disk when this returns.

        Args:
            region: (start, stop) on z, y and x: multiples of the shard's extents, or the volume's end.
            labels: of the region's extents.
            probabilities: (K, *region's extents), if the volume has them.

        Returns:
            The files that were written, with their sizes; see ``sizes``.

        Raises:
            OutputError: the region is not made of whole shards, or cannot be written.
        """
        self._require_shards(region)
        assert labels.shape == extent_of(region), (labels.shape, region)
        assert labels.max(initial=0) < 2 ** (8 * self.dtype.itemsize), "class_names names every label"
        assert (probabilities is None) == (self._probabilities is None), "probabilities: all or none"
        origin = [start for start, _ in region]
        with _told(self.path):
            for shard in self.shards(region):
                inside = slices(shard, origin)
                # Only a shard at a time: zarr holds all that it is given, compressed and joined, at once.
                self._put(LABELS, self._labels, shard, labels[inside].astype(self.dtype, copy=False))
                for number in range(self.num_probabilities):
                    assert probabilities is not None
                    values = probabilities[(slice(number, number + 1), *inside)].astype(np.float32, copy=False)
                    self._put(PROBABILITIES, self._probabilities, ((number, number + 1), *shard), values)
            if not self.unfinished.is_dir():  # somebody has removed it meanwhile
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self.sizes(region)

    def sizes(self, region: Region) -> dict[str, int]:
        """The files that there are of a region of whole shards, with their sizes; those of zeros only are not there."""
        found: dict[str, int] = {}
        for shard in self.shards(region):
            paths = [self._file(LABELS, self._labels, shard)]
            for number in range(self.num_probabilities):
                paths.append(self._file(PROBABILITIES, self._probabilities, ((number, number + 1), *shard)))
            found |= {str(path.relative_to(self.unfinished)): path.stat().st_size for path in paths if path.is_file()}
        return found

    def finish(self) -> None:
        """Give the volume its final name. It is for the caller to know that all parts have been written.

        Raises:
            OutputError: something else has that name by now, or nothing is there to be finished.
        """
        self._refuse_existing()
        replaced = self.path.with_name(f".{self.path.name}.replaced")
        with _told(self.path):
            for torn in self.unfinished.rglob("*.partial"):  # what zarr was writing when a process was killed
                torn.unlink()
            Path(self.unfinished, opening.UNFINISHED).unlink(missing_ok=True)
            sync(self.unfinished)
            if self.path.exists():
                # A folder cannot be replaced in one step. After a crash between these two, finish() can run again.
                _remove(replaced)
                os.rename(self.path, replaced)
            os.rename(self.unfinished, self.path)
            sync(self.path.parent)
            _remove(replaced)
            for left in self.path.parent.glob(f".{self.path.name}.*.building"):
                _remove(left)

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self.overwrite:
            raise OutputError(f"{os.fspath(self.path)!r} is there already: remove it, or choose another folder (-o)")

    def _require_shards(self, region: Region) -> None:
        sides = zip(region, self.shape, self.shard, strict=True)
        if not all(0 <= a < b <= n and a % edge == 0 and (b % edge == 0 or b == n) for (a, b), n, edge in sides):
            raise OutputError(
                f"region {region} of {self.path.name!r} is not made of whole shards of {self.shard}: two writers of one "
                f"shard would lose data"
            )

    def _build(self, attributes: dict[str, Any]) -> None:
        """Make the folder, in one step; if it is there already, see that it is the same."""
        building = self.path.with_name(f".{self.path.name}.{os.getpid()}-{uuid.uuid4().hex}.building")
        try:
            self._make(building, attributes)
            for folder, _, files in os.walk(building):
                for file in files:
                    sync(Path(folder, file))
                sync(Path(folder))
            try:
                os.rename(building, self.unfinished)
            except OSError:
                # A folder with content is never replaced: somebody was here before.
                if not self.unfinished.is_dir():
                    raise
                self._require_same(building)
            sync(self.path.parent)
        finally:
            _remove(building)

    def _make(self, folder: Path, attributes: dict[str, Any]) -> None:
        zarr = opening.zarr_library()
        group = zarr.create_group(zarr.storage.LocalStore(folder), attributes=attributes, zarr_format=3)
        stored: dict[str, Any] = {
            "fill_value": 0,
            # Told one by one, so that files do not depend on what a version of zarr takes by default.
            "compressors": zarr.codecs.ZstdCodec(level=3, checksum=False),
            "chunk_key_encoding": {"name": "default", "separator": "/"},
        }
        group.create_array(
            LABELS,
            **(stored | {"shape": self.shape, "shards": self.shard, "chunks": self.chunk}),
            dtype=self.dtype,
            dimension_names=SPATIAL,
        )
        if self.num_probabilities:
            group.create_array(
                PROBABILITIES,
                shape=(self.num_probabilities, *self.shape),
                shards=(1, *self.shard),
                chunks=(1, *self.chunk),
                dtype="float32",
                dimension_names=("c", *SPATIAL),
                **stored,
            )
        Path(folder, opening.UNFINISHED).touch()

    def _require_same(self, building: Path) -> None:
        for folder in ("", LABELS, PROBABILITIES):
            there, ours = (opening.metadata(parent / folder) for parent in (self.unfinished, building))
            if there != ours:
                raise OutputError(
                    f"{os.fspath(self.unfinished)!r} was begun with other settings ({_difference(there, ours)}): continue "
                    f"with those, or remove it"
                )

    def _opened(self, name: str) -> Any:
        zarr = opening.zarr_library()
        return zarr.open_array(zarr.storage.LocalStore(self.unfinished / name), mode="r+")

    def _file(self, name: str, array: Any, shard: Region) -> Path:
        places = (str(start // edge) for (start, _), edge in zip(shard, array.shards, strict=True))
        return self.unfinished.joinpath(name, "c", *places)

    def _put(self, name: str, array: Any, shard: Region, values: NDArray[Any]) -> None:
        """Write one shard, which is a file, and see that it and the folders that lead to it are on the disk."""
        top, file = self.unfinished / name, self._file(name, array, shard)
        # zarr reads a shard that it is about to replace, even as a whole, and fails if that was torn by a power cut.
        file.unlink(missing_ok=True)
        array[slices(shard)] = values
        if file.exists():  # one of zeros only is not stored
            sync(file)
        folder = file.parent
        while folder != top.parent:
            if folder.exists():
                sync(folder)
            folder = folder.parent


def label_layout(
    shape: Sequence[int], num_probabilities: int, num_parts: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the shards and chunks of a ``LabelVolume``; see ``shard_and_chunk``."""
    return shard_and_chunk(shape, 4 if num_probabilities else 2, num_parts)


def provenance_of(path: str | os.PathLike[str]) -> Any:
    """What produced a finished output; None if it is not one of ours."""
    return opening.attributes(path).get("nnunet_norm")


def unfinished_path(path: str | os.PathLike[str]) -> Path:
    """The hidden folder in which the output of that final name is put together."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}{opening.UNFINISHED}")


def is_finished(path: str | os.PathLike[str]) -> bool:
    """Whether there is a zarr under this name that no one is still writing."""
    return opening.is_node(path) and not opening.is_unfinished(path)


def discard_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what was begun for the final name ``path``, if anything; not what has that name.

    Raises:
        OutputError: it cannot be removed.
    """
    unfinished = unfinished_path(path)
    with _told(Path(path)):
        if unfinished.exists():
            # Renamed first, so that an interrupted removal is not taken for an output to be continued.
            removed = unfinished.with_name(f".{Path(path).name}.{uuid.uuid4().hex}.building")
            os.rename(unfinished, removed)
            _remove(removed)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of the file system as one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{os.fspath(path)!r} cannot be written ({reason}): make room, or choose another folder"
        ) from error


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; what cannot be removed is hidden and in nobody's way."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _difference(there: Any, ours: Any, where: str = "") -> str:
    """The first entry that differs, for one line."""
    if isinstance(there, dict) and isinstance(ours, dict):
        for key in sorted(there.keys() | ours.keys()):
            if there.get(key) != ours.get(key):
                return _difference(there.get(key), ours.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {there!r} there, {ours!r} now"
