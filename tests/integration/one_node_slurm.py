"""A real SLURM on this machine, of one node and without accounting, from Debian's packages; started and stopped by root."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "munged", "munge")

PACKAGES = ("slurm-wlm", "munge")
"""Debian's, which have them."""

INSTALL = "NNUNET_NORM_INSTALL_SLURM"
"""The variable that allows to install them where they are missing."""

SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
"""Debian's daemons lie where the PATH of users does not lead."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=localhost PriorityTier=10 PreemptMode=off
"""


def missing() -> list[str]:
    """Programs that are not there."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCHED) is None]


def require() -> None:
    """Install what is missing, if that is allowed; skips, with the reason, where SLURM cannot be started."""
    if os.geteuid() != 0:
        pytest.skip("starts SLURM's daemons, needs root")
    with FileLock(Path(tempfile.gettempdir(), "nnunet_norm_slurm.lock")):  # tests run in several processes
        if missing() and os.environ.get(INSTALL):
            install()
    if missing():
        pytest.skip(f"needs SLURM and munge, lacks {', '.join(missing())}: {INSTALL}=1 installs them with apt-get")


def install() -> None:
    """Debian's packages; skips if there is no apt-get, or it fails."""
    if shutil.which("apt-get") is None:
        pytest.skip("needs SLURM and munge, and there is no apt-get to install them")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *words], env=quiet, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs SLURM; apt-get {words[0]} failed: {(done.stderr.splitlines() or ['no reason'])[-1]}")


@contextmanager
def running(folder: Path, cpus: int) -> Iterator[Path]:
    """Inside, a control daemon and one node run, and SLURM_CONF names them.

    Args:
        folder: for all their files.
        cpus: that the node says it has.
    """
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    control_port, node_port = free_ports(2)
    told = {"folder": folder, "control_port": control_port, "node_port": node_port, "host": socket.gethostname()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**told, cpus=cpus))
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munge += [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "seed", "log")]
    with pytest.MonkeyPatch.context() as patch, open(folder / "daemons.log", "wb") as log:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{SEARCHED}")
        daemons = []
        try:
            for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
                daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
                until(lambda: (folder / "munge.socket").exists(), 20)
            until(lambda: "idle" in output_of("sinfo", "--noheader", "--format=%T"), 60)
            yield folder
        finally:
            subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
            time.sleep(0.5)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)


def free_ports(count: int) -> list[int]:
    """Of this machine."""
    with closing(socket.socket()) as a, closing(socket.socket()) as b:
        for one in (a, b):
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in (a, b)][:count]


def until(condition, seconds=120):
    """Wait until something holds, and hand it on."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail(f"nothing came of {condition} in {seconds} s")
        time.sleep(0.2)
    return found


def output_of(*command: str) -> str:
    """What a program of SLURM says."""
    return subprocess.run(command, capture_output=True, text=True).stdout
