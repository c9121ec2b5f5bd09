"""Lets the tests of this folder import their helpers under pytest's importlib mode; blocks that suit small images."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Images of a test are cut into blocks as large ones are, about 16 x 16 or 8 x 8 x 8 voxels; else they would be one."""
    from nnunet_norm.prediction import ways

    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**12)
    monkeypatch.setattr(ways, "SMALLEST_BLOCK_BYTES", 2**12)
