"""Calling the real programs: output into a log, progress read from it, one line when a program fails."""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from nnunet_norm.errors import NnunetNormError, SetupError

POLL = 0.2
"""Seconds between two looks at the log."""

PATIENCE = 10
"""Seconds that an interrupted program has for ending by itself."""


def run_logged(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
    keep_open: int | None = None,
) -> None:
    """Run ``command`` with all of its output appended to ``log``.

    Args:
        command: program, found on the ``PATH`` of ``environment``, and its arguments.
        log: file that the output goes to.
        environment: of the program.
        on_line: called with every line of the output while the program runs.
        keep_open: a file descriptor that the program inherits.

    Raises:
        SetupError: there is no such program.
        NnunetNormError: the program failed; the message names it, its exit code and its log.
    """
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise SetupError(f"{command[0]} is not on the PATH: install nnunetv2 in the environment of nnunet-norm")
    with log.open("a", encoding="utf-8") as sink, log.open(encoding="utf-8", errors="replace") as source:
        print("$ " + " ".join(command), file=sink, flush=True)
        source.seek(0, 2)
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=() if keep_open is None else (keep_open,),
        )
        try:
            _follow(process, source, on_line)
        finally:
            _end(process)
    if process.returncode:
        raise NnunetNormError(f"{command[0]} failed (exit code {process.returncode}): its output is in {log}")


def _follow(process: "subprocess.Popen[bytes]", source: IO[str], on_line: Callable[[str], None]) -> None:
    """Hand on complete lines until the program has ended; a carriage return, as progress bars use it, ends a line too."""
    rest = ""
    running = True
    while running:
        running = process.poll() is None  # asked first, so that nothing written before the end is missed
        *lines, rest = (rest + source.read()).replace("\r", "\n").split("\n")
        for line in lines:
            on_line(line)
        if running:
            time.sleep(POLL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Leave no program behind: ask an interrupted one to end, and insist after a while."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
