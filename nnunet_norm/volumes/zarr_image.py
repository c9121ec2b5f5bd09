"""``ZarrImage``: an image on disk that is read region by region, whatever its axes, format and level of resolution."""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_norm.errors import InputImageError
from nnunet_norm.stages.regions import Region
from nnunet_norm.volumes import opening
from nnunet_norm.volumes.ome import SPATIAL, Level, Multiscale, axes_of, read_multiscale

ENDINGS = (".ome.zarr", ".zarr")


@dataclass(frozen=True)
class Volume:
    """One volume to be predicted: its case's name, without ending, and its folder."""

    case: str
    path: Path


def is_volume(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a zarr folder. Needs no zarr, and opens nothing."""
    return opening.is_node(path)


def holds_volumes(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds ``<case>.zarr`` or ``<case>.ome.zarr`` folders and is none itself."""
    return not is_volume(folder) and bool(_zarr_folders(Path(folder)))


def find_volumes(path: str | os.PathLike[str]) -> list[Volume]:
    """The volume at a path, or those in a folder, by case.

    Raises:
        InputImageError: there is none, one of them is no zarr or unfinished, or two have the same case name.
    """
    path = Path(path)
    folders = [path] if is_volume(path) else _zarr_folders(path)
    if not folders:
        raise InputImageError(
            f"{os.fspath(path)!r} is no zarr folder and holds none: give one, or a folder of <case>.zarr folders (-i)"
        )
    volumes = sorted((Volume(_case(folder), folder) for folder in folders), key=lambda volume: volume.case)
    for volume, following in itertools.pairwise(volumes):
        if volume.case == following.case:
            raise InputImageError(
                f"{volume.path.name!r} and {following.path.name!r} are both case {volume.case!r}: rename one of them"
            )
    for volume in volumes:
        _require_whole(volume.path)
    return volumes


class ZarrImage:
    """An image in a zarr folder, of format 2 or 3, that is read where it is asked for.

    An array has the axes (y, x), (z, y, x) or (c, z, y, x), or those that it names (``dimension_names``). A group is an
    OME-Zarr image, or just holds arrays. Whatever the axes are, this image has (C, z, y, x).

    Args:
        path: the zarr folder.
        channels: how many channels the model takes.
        level: of an OME-Zarr image its resolution, as a number from 0 (full, the default) or as the path of its array;
            of another group the path of the array, which can be left out if there is only one.

    Attributes:
        name: the case.
        level: path of the array within the group; empty if the folder is an array.
        levels: all that can be chosen.
        shape: (C, z, y, x).
        dtype: of the values as they are stored.
        chunk: extents (z, y, x) of what is compressed together.
        spacing: size of a voxel on z, y and x; None where it is unknown. For an image without z it is 999 there, as with
            nnU-Net's readers.
        translation: place of the first voxel; None where it is unknown.
        units: of ``spacing``.
        channel_names: None where they are not told.

    Raises:
        InputImageError: the folder is no zarr, unfinished or damaged, or does not fit.
        SetupError: zarr is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, channels: int, level: int | str | None = None) -> None:
        path = Path(path)
        self.name = _case(path)
        if not is_volume(path):
            raise InputImageError(f"{os.fspath(path)!r} is no zarr: it has no zarr.json, .zarray or .zgroup")
        _require_whole(path)
        image = _described(path)
        self._folder, self.levels = path, image.levels
        chosen = self._chosen(image, level)
        self.level, self.spacing, self.translation = chosen.path, chosen.spacing, chosen.translation
        self.units, self.channel_names = image.units, image.channel_names
        self._array = opening.open_array(path / chosen.path)
        self._axes = self._checked_axes(image.axes)
        extents = dict(zip(self._axes, self._array.shape, strict=True))
        self.shape: tuple[int, ...] = tuple(extents.get(axis, 1) for axis in ("c", *SPATIAL))
        self.dtype: np.dtype[Any] = np.dtype(self._array.dtype)
        chunks = dict(zip(self._axes, self._array.chunks, strict=True))
        self.chunk: tuple[int, ...] = tuple(chunks.get(axis, 1) for axis in SPATIAL)
        self._check(channels, extents)

    @property
    def ndim(self) -> int:
        """4: (C, z, y, x)."""
        return len(self.shape)

    def shape_of(self, level: Level) -> tuple[int, ...]:
        """Extents (z, y, x) of another level.

        Raises:
            InputImageError: it cannot be opened.
        """
        extents = dict(zip(self._axes, opening.open_array(self._folder / level.path).shape, strict=True))
        return tuple(extents.get(axis, 1) for axis in SPATIAL)

    def read(self, region: Sequence[slice | int]) -> NDArray[np.float32]:
        """The values of all channels in a region, as nnU-Net casts them.

        Args:
            region: on z, y and x a slice without step, or a number, which drops the axis.

        Returns:
            (C, *extents of the slices).

        Raises:
            InputImageError: a chunk cannot be decoded, or values are not finite.
        """
        bounds = tuple(bounds_of(wanted, n) for wanted, n in zip(region, self.shape[1:], strict=True))
        values = self._stored(bounds)
        # A float64 that float32 cannot hold becomes infinite, here as in nnU-Net; it is told below.
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, dtype=np.float32)
        if self.dtype.kind == "f":
            self._require_finite(values, bounds)
        return values[(slice(None), *(slice(None) if isinstance(wanted, slice) else 0 for wanted in region))]

    def identity(self) -> dict[str, Any]:
        """What tells this image from another, for JSON: level, shape, type, chunks and a digest of all its metadata.

        The values are not part of it.
        """
        stored = [opening.metadata(self._folder), opening.metadata(self._folder / self.level)]
        return {
            "level": self.level,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "chunks": list(self._array.chunks),
            "metadata": hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest(),
        }

    def _chosen(self, image: Multiscale, level: int | str | None) -> Level:
        """The level of that path or number."""
        paths = [found.path for found in image.levels]
        if level is None and (image.axes or len(paths) == 1):
            level = 0
        if isinstance(level, str) and level not in paths and level.isdecimal():
            level = int(level)
        if isinstance(level, int) and 0 <= level < len(paths):
            return image.levels[level]
        if isinstance(level, str) and level in paths:
            return image.levels[paths.index(level)]
        there = ", ".join(f"{i} ({path})" if path != str(i) else path for i, path in enumerate(paths))
        if paths == [""]:
            raise InputImageError(f"level {level} of volume {self.name!r}: it is a single array, leave the level out")
        what = "which array is meant" if level is None else f"level {level} does not exist"
        raise InputImageError(f"volume {self.name!r}: {what}: choose the level from {there}")

    def _checked_axes(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """The array's axes, from the image's metadata or its own."""
        rank = len(self._array.shape)
        if not axes:
            names = getattr(self._array.metadata, "dimension_names", None) or self._array.attrs.get("_ARRAY_DIMENSIONS")
            axes = axes_of(names, rank) or ()
        if len(axes) != rank:
            wanted = f"({', '.join(axes)})" if axes else "(y, x), (z, y, x) or (c, z, y, x), or named so"
            raise InputImageError(
                f"volume {self.name!r} has an array of rank {rank}, shape {self._array.shape}: its axes must be {wanted}"
            )
        return axes

    def _check(self, channels: int, extents: dict[str, int]) -> None:
        """Refuse what no model can take, and what this one cannot."""
        shape = tuple(self._array.shape)
        if extents.get("t", 1) != 1:
            raise InputImageError(
                f"volume {self.name!r} has {extents['t']} points in time (shape {shape}): write each as a zarr of its own"
            )
        if self.shape[0] != channels:
            raise InputImageError(
                f"volume {self.name!r} has {self.shape[0]} channel{'s' * (self.shape[0] != 1)} (axes "
                f"{', '.join(self._axes)}, shape {shape}), the model needs {channels}: put all channels into one array "
                f"along c, and name the axes (dimension_names) if they are in another order"
            )
        if self.dtype.kind not in "biuf":
            raise InputImageError(
                f"volume {self.name!r} has values of type {self.dtype}: an image has whole or real numbers"
            )
        if min(shape) < 1:
            raise InputImageError(f"volume {self.name!r} of shape {shape} is empty: nothing can be predicted")

    def _stored(self, bounds: Region) -> NDArray[Any]:
        """Values (C, z, y, x) as they are stored."""
        where = dict(zip(SPATIAL, bounds, strict=True))
        index = tuple(slice(*where[a]) if a in where else slice(None) for a in self._axes)
        try:
            values = np.asarray(self._array[index])
        except MemoryError:
            raise
        except Exception as error:
            # Every codec has exceptions of its own; all are about this region's chunks.
            raise InputImageError(
                f"volume {self.name!r} cannot be read in {_told(bounds)} ({opening.one_line(error)}): "
                f"copy or write this zarr again"
            ) from error
        order = [self._axes.index(axis) for axis in ("t", "c", *SPATIAL) if axis in self._axes]
        extents = [n for axis, n in zip(self._axes, values.shape, strict=True) if axis == "c"]
        return values.transpose(order).reshape((*(extents or [1]), *(stop - start for start, stop in bounds)))

    def _require_finite(self, values: NDArray[np.float32], bounds: Region) -> None:
        finite = np.isfinite(values)
        if finite.all():
            return
        first = np.unravel_index(int(finite.argmin()), finite.shape)
        where = tuple(int(i) + start for i, (start, _) in zip(first[1:], bounds, strict=True))
        raise InputImageError(
            f"volume {self.name!r} has {finite.size - int(finite.sum())} values that are not finite (NaN or infinity) in "
            f"{_told(bounds)}, the first in channel {first[0]} at (z, y, x) = {where}: replace them"
        )


def bounds_of(wanted: slice | int, n: int) -> tuple[int, int]:
    """Start and stop of an index along an axis of extent ``n``; negative ones count from its end.

    Raises:
        IndexError: it is outside, or a slice has a step.
    """
    if isinstance(wanted, slice):
        start, stop, step = wanted.indices(n)
        if step != 1:
            raise IndexError(f"a volume on disk is read without steps, not with {wanted}")
        return start, max(start, stop)
    at = operator.index(wanted)
    if not -n <= at < n:
        raise IndexError(f"index {at} is outside an axis of extent {n}")
    return at % n, at % n + 1


def _zarr_folders(folder: Path) -> list[Path]:
    """Visible folders with the ending of a zarr."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and p.name[0] != "." and p.is_dir())


def _case(path: Path) -> str:
    """The folder's name without its ending."""
    name = path.resolve().name
    ending = next((e for e in ENDINGS if name.endswith(e) and name != e), "")
    return name.removesuffix(ending)


def _require_whole(path: Path) -> None:
    if opening.is_unfinished(path):
        raise InputImageError(
            f"{path.name!r} is unfinished: the prediction that writes it runs still, or has to be continued"
        )
    if not is_volume(path):
        raise InputImageError(f"{path.name!r} is no zarr: it has no zarr.json, .zarray or .zgroup")


def _described(path: Path) -> Multiscale:
    """What the folder's metadata say; levels without axes for an array and for arrays in a group."""
    plain = Multiscale((), (None, None, None), (Level(""),), None)
    if opening.is_array(path):
        return plain
    try:
        image = read_multiscale(opening.attributes(path))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, InputImageError):
            raise
        raise InputImageError(
            f"the OME-Zarr metadata of {path.name!r} are not valid ({opening.one_line(error)}): write them again"
        ) from error
    below = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and is_volume(folder))
    if image is None:
        arrays = tuple(Level(name) for name in below if opening.is_array(path / name))
        if arrays:
            return Multiscale((), (None, None, None), arrays, None)
        inside = f"name one of the groups in it: {', '.join(below)}" if below else "it holds no image"
        raise InputImageError(f"{path.name!r} is a zarr group without an image of its own (no multiscales): {inside}")
    missing = [level.path for level in image.levels if not is_volume(path / level.path)]
    if missing or not image.levels:
        raise InputImageError(
            f"{path.name!r} is unfinished or damaged: its metadata name {', '.join(missing) or 'no array'}, which is not "
            f"there; copy or write this zarr again"
        )
    return image


def _told(bounds: Region) -> str:
    return ", ".join(f"{axis} {start}:{stop}" for axis, (start, stop) in zip(SPATIAL, bounds, strict=True))
