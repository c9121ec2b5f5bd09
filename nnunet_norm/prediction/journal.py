"""How far the prediction of one image has come, kept on the disk so that it can be continued where it was killed."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from nnunet_norm.errors import OutputError
from nnunet_norm.stages.journal import Progress
from nnunet_norm.stages.scratch import ScratchOnDisk
from nnunet_norm.writing import sync, write_json

NOTE_EVERY = 30.0
"""Seconds between two points that are noted: so much work is done again at most, apart from that of one block."""

MANIFEST = "manifest.json"
"""What is finished in a work folder."""

VERSION = 1
"""Of the manifest's form."""


@dataclass(frozen=True)
class Position:
    """A point in the prediction of an image; everything before it is in the output and in the work folder.

    Attributes:
        plane: the slice of a stack that is to be predicted; 0 for an image that is taken as a whole.
        step: how many of its passes (stages) or tiles are finished.
        results: files with what is added up: the sum of the finished passes ("" if there is none), and the one that gets the
            sum with the pass that is under way.
        inner: how far the pass has come, stage by stage; None: not begun.
    """

    plane: int = 0
    step: int = 0
    results: tuple[str, ...] = ()
    inner: Progress | None = None

    def as_dict(self) -> dict[str, Any]:
        """The point for a JSON file."""
        inner = None if self.inner is None else self.inner.as_dict()
        return {"plane": self.plane, "step": self.step, "results": self.results, "inner": inner}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Position:
        """The point that ``as_dict`` described; raises KeyError, TypeError or ValueError for anything else."""
        inner = content["inner"]
        return cls(
            int(content["plane"]),
            int(content["step"]),
            tuple(str(name) for name in content["results"]),
            None if inner is None else Progress.from_dict(inner),
        )

    @property
    def files(self) -> set[str]:
        """The names of all files that the point needs."""
        return {*self.results, *(self.inner.maps.values() if self.inner is not None else ())} - {""}


class RunJournal:
    """The manifest of a work folder: what is predicted, how, and how far it has come.

    A point is written only once all that came before it is on the disk, and replaces the one before as a whole.

    Attributes:
        position: where to go on.
        scratch: of the work folder.
        pins: what the result depends on to the last bit, apart from image, weights and options: how it is cut into blocks or
            tiles, and the threads. Empty until ``pin``.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the journal of a work folder, or begin one.

        Args:
            folder: the work folder; it exists, and nobody else works in it.
            identity: what is predicted, with what, and by which options; JSON. The processors that compute come to it.

        Raises:
            OutputError: the manifest is not readable, or that of another prediction.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps({**identity, "processors": _processors()}))
        self.pins: dict[str, Any] = {}
        self.position = Position()
        content = self._read()
        if content is not None:
            self._require_same(content["identity"])
            self.pins, self.position = content["pins"], Position.from_dict(content["position"])
        self._remove_all_but(self.position.files)
        self.scratch = ScratchOnDisk(folder)
        self._noted = time.monotonic()

    @property
    def file(self) -> Path:
        """The manifest."""
        return self.folder / MANIFEST

    @property
    def is_resumed(self) -> bool:
        """Whether there is something to go on with."""
        return bool(self.pins)

    def pin(self, pins: Mapping[str, Any]) -> None:
        """Say how the image is predicted, before anything is noted."""
        self.pins = json.loads(json.dumps(pins))

    def is_due(self) -> bool:
        """Whether the time has come for another point."""
        return time.monotonic() - self._noted >= NOTE_EVERY

    def needs(self, name: str) -> bool:
        """Whether the last point names a file."""
        return name in self.position.files

    def note(self, position: Position) -> None:
        """Write a point, after everything that it stands on.

        Raises:
            OutputError: the disk is full, or gone.
        """
        assert self.pins, "what the result depends on must be known"
        try:
            for path in (path for path in self.folder.rglob("*") if path.is_file() and path != self.file):
                sync(path)
            sync(self.folder)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be written ({error.strerror}): make room") from error
        content = {
            "version": VERSION,
            "identity": self.identity,
            "pins": self.pins,
            "position": json.loads(json.dumps(position.as_dict())),
        }
        write_json(self.file, {"content": content, "digest": _digest(content)}, indent=None)
        self.position = position
        self._noted = time.monotonic()

    def inner(self, plane: int, step: int, results: tuple[str, ...]) -> PassJournal:
        """The journal of one pass of the network over a plane, stage by stage."""
        return PassJournal(self, plane, step, results)

    def _read(self) -> dict[str, Any] | None:
        """The manifest's content; None if there is none."""
        if not self.file.exists():
            return None
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            content: dict[str, Any] = stored["content"]
            if stored["digest"] != _digest(content):
                raise ValueError("it was changed")
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"manifest {str(self.file)!r} cannot be read ({type(error).__name__}: {error}): remove its folder, or leave "
                "--continue_prediction out"
            ) from error
        return content

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        differ = sorted(
            key for key in {*identity, *self.identity} if identity.get(key, ...) != self.identity.get(key, ...)
        )
        if differ:
            raise OutputError(
                f"{str(self.folder)!r} holds what another prediction left (other {', '.join(differ)}): predict as before, or "
                "leave --continue_prediction out"
            )

    def _remove_all_but(self, files: set[str]) -> None:
        """Remove the maps that no point names: they were made after it."""
        for path in self.folder.glob("map_*"):
            if path.name not in files:
                path.unlink()


class PassJournal:
    """The journal of one pass; see ``nnunet_norm.stages.journal.Journal``."""

    def __init__(self, journal: RunJournal, plane: int, step: int, results: tuple[str, ...]) -> None:
        self.journal, self.plane, self.step, self.results = journal, plane, step, results

    @property
    def resumed(self) -> Progress | None:
        """Where to go on, if it is this pass that was under way."""
        position = self.journal.position
        return position.inner if (position.plane, position.step) == (self.plane, self.step) else None

    def is_due(self) -> bool:
        """See ``RunJournal.is_due``."""
        return self.journal.is_due()

    def needs(self, name: str) -> bool:
        """See ``RunJournal.needs``."""
        return self.journal.needs(name)

    def note(self, progress: Progress) -> None:
        """See ``RunJournal.note``."""
        self.journal.note(Position(self.plane, self.step, self.results, progress))


def _processors() -> list[str]:
    """What computes here; another one may round otherwise."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), gpu]


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
