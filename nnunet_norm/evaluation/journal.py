"""What was measured already, one line per case, so that it is not measured again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from nnunetv2.evaluation.evaluate_predictions import key_to_label_or_region, label_or_region_to_key

from nnunet_norm.errors import OutputError
from nnunet_norm.evaluation.options import Class
from nnunet_norm.evaluation.pairs import Pair

Metrics = dict[Class, dict[str, Any]]


class CaseJournal:
    """A file to which every finished case is added at once, or nothing (``path`` None).

    A case is known as long as both of its files have the size and the time of change that they had, and the settings are the
    same. Whoever is killed while a line is written loses that line.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Read what is there.

        Args:
            path: of the journal; what it has of other files or settings stays in it.
            settings: how cases are measured; JSON.

        Raises:
            OutputError: the file can be neither read nor written.
        """
        self.path, self.settings = path, settings
        self.known: dict[str, Metrics] = {}
        self.file: IO[str] | None = None
        if path is None:
            return
        try:
            text = path.read_bytes().decode(errors="replace") if path.exists() else ""
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror}): choose another folder") from error
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # cut off, or another version's
                content = json.loads(line)
                metrics = {key_to_label_or_region(key): values for key, values in content["metrics"].items()}
                self.known[_key(content["of"])] = metrics
        self.begins_line = not text or text.endswith("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()

    def of(self, pair: Pair) -> dict[str, Any]:
        """What the metrics of a case depend on, now."""
        files = [[os.path.abspath(file), *_state(file)] for file in (pair.reference, pair.prediction)]
        return {"case": pair.case, "files": files, "settings": self.settings}

    def get(self, of: Mapping[str, Any]) -> Metrics | None:
        """The metrics of a case, if they are known."""
        return self.known.get(_key(of))

    def add(self, of: Mapping[str, Any], metrics: Metrics) -> None:
        """Add a case.

        Raises:
            OutputError: the disk is full, or gone.
        """
        if self.file is None:
            return
        content = {"of": of, "metrics": {label_or_region_to_key(one): values for one, values in metrics.items()}}
        try:
            # In one piece, so that two processes that share the file do not mix their lines.
            self.file.write(("" if self.begins_line else "\n") + json.dumps(content) + "\n")
            self.file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror}): make room") from error
        self.begins_line = True


def _state(file: str) -> tuple[int, int]:
    """Size and time of change; zeros for a file that is not there, about which the reader will complain."""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _key(of: Mapping[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)
