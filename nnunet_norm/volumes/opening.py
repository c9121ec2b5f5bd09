"""Opening zarr folders on this machine's disks. The library zarr is optional, and imported when one is opened."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from nnunet_norm.errors import InputImageError, SetupError

UNFINISHED = ".unfinished"
"""Ending of the hidden folder in which an output of this package is put together, and name of the file that marks it."""

METADATA_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
"""Where a node of a hierarchy keeps its metadata, in formats 3 and 2."""


def zarr_library() -> Any:
    """The package zarr.

    Raises:
        SetupError: it is not installed.
    """
    try:
        return importlib.import_module("zarr")
    except ImportError as error:
        raise SetupError(
            f"reading and writing zarr needs the package zarr ({error}): pip install 'nnunet_norm[volumes]'"
        ) from error


def is_node(path: str | os.PathLike[str]) -> bool:
    """Whether the folder is an array or a group of zarr format 2 or 3. Needs no zarr, and opens nothing."""
    return any(Path(path, name).is_file() for name in METADATA_FILES[:3])


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether the folder is an output of this package that was not finished."""
    path = Path(path)
    return path.name.endswith(UNFINISHED) or Path(path, UNFINISHED).exists()


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of one node, as they are stored: per file its content.

    Raises:
        InputImageError: they cannot be read.
    """
    files = [Path(path, name) for name in METADATA_FILES]
    return {file.name: _content(file) for file in files if file.is_file()}


def attributes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The user attributes of one node, of either format.

    Raises:
        InputImageError: they cannot be read.
    """
    stored = metadata(path)
    found = stored["zarr.json"].get("attributes", {}) if "zarr.json" in stored else stored.get(".zattrs", {})
    return found if isinstance(found, dict) else {}


def open_array(path: str | os.PathLike[str]) -> Any:
    """An array, to be read.

    Raises:
        InputImageError: it cannot be opened.
        SetupError: zarr is not installed.
    """
    zarr = zarr_library()
    metadata(path)  # broken JSON is told with the file's name
    try:
        return zarr.open_array(zarr.storage.LocalStore(Path(path), read_only=True), mode="r")
    except Exception as error:
        # zarr and its codecs raise many exceptions; here they are all about this array.
        raise InputImageError(f"the zarr array {os.fspath(path)!r} cannot be opened: {one_line(error)}") from error


def is_array(path: str | os.PathLike[str]) -> bool:
    """Whether the folder is an array, and not a group.

    Raises:
        InputImageError: its metadata cannot be read.
    """
    stored = metadata(path)
    return stored["zarr.json"].get("node_type") == "array" if "zarr.json" in stored else ".zarray" in stored


def one_line(error: Exception) -> str:
    """What an exception of a library says, as part of one line."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _content(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputImageError(
            f"the metadata {os.fspath(file)!r} cannot be read ({one_line(error)}): copy or write this zarr again"
        ) from error
    if not isinstance(found, dict):
        raise InputImageError(f"the metadata {os.fspath(file)!r} are no JSON object: copy or write this zarr again")
    return found
