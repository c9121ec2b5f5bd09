"""Where the machines of a job meet, by what SLURM says of it."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess

from nnunet_norm.errors import SweepError

FIRST_PORT, PORTS = 20000, 10000
"""Ports from which a job takes one by its number, so that two jobs whose first machine is the same do not meet."""


def own_machine() -> int:
    """Which machine of its job this is, from 0; 0 outside of a job."""
    number = os.environ.get("SLURM_NODEID", "")
    return int(number) if number.isdecimal() else 0


def meeting_of(nodes: int) -> list[str]:
    """Flags of ``nnunet-norm train`` for a job of several machines; none for one.

    Args:
        nodes: that the training is to have.

    Raises:
        SweepError: the job has another number of machines, or SLURM does not tell where they are.
    """
    if nodes == 1:
        return []
    there = os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    if there != str(nodes):
        raise SweepError(f"nodes {nodes}: this job has {there}; submit it with --engine slurm")
    job = os.environ["SLURM_JOB_ID"]
    first = _asked("show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
    port = FIRST_PORT + int(job) % PORTS
    flags = ["--nnodes", str(nodes), "--node-rank", str(own_machine())]
    flags += ["--rdzv-endpoint", f"{_address(first)}:{port}"]
    flags += ["--rdzv-id", f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"]
    own = _address(os.environ["SLURMD_NODENAME"])
    return flags + (["--local-addr", own] if _is_number(own) else [])


def _address(node: str) -> str:
    """A node's address, which is not its name where several run on one machine."""
    found = re.search(r"NodeAddr=(\S+)", _asked("show", "node", node))
    return found[1] if found else node


def _asked(*words: str) -> str:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout  # noqa: S607
    except (OSError, subprocess.CalledProcessError) as error:
        raise SweepError(
            f"scontrol {' '.join(words)} failed ({error}): SLURM does not tell where machines are"
        ) from error


def _is_number(address: str) -> bool:
    try:
        ipaddress.IPv4Address(address)
    except ValueError:
        return False
    return True
