"""One writer per folder: a lock that says whose it is, and that lives as long as anything that inherited it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_norm.errors import OutputError, SweepError

try:
    import fcntl
except ImportError:  # Windows: two sweeps at once in one folder are then not noticed
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".nnunet_norm_sweep.lock"
"""Name of the file that is locked; it stays, and says who had it last."""

MOMENT = 5.0
"""Seconds until a lock is taken for held: a process that was killed a moment ago may still be about to end, and whoever asks
for the state of a sweep holds it for an instant."""

REQUEUED = 120.0
"""Seconds that a job waits for itself: SLURM begins it again while what it was may have KillWait seconds to end."""


@dataclass(frozen=True)
class Owner:
    """Who has a lock.

    Attributes:
        sweep: its name.
        host: the machine.
        process: its number there.
        job: of SLURM, as ``<array>_<number>``; None outside of one.
    """

    sweep: str
    host: str
    process: int
    job: str | None = None

    def __str__(self) -> str:
        job = "" if self.job is None else f"job {self.job}, "
        return f"sweep {self.sweep} ({job}process {self.process} on {self.host})"


def this_owner(sweep: str) -> Owner:
    """This process, as the owner of a lock."""
    return Owner(sweep, socket.gethostname(), os.getpid(), own_job())


def own_job() -> str | None:
    """The job of SLURM that this process belongs to, as ``<array>_<number>``; None if there is none."""
    number, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return os.environ.get("SLURM_JOB_ID") if number is None else f"{number}_{task}"


@contextmanager
def locked(folder: Path, sweep: str) -> Iterator[tuple[int, ...]]:
    """Hold a folder's lock, for this process and for those that it hands the descriptor to.

    The descriptor is that of an open file: as long as any process has it, the lock is held, so that a training which outlives
    the process that started it keeps others out.

    Args:
        folder: made if need be.
        sweep: name of the sweep.

    Yields:
        The descriptor, for ``pass_fds``; nothing where the file system has no locks.

    Raises:
        SweepError: somebody else has it; the message names them.
        OutputError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}): choose another nnUNet_results") from error
    with file:
        if not _take(file.fileno(), folder, this_owner(sweep)):
            yield ()
            return
        file.truncate(0)
        file.write(json.dumps(asdict(this_owner(sweep))))
        file.flush()
        yield (file.fileno(),)


def owner_of(folder: Path, patience: float = 0.0) -> Owner | None:
    """Who has a folder's lock; None if nobody has.

    Args:
        folder: may be missing.
        patience: seconds that the lock must have been held until it is believed.
    """
    if fcntl is None or not (folder / LOCK).is_file():
        return None
    end = time.monotonic() + patience
    with suppress(OSError), (folder / LOCK).open(encoding="utf-8") as file:  # the file system may have no locks
        while not _locked_now(file.fileno(), shared=True):
            if time.monotonic() >= end:
                return _read(folder) or Owner("unknown", "another machine", 0)
            time.sleep(0.1)
    return None


def refuse_locked(folder: Path) -> None:
    """Refuse a folder that somebody has.

    Raises:
        SweepError: that names them.
    """
    if (owner := owner_of(folder, MOMENT)) is not None:
        raise _refusal(folder, owner)


def _refusal(folder: Path, owner: Owner | None) -> SweepError:
    return SweepError(f"{folder} is being written to by {owner or 'another sweep'}: wait for it, or end it first")


def _take(descriptor: int, folder: Path, own: Owner) -> bool:
    """Whether the lock is held now; False where there are no locks."""
    if fcntl is None:
        return False
    begun = time.monotonic()
    try:
        while not _locked_now(descriptor, shared=False):
            other = _read(folder)
            again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
            is_own = again and own.job is not None and other is not None and other.job == own.job
            if time.monotonic() - begun > (REQUEUED if is_own else MOMENT):
                raise _refusal(folder, other)
            time.sleep(0.1)
    except OSError as error:  # some file systems of clusters have none
        logger.warning("%s: its file system has no locks (%s); nothing keeps two sweeps apart", folder, error.strerror)
        return False
    return True


def _locked_now(descriptor: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / LOCK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # it is being written this moment
        return None
