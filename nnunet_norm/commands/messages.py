"""What the library logs, shown to the user of a command."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def messages_shown() -> Iterator[None]:
    """Inside, print what the library logs: corrections of plans, tiles and halo of an image."""
    logger = logging.getLogger("nnunet_norm")
    handler = logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
