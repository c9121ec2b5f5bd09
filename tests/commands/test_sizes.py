import pytest

from nnunet_norm.commands.sizes import parse_size
from nnunet_norm.errors import TilingError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6G", 6 * 2**30),
        ("6GB", 6 * 2**30),
        ("6GiB", 6 * 2**30),
        ("6g", 6 * 2**30),
        (" 1.5 G ", 3 * 2**29),
        ("500M", 500 * 2**20),
        ("2T", 2**41),
        ("64k", 2**16),
        ("1000000", 10**6),
        ("12B", 12),
    ],
)
def test_sizes_are_read(text, expected):
    """A number with or without a unit, which is a power of 1024 in all its spellings."""
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "much", "-6G", "6 X", "0", "0.0G", "6G6", "1e9", "inf", "0.0001k"])
def test_what_is_no_size_is_refused(text):
    """With the flag, and two that are."""
    with pytest.raises(
        TilingError, match=f"^--max '{text}' is no size: give a number and a unit, for example 6G or 500M$"
    ):
        parse_size(text, "--max")
