"""No process is left over when the one that started it is killed."""

import ctypes
import os
import signal
import sys
import threading

_SIGNAL_AT_DEATH_OF_PARENT = 1
"""Linux's PR_SET_PDEATHSIG (prctl(2))."""


def end_with_parent() -> None:
    """From now on, this process is killed when the one that started it dies, however it dies; on Linux.

    torchrun's agent ends its processes in good order. If it is killed itself, they would train on, unseen, while the same
    command is started again in the same folder.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SIGNAL_AT_DEATH_OF_PARENT, int(signal.SIGKILL))


def end_children_with_this_process() -> None:
    """From now on, what this process forks in its main thread is killed when it dies, however it dies; on Linux.

    Workers of the augmentation notice an orderly end alone. After a kill they stay, with their memory, beside those of the
    training that torchrun starts again.
    """
    if not sys.platform.startswith("linux"):
        return
    prctl = ctypes.CDLL(None).prctl  # loaded here: after a fork it is too late for that
    forking = threading.local()

    def before() -> None:
        # The system means the thread that forks: a child must not end with one that ends in good order.
        forking.in_main_thread = threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        if forking.in_main_thread:
            prctl(_SIGNAL_AT_DEATH_OF_PARENT, int(signal.SIGKILL))

    os.register_at_fork(before=before, after_in_child=in_child)
