"""OME-Zarr metadata: which axes an image has, which levels of resolution, and how large a voxel is.

References:
    OME-NGFF 0.4 and 0.5, https://ngff.openmicroscopy.org; Moore et al. 2023, doi 10.1007/s00418-023-02209-1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPATIAL = ("z", "y", "x")
NO_Z = 999.0
"""What nnU-Net's readers give as the distance of planes in an image that has only one."""
VERSION = "0.5"

MILLIMETRES = {
    "angstrom": 1e-7,
    "nanometer": 1e-6,
    "nm": 1e-6,
    "micrometer": 1e-3,
    "micron": 1e-3,
    "um": 1e-3,
    "µm": 1e-3,
    "millimeter": 1.0,
    "mm": 1.0,
    "centimeter": 10.0,
    "cm": 10.0,
    "meter": 1e3,
}
"""Lengths of the units that OME-NGFF recommends for images like these, and of what is often written instead."""


@dataclass(frozen=True)
class Level:
    """One array of an image.

    Attributes:
        path: of the array within the group; empty for an array that is no part of one.
        spacing: size of a voxel on z, y and x; None where it is unknown.
        translation: place of the first voxel on z, y and x; None where it is unknown.
    """

    path: str
    spacing: tuple[float, ...] | None = None
    translation: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Multiscale:
    """What an image's metadata say.

    Attributes:
        axes: one of "t", "c", "z", "y", "x" per axis of the arrays, in their order.
        units: of z, y and x; None where it is not told.
        levels: from the finest to the coarsest.
        channel_names: None where they are not told.
    """

    axes: tuple[str, ...]
    units: tuple[str | None, ...]
    levels: tuple[Level, ...]
    channel_names: tuple[str, ...] | None


def read_multiscale(attributes: Mapping[str, Any]) -> Multiscale | None:
    """The first image of a group; None if its attributes tell of none.

    Raises:
        ValueError: metadata that are not as OME-NGFF wants them. Also KeyError, TypeError, AttributeError.
    """
    ome = attributes.get("ome", attributes)
    if not ome.get("multiscales"):
        return None
    image = ome["multiscales"][0]
    axes = _axes(image.get("axes", ["t", "c", "z", "y", "x"]))  # before 0.3 all images had these five
    units = {axis: entry.get("unit") for axis, entry in zip(axes, image.get("axes", []), strict=False) if _named(entry)}
    shared = _transformation("scale", image, axes) or dict.fromkeys(SPATIAL, 1.0)
    levels = []
    for dataset in image["datasets"]:
        scale, offset = (_transformation(kind, dataset, axes) for kind in ("scale", "translation"))
        levels.append(Level(dataset["path"], _spacing(scale, shared), _offset(offset, shared)))
    omero = ome.get("omero", attributes.get("omero", {}))
    names = tuple(str(c.get("label", i)) for i, c in enumerate(omero.get("channels", [])))
    return Multiscale(axes, tuple(units.get(a) for a in SPATIAL), tuple(levels), names or None)


def axes_of(names: Sequence[str | None] | None, rank: int) -> tuple[str, ...] | None:
    """The axes of an array from the names it gives them, or by its rank: (y, x), (z, y, x), (c, z, y, x).

    Returns:
        None for an array with neither usable names nor such a rank.
    """
    named = tuple((name or "").lower() for name in names or ())
    if (
        len(named) == rank
        and set(named) <= {"t", "c", *SPATIAL}
        and {"y", "x"} <= set(named)
        and len(set(named)) == rank
    ):
        return named
    return ("c", *SPATIAL)[-rank:] if 2 <= rank <= 4 else None


def label_attributes(
    name: str,
    path: str,
    spacing: Sequence[float] | None,
    units: Sequence[str | None],
    translation: Sequence[float] | None,
    class_names: Mapping[int, str],
) -> dict[str, Any]:
    """Attributes of a group that holds one image of labels (z, y, x), in version 0.5.

    Args:
        name: of the image.
        path: of its array within the group.
        spacing: on z, y and x; None if unknown.
        units: of z, y and x.
        translation: of the first voxel; None if unknown.
        class_names: name of every label.
    """
    axes = [
        {"name": axis, "type": "space"} | ({"unit": unit} if unit else {})
        for axis, unit in zip(SPATIAL, units, strict=True)
    ]
    scale = [1.0 if value == NO_Z else float(value) for value in spacing or (1.0, 1.0, 1.0)]
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
    if translation is not None:
        transformations.append({"type": "translation", "translation": [float(value) for value in translation]})
    image = {"name": name, "axes": axes, "datasets": [{"path": path, "coordinateTransformations": transformations}]}
    properties = [{"label-value": value, "class": text} for value, text in sorted(class_names.items())]
    return {"ome": {"version": VERSION, "multiscales": [image], "image-label": {"properties": properties}}}


def _named(entry: Any) -> bool:
    return isinstance(entry, Mapping)


def _axes(entries: Sequence[Any]) -> tuple[str, ...]:
    """Axes by their types, since only those of time and channel are settled; by their names where there is no type."""
    found = []
    for entry in entries:
        name = str(entry["name"] if _named(entry) else entry).lower()
        kind = entry.get("type") if _named(entry) else None
        found.append({"channel": "c", "time": "t"}.get(kind or "", name))
    space = [i for i, axis in enumerate(found) if axis not in ("t", "c")]
    if not {found[i] for i in space} <= set(SPATIAL):  # other names: they must be in the order z, y, x
        for i, axis in zip(space, SPATIAL[-len(space) :], strict=True):
            found[i] = axis
    if len(set(found)) != len(found) or not {"y", "x"} <= set(found):
        raise ValueError(f"axes {entries} are not t, c, z, y and x, each at most once, with y and x")
    return tuple(found)


def _transformation(kind: str, entry: Mapping[str, Any], axes: Sequence[str]) -> dict[str, float] | None:
    """The first transformation of that kind, per axis; None if there is none."""
    for found in entry.get("coordinateTransformations", []):
        if found["type"] == kind and kind in found:
            values = [float(value) for value in found[kind]]
            if not all(math.isfinite(value) for value in values) or (kind == "scale" and min(values) <= 0):
                raise ValueError(f"{kind} {values} is not finite, or not above 0")
            return dict(zip(axes, values, strict=True))
    return None


def _spacing(scale: Mapping[str, float] | None, shared: Mapping[str, float]) -> tuple[float, ...] | None:
    if scale is None:
        return None
    return tuple(scale[axis] * shared[axis] if axis in scale else NO_Z for axis in SPATIAL)


def _offset(offset: Mapping[str, float] | None, shared: Mapping[str, float]) -> tuple[float, ...] | None:
    return None if offset is None else tuple(offset.get(axis, 0.0) * shared.get(axis, 1.0) for axis in SPATIAL)
