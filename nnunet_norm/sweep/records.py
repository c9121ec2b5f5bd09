"""What is known of a run's attempts: when, where and how each ended."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from nnunet_norm.sweep.locking import Owner
from nnunet_norm.writing import write_json

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""On which a run is ended, in order. A job of SLURM blocks the last two for it, and decides itself what they mean."""

INTERRUPTED = tuple(-int(getattr(signal, name, 0)) for name in SIGNALS)
"""Codes of a run that was interrupted, cancelled or preempted, and did not fail."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run.

    Attributes:
        began: UTC, in ISO form.
        host: the machine.
        process: its number there.
        job: of SLURM.
        ended: likewise; None while it runs, and after a kill.
        code: with which it ended; negative for a signal.
        lines: the last ones of its log, if it failed.
    """

    began: str
    host: str
    process: int
    job: str | None = None
    ended: str | None = None
    code: int | None = None
    lines: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and not well."""
        return self.code not in (None, 0, *INTERRUPTED)


def ending(code: int) -> str:
    """How an attempt ended, for people.

    Args:
        code: as :attr:`Attempt.code`.
    """
    if code >= 0:
        return f"exit code {code}"
    memory = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{memory}"


def read_attempts(record: Path) -> list[Attempt]:
    """All attempts in their order; none if there is no record, or one that is not readable."""
    try:
        return [Attempt(**attempt) for attempt in json.loads(record.read_text(encoding="utf-8"))["attempts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def note_begin(record: Path, owner: Owner) -> None:
    """Note an attempt that begins now."""
    attempt = Attempt(began=_now(), host=owner.host, process=owner.process, job=owner.job)
    _write(record, [*read_attempts(record), attempt])


def note_end(record: Path, code: int, lines: Sequence[str]) -> None:
    """Note that the last attempt ended.

    Args:
        record: with an attempt that began.
        code: as :attr:`Attempt.code`.
        lines: the last ones of the log.
    """
    *before, last = read_attempts(record)
    _write(record, [*before, replace(last, ended=_now(), code=code, lines=list(lines))])


def _write(record: Path, attempts: list[Attempt]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"attempts": [asdict(attempt) for attempt in attempts]})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
