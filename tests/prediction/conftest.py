"""Lets the tests of this folder import their helpers under pytest's importlib mode, and keeps small passes on one thread."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny convolutions are many times slower on all threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
