"""The runs of a sweep on this machine: one process each, as many at once as there are slots."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock

from nnunet_norm.errors import SweepError
from nnunet_norm.sweep.task import Task

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        task: that was run.
        code: its exit code, negative for a signal.
        output: of the run's process: the last lines of the training if it failed.
    """

    task: Task
    code: int
    output: str


def gpu_slots(available: int, gpus: int, wanted: int | None = None) -> list[dict[str, str]]:
    """What every run that goes on at the same time sees of the GPUs, as changes of its environment.

    Args:
        available: that torch finds, among those that ``CUDA_VISIBLE_DEVICES`` leaves.
        gpus: per run.
        wanted: slots at most; None: as many as the GPUs give.

    Raises:
        SweepError: for fewer GPUs than a run needs, or than are wanted.
    """
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = (named or [str(number) for number in range(available)])[:available]
    most = available // gpus
    if wanted is not None and wanted > most:
        raise SweepError(f"--slots {wanted}: {available} GPUs are enough for {most} runs of {gpus} at once")
    if not most:
        raise SweepError(f"gpus {gpus}: this machine has {available}; ask for fewer, or train with -device cpu")
    count = most if wanted is None else wanted
    return [{VISIBLE: ",".join(names[slot * gpus : (slot + 1) * gpus])} for slot in range(count)]


def run_local(
    tasks: Sequence[Task],
    slots: Sequence[Mapping[str, str]],
    *,
    began: Callable[[Task], None] = lambda task: None,
    ended: Callable[[Ended], None] = lambda end: None,
) -> None:
    """Run all, each as a fresh process; a failure does not stop the others.

    An exception, as that of Ctrl-C, ends all runs in order before it goes on. If this process is killed, they are killed too.

    Args:
        tasks: in the order in which they begin.
        slots: one run at a time in each, with its changes of the environment.
        began: called when a run begins, in a thread of its slot.
        ended: called when one has ended.
    """
    pool = _Slots(SimpleQueue(), began)
    for slot in slots:
        pool.free.put(slot)
    with ThreadPoolExecutor(len(slots)) as threads:
        futures = [threads.submit(pool.run, task) for task in tasks]
        try:
            for future in as_completed(futures):
                ended(future.result())
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.interrupt()


@dataclass
class _Slots:
    """Slots that are free, and the processes that go on in the others."""

    free: SimpleQueue[Mapping[str, str]]
    began: Callable[[Task], None]
    running: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    interrupted: bool = False

    def run(self, task: Task) -> Ended:
        slot = self.free.get()
        try:
            with self.lock:
                if self.interrupted:
                    return Ended(task, -signal.SIGINT, "")
                # Ctrl-C reaches it through this process alone; the system kills it with this one.
                process = subprocess.Popen(
                    [*task.command(), "--parent", str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=os.environ | slot,
                    start_new_session=True,
                )
                self.running[process.pid] = process
            self.began(task)
            output, _ = process.communicate()
            with self.lock:
                del self.running[process.pid]
            return Ended(task, process.returncode, output)
        finally:
            self.free.put(slot)

    def interrupt(self) -> None:
        """Have no more run begin, and those that go on end in order."""
        # What a shell has begun in the background, and its children, do not hear SIGINT.
        unheard = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with self.lock:
            self.interrupted = True
            for process in self.running.values():
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM if unheard else signal.SIGINT)
