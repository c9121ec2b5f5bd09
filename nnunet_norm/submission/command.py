"""A command line as a job runs it: as a fresh process that is begun again, and goes on, after a requeue."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import IO, Any

from nnunet_norm.errors import SubmissionError
from nnunet_norm.submission.queue import LAST_LINES, states

INTERRUPTION_SECONDS = 20
"""What a command that is to be begun again has to put itself in order; then it is killed."""

USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""One of them tells a job that its end is near; SLURM sends it to every process of the job."""


class Command:
    """A command line as submitit's jobs call it: runs as a process of its own, and begins again after a requeue."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run it to its end.

        Raises:
            SubmissionError: it failed; with its last lines.
        """
        print(f"+ {shlex.join(self.command)}", flush=True)  # noqa: T201 - the log of a job
        with _blocked(USER_SIGNALS):  # the process inherits that: this one is told, and decides
            self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout is not None
        last: deque[str] = deque(maxlen=LAST_LINES)
        # In a thread: if the command is killed, those that it started may hold its output open for ever.
        reader = Thread(target=_pass_on, args=(self._process.stdout, last), daemon=True)
        reader.start()
        while (code := self._process.poll()) is None:  # no wait(): its lock would be held while a signal is handled
            time.sleep(0.1)
        reader.join(timeout=2)
        if code == -signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            _after_termination()
        if code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            raise SubmissionError("\n".join([f"{self.command[0]} {how}; its last lines:", *last]))

    def checkpoint(self) -> Any:
        """What is run after the requeue: the same. Called by submitit when the job's end is near."""
        if self._process is not None:
            _end(self._process.pid)
        return importlib.import_module("submitit").helpers.DelayedSubmission(Command(self.command))


@contextmanager
def _blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Inside, these signals wait; a process that is started inside never sees them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pass_on(source: IO[bytes], last: deque[str]) -> None:
    with source:
        for line in source:
            text = line.decode(errors="replace").rstrip()
            last.append(text)
            print(text, flush=True)  # noqa: T201 - the log of a job


def _after_termination() -> None:
    """Decide after SIGTERM ended the command: SLURM sends it where it preempts a job and where one is cancelled."""
    number, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    own = os.environ["SLURM_JOB_ID"] if number is None else f"{number}_{task}"
    if (
        states([own]).get(own) == "RUNNING"
    ):  # seconds of grace are left: submitit's handler of this signal requeues the job
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(1)
    # Cancelled, or SLURM itself requeues it: without a result, which would be that of a job that failed.
    raise SystemExit(128 + signal.SIGTERM)


def _end(pid: int) -> None:
    """End a child that may not run on beside its successor; also from a signal's handler, where wait() may hang."""
    for number, seconds in ((signal.SIGINT, INTERRUPTION_SECONDS), (signal.SIGKILL, 5)):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(ChildProcessError):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.1)
                    continue
            return
