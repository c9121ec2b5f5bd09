"""What the reports of the benchmarks share: machine, versions, command line, spreads and tables."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nnunet_norm.errors import NnunetNormError


@contextmanager
def refusals_in_one_line(program: str) -> Iterator[None]:
    """What the package refuses ends the program with that line."""
    try:
        yield
    except NnunetNormError as error:
        sys.exit(f"{program}: {error}")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's arguments, without abbreviations, which :func:`command` does not look for."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def machine(device: str) -> dict[str, Any]:
    """CPU, caches, cores, memory, GPU."""
    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with suppress(OSError, IndexError):
        found["cpu"] = Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].lstrip("\t: ")
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    with suppress(OSError):
        levels = [
            [(index / name).read_text().strip() for name in ("level", "type", "size")]
            for index in caches.glob("index*")
        ]
        found["caches"] = {f"L{level} {kind}": size for level, kind, size in sorted(levels)}
    with suppress(OSError, ValueError):
        found["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["gpu"] = torch.cuda.get_device_name() if device == "cuda" else None
    return found | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")}


def versions() -> dict[str, str]:
    """Python, the packages that matter, and the commit."""
    found = {"python": platform.python_version()}
    for name in ("torch", "nnunetv2", "dynamic_network_architectures", "monai", "numpy", "nnunet_norm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return found


def command(program: str, arguments: Sequence[str], folders: Sequence[str]) -> str:
    """The command line of a benchmark, without the names of folders: those are what follows one of ``folders``.

    Its parser must be that of :func:`parser_of`: abbreviations are not looked for here.
    """
    shown = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        flag, equals, _ = word.partition("=")
        shown.append("FOLDER" if before in folders else f"{flag}=FOLDER" if equals and flag in folders else word)
    return shlex.join(["python", f"benchmarks/{program}", *shown])


def command_or_former(program: str, arguments: Sequence[str], folders: Sequence[str], former: Path) -> str:
    """The command that made the results: that of the file ``former``, if this call only reports on what is there."""
    if "--report-only" in arguments and former.exists():
        known = json.loads(former.read_text(encoding="utf-8")).get("command")
        if known is not None:
            return str(known)
    return command(program, arguments, folders)


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median, and in brackets the least and the most."""
    if not values:
        return "not measured"
    middle = f"{median(values):.3g}{unit}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g} to {max(values):.3g})"


def amount(count: float | None) -> str:
    """Bytes, as people read them."""
    if count is None:
        return ""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; short rows are filled up."""
    full = [[*cells, *[""] * (len(rows[0]) - len(cells))] for cells in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in full]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
