"""One run of a sweep as a process of its own: ``python -m nnunet_norm.sweep.training ...``, which the engines start.

It holds the lock of the results folder, starts the training as a fresh process, keeps its output, and notes how it ended.
Begun again at any moment, it goes on where the training was, and does nothing where it is finished. It imports nothing heavy:
on a machine with eight GPUs eight of them wait beside the trainings.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from nnunet_norm.errors import NnunetNormError
from nnunet_norm.orphans import end_with_parent
from nnunet_norm.submission import last_lines
from nnunet_norm.sweep.finished import missing_of
from nnunet_norm.sweep.locking import locked, this_owner
from nnunet_norm.sweep.machines import meeting_of, own_machine
from nnunet_norm.sweep.records import SIGNALS, note_begin, note_end
from nnunet_norm.sweep.task import Task, parse

REFUSED, FAILED = 2, 1
"""Exit codes of a refusal, and of a training that ended well and lacks something."""

GRACE = 1.0
"""Seconds until a signal is passed on: SLURM sends it to the training itself, too, and a second one would disturb its end."""

INTERRUPTION_SECONDS = 15.0
"""What the training has to put itself in order; then it is killed. Less than a job of SLURM gives this process."""

WORKERS = 12
"""nnU-Net's number of processes that augment, which is too many for few cores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train one run; the code is that of the training, 2 after a refusal, and 0 where there was nothing to do."""
    task, parent = parse(argv)
    end_with_parent()
    if parent is not None and os.getppid() != parent:  # it was killed before the line above
        return FAILED
    try:
        with _signals_noted() as received:
            code = train(task, received) if own_machine() == 0 or task.nodes == 1 else follow(task, received)
    except NnunetNormError as error:
        print(f"nnunet_norm.sweep.training: {error}", flush=True)  # noqa: T201 - the output of a program
        return REFUSED
    if code < 0:  # whoever started this process is to see how the training ended
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def train(task: Task, received: list[signal.Signals]) -> int:
    """Hold the lock, train what is not finished, and note it.

    Args:
        task: what is trained.
        received: grows by every signal that this process is sent.

    Returns:
        The training's exit code, negative for a signal.

    Raises:
        SweepError: another process trains there, or the machines of the job cannot meet.
        OutputError: a folder cannot be written to.
    """
    with locked(task.results, task.sweep) as descriptors:
        if missing_of(task.results, npz=task.npz) is None:
            print(f"{task.name} is finished already", flush=True)  # noqa: T201
            return 0
        command = _command(task)
        if descriptors:  # nobody else writes here
            _remove_halves(task.results)
        note_begin(task.record, this_owner(task.sweep))
        start = task.log.stat().st_size if task.log.is_file() else 0
        code = _run(task, command, task.log, descriptors, received)
        lacks = missing_of(task.results, npz=task.npz)
        if code == 0 and lacks is not None:
            code = FAILED
            with task.log.open("a", encoding="utf-8") as log:
                log.write(f"the training ended well, but left no {lacks}\n")
        lines = last_lines(task.log, start=start) if code else []
        note_end(task.record, code, lines)
    for line in lines:
        print(line, flush=True)  # noqa: T201
    return code


def follow(task: Task, received: list[signal.Signals]) -> int:
    """Take part in a training whose first machine holds the lock."""
    if missing_of(task.results, npz=task.npz) is None:
        return 0
    return _run(task, _command(task), task.log.with_suffix(f".machine_{own_machine()}.log"), (), received)


def _run(task: Task, command: list[str], log: Path, descriptors: Sequence[int], received: list[signal.Signals]) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        sink.write(f"+ {shlex.join(command)}\n".encode())
        sink.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=_environment(task),
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C reaches it through this process alone
            preexec_fn=end_with_parent,  # safe: there is one thread here
        )
        return _ended(process, received)


def _ended(process: subprocess.Popen[bytes], received: list[signal.Signals]) -> int:
    """The exit code, once there is one; a signal is passed on."""
    told: float | None = None
    while (code := process.poll()) is None:
        if received and told is None:
            time.sleep(GRACE if received[0] == signal.SIGTERM else 0)
            process.send_signal(received[0])
            told = time.monotonic()
        if told is not None and time.monotonic() - told > INTERRUPTION_SECONDS:
            process.kill()
        time.sleep(0.2)
    # However it ended, it was told to: by its own code, which may be that of any other error, nobody would know.
    return -received[0] if received and code else code


def _remove_halves(results: Path) -> None:
    """Remove checkpoints that an attempt was writing when it was killed; see :func:`nnunet_norm.writing.written_beside`."""
    for half in results.glob(".*-checkpoint_*.pth"):
        half.unlink(missing_ok=True)


def _command(task: Task) -> list[str]:
    python, arguments = [sys.executable, "-m"], task.training_arguments()
    if task.processes == task.nodes == 1:
        return [*python, "nnunet_norm.training.launch", *arguments]
    return [*python, "nnunet_norm.cli", "train", *arguments, "-num_gpus", str(task.processes), *meeting_of(task.nodes)]


def _environment(task: Task) -> dict[str, str]:
    """That of this process, with its share of the cores; what the user has set stays."""
    own = {"PYTHONUNBUFFERED": "1"}
    share = task.cores // task.processes
    if task.cores and task.device == "cpu":
        own["OMP_NUM_THREADS"] = str(max(share, 1))
    if task.cores and share < WORKERS:
        own["nnUNet_n_proc_DA"] = str(max(share, 1))
    return own | os.environ


@contextmanager
def _signals_noted() -> Iterator[list[signal.Signals]]:
    """Inside, signals that would end this process are put into a list; those that are ignored stay so."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    numbers = [signal.Signals[name] for name in SIGNALS]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
