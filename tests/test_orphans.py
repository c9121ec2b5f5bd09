"""Workers end with the process that started them, also when it is killed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ORPHANS = Path(__file__).parents[1] / "nnunet_norm" / "orphans.py"

PROGRAM = """
import multiprocessing, os, runpy, signal, sys, threading, time

runpy.run_path(sys.argv[1])["end_children_with_this_process"]()  # without the package, which imports for seconds
fork = multiprocessing.get_context("fork")
worker = fork.Process(target=time.sleep, args=(600,), daemon=True)
worker.start()
of_thread = []
def start():
    of_thread.append(fork.Process(target=time.sleep, args=(600,), daemon=True))
    of_thread[0].start()
thread = threading.Thread(target=start)
thread.start()
thread.join()
time.sleep(0.3)
print(worker.pid, of_thread[0].is_alive(), flush=True)
of_thread[0].terminate()
of_thread[0].join()
os.kill(os.getpid(), signal.SIGKILL)
"""


AGENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = """
import runpy, sys, time
runpy.run_path(sys.argv[1])["end_with_parent"]()
print("ready", flush=True)
time.sleep(600)
"""


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")
def test_a_worker_ends_with_a_process_that_is_killed():
    """But one that a thread started does not end with the thread."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, ORPHANS], capture_output=True, text=True, check=False)
    pid, of_thread_lives = done.stdout.split()
    assert done.returncode == -9, done.stderr
    assert of_thread_lives == "True"
    give_up = time.monotonic() + 30
    while lives(pid) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not lives(pid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of Linux")
def test_a_process_ends_with_an_agent_that_is_killed():
    """It does not train on, unseen."""
    with subprocess.Popen([sys.executable, "-c", AGENT, ORPHANS, CHILD], stdout=subprocess.PIPE, text=True) as started:
        pid = started.stdout.readline().strip()
        assert lives(pid)
        started.kill()
    give_up = time.monotonic() + 30
    while lives(pid) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not lives(pid)
