"""Two real processes for tests: a test file is started twice as a program, and leaves what each found in a folder."""

import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def one_of_two(rank, folder, seconds):
    """Inside, this process is one of two that talk through gloo."""
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    yield
    dist.barrier()
    dist.destroy_process_group()


def found_by_both(file, folder, seconds, **variables):
    """Run ``python FILE RANK FOLDER`` twice at a time; what each has saved as ``FOLDER/RANK.pt``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen([sys.executable, file, str(rank), str(folder)], env=environment, **piped) for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
