"""The folder in which a prediction is made before it has its final name; it outlives a process that is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from nnunet_norm.errors import OutputError
from nnunet_norm.prediction.journal import MANIFEST, RunJournal
from nnunet_norm.stages.scratch import reserve

ENDING = ".unfinished"
"""End of the name of every work folder."""


@dataclass(frozen=True)
class Work:
    """Where an image is predicted, for whoever does it.

    Attributes:
        folder: for scratch, and for what is noted.
        identity: what tells the image and its preprocessing from others; JSON.
    """

    folder: Path
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class MappedArray:
    """An array in a file, for another process: its description travels, and its content stays where it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    def open(self) -> NDArray[Any]:
        """The array, to read and write."""
        return np.memmap(self.path, dtype=self.dtype, mode="r+", shape=self.shape)


class WorkFolder:
    """One prediction's folder, beside the output or in the folder of scratch, and the lock that says somebody is at work.

    Attributes:
        path: the folder.
        arrays: what was allocated, by name.
    """

    def __init__(self, parent: str | os.PathLike[str], output: str, *, resume: bool) -> None:
        """Make the folder, or take over what a killed process left.

        Args:
            parent: where it lies.
            output: what it is made for; its name and a digest of its path are the folder's name.
            resume: keep what is there.

        Raises:
            OutputError: another process is at work there, or the folder cannot be made.
        """
        self.path = work_folder_of(parent, output)
        self.arrays: dict[str, MappedArray] = {}
        # Whoever has written the output gives the lock back, and that is another thread.
        self._lock = FileLock(self.path.with_name(f"{self.path.name}.lock"), thread_local=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            if not (resume and self.has_manifest):
                self._clear()
            self.path.mkdir(exist_ok=True)
        except Timeout as error:
            raise OutputError(
                f"another process is writing {output!r} ({self.path} is locked): wait for it, or choose another output"
            ) from error
        except OSError as error:
            raise OutputError(f"{str(self.path)!r} cannot be made ({error.strerror}): choose another folder") from error

    @property
    def has_manifest(self) -> bool:
        """Whether there is something to continue with."""
        return (self.path / MANIFEST).exists()

    def allocate(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array in a file: of zeros, or as a killed process left it, if there is something to continue with.

        Raises:
            OutputError: the disk has not that much room, or what was left is not whole.
        """
        made = MappedArray(self.path / name, tuple(int(n) for n in shape), np.dtype(dtype).str)
        count = max(int(np.prod(made.shape, dtype=np.int64)) * np.dtype(dtype).itemsize, 1)
        is_whole = made.path.is_file() and made.path.stat().st_size == count
        if self.has_manifest and not is_whole:
            raise OutputError(
                f"{str(made.path)!r} of the prediction that is to be continued is not whole: leave --continue_prediction out"
            )
        try:
            if not is_whole:
                with made.path.open("wb") as file:
                    reserve(file.fileno(), count)
        except OSError as error:
            made.path.unlink(missing_ok=True)
            raise OutputError(
                f"{self.path.name.split('-')[0][1:]}: {name} of {count} bytes cannot be written ({error.strerror}): make "
                f"room on the disk of {str(self.path.parent)!r}, or choose a --scratch folder with more"
            ) from error
        self.arrays[name] = made
        return made.open()

    def close(self, *, remove: bool) -> None:
        """Let others have it.

        Args:
            remove: the prediction is finished, or nothing in the folder is of use.
        """
        if remove:
            self._clear()
        self._lock.release()
        if remove:
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Refuse what another prediction left, before anything of it is changed.

        Args:
            identity: what is predicted, with what, and by which options.

        Raises:
            OutputError: the manifest is damaged, or that of another prediction.
        """
        RunJournal(self.path, identity)

    def _clear(self) -> None:
        """Remove the folder, and first what says that there is something to continue with."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def remove_finished(parent: str | os.PathLike[str], outputs: Sequence[str]) -> None:
    """Remove the work folders of finished outputs, which a process left that was killed when all was done."""
    for output in outputs:
        if work_folder_of(parent, output).exists():
            with suppress(OutputError):  # somebody is at it
                WorkFolder(parent, output, resume=True).close(remove=True)


def work_folder_of(parent: str | os.PathLike[str], output: str) -> Path:
    """The work folder for an output: always the same, and another one for outputs of the same name elsewhere."""
    digest = sha256(os.path.abspath(output).encode()).hexdigest()[:8]
    return Path(parent) / f".{os.path.basename(output)}-{digest}{ENDING}"


def digest_of(image: Tensor) -> str:
    """A digest of a preprocessed image."""
    digest = blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()
