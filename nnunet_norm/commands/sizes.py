"""Sizes of memory as users write them."""

import re

from nnunet_norm.errors import TilingError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``6G``, ``6GB``, ``6GiB`` or ``500M``; units are powers of 1024.

    Raises:
        TilingError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise TilingError(f"size {text!r} is none: give a number and a unit, for example 6G or 500M")
    return int(float(match[1]) * _UNITS[match[2]])
