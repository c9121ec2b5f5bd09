"""Lets the tests of this folder import their helpers under pytest's importlib mode."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
