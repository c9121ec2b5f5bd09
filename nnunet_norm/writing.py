"""Files that are whole under their final name, or not there."""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_norm.errors import OutputError


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path``, of the same ending, to be written; it is renamed when the block ends well.

    The file is on the disk before it has its name. After an error nothing is left of it.

    Raises:
        OutputError: In place of any OSError, also of the block: the folder is missing or read-only, the disk is full.
    """
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written ({reason}): make room, or choose another folder") from error
    finally:
        # After the rename there is nothing left to remove; in a read-only folder there never was.
        with contextlib.suppress(OSError):
            beside.unlink()


def sync(path: str | os.PathLike[str]) -> None:
    """Have a file, or the entries of a folder, on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 4) -> None:
    """Write JSON, by default indented as nnU-Net does.

    Raises:
        OutputError: As :func:`written_beside`.
    """
    with written_beside(path) as beside:
        beside.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def is_whole_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a checkpoint that was written to its end: torch writes zip archives, whose index comes last."""
    return zipfile.is_zipfile(path)
