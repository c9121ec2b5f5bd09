"""Sizes of memory as users write them."""

import re

from nnunet_norm.errors import TilingError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_size(text: str, flag: str = "size") -> int:
    """Bytes of a size such as ``6G``, ``6GB``, ``6GiB`` or ``500M``; units are powers of 1024.

    Raises:
        TilingError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match is not None else 0
    if count < 1:
        raise TilingError(f"{flag} {text!r} is no size: give a number and a unit, for example 6G or 500M")
    return count
