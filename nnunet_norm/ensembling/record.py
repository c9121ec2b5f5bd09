"""The record beside an ensemble: of what every case was made, so that finished cases are not made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_norm.writing import write_json

FILE = "made_from.json"


def state_of(path: str | os.PathLike[str]) -> list[Any]:
    """What tells a file from the one that was there before: its path, size in bytes and time of change in ns."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def digest_of(content: Any) -> str:
    """A short digest of descriptions."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def changed_since(folder: str | Path) -> list[str]:
    """Files that the cases in a folder were made of, or those cases, that are others now than its record says.

    Files that are gone do not count: folders may have been moved, and probabilities removed.
    """
    cases = _read(Path(folder) / FILE).get("cases")
    changed = []
    for case in cases.values() if isinstance(cases, dict) else ():
        for path, *noted in (*case["sources"], *case["outputs"]):
            if os.path.isfile(path) and state_of(path)[1:] != noted:
                changed.append(path)
    return changed


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or that of somebody else: then nothing is known
        return {}
    return found if isinstance(found, dict) else {}


class Record:
    """What the cases in a folder were made of."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Read what is there.

        Args:
            folder: of the outputs.
            settings: what every case depends on; JSON. What was made with others counts as not there.
        """
        self.file = Path(folder) / FILE
        self.settings = json.loads(json.dumps(settings))
        found = _read(self.file)
        same = found.get("settings") == self.settings and isinstance(found.get("cases"), dict)
        self._cases: dict[str, Any] = found["cases"] if same else {}

    def is_done(self, case: str, sources: Sequence[Any], outputs: Sequence[Path]) -> bool:
        """Whether the outputs of a case are there as they were made of these sources."""
        if not all(path.is_file() for path in outputs):
            return False
        made = {"sources": list(sources), "outputs": [state_of(path) for path in outputs]}
        return bool(self._cases.get(case) == json.loads(json.dumps(made)))

    def keep_only(self, cases: Sequence[str]) -> None:
        """Forget all others, before they are made anew.

        Raises:
            OutputError: the record cannot be written.
        """
        self._cases = {case: self._cases[case] for case in cases}
        self._write()

    def note(self, case: str, sources: Sequence[Any], outputs: Sequence[Path]) -> None:
        """Enter a case whose outputs are there.

        Raises:
            OutputError: the record cannot be written.
        """
        self.note_all({case: sources}, {case: outputs})

    def note_all(self, sources: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Path]]) -> None:
        """``note`` for several cases.

        Raises:
            OutputError: the record cannot be written.
        """
        for case, of in sources.items():
            self._cases[case] = {"sources": list(of), "outputs": [state_of(path) for path in outputs[case]]}
        self._write()

    def _write(self) -> None:
        write_json(self.file, {"settings": self.settings, "cases": self._cases})
