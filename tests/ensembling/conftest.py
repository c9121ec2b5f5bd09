"""Lets the tests of this folder import their helpers, and those of predictions, under pytest's importlib mode."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "prediction")]
