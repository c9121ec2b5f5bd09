"""Order statistics of values that come in parts, exactly and in bounded memory: two passes of histograms over bits.

The bits of a float32, read as a whole number with the sign turned round, are in the order of the values. So a histogram over
the upper half of the bits tells in which of 65536 bins the value of a rank lies, and one over the lower half, of that bin
alone, which value it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HALF = 16
BINS = 1 << HALF
SIGN = np.uint32(1 << 31)


class OrderStatistics:
    """The values of some ranks, of values other than 0 that come in parts, twice, and of zeros that are only counted.

    First every part goes to ``add``; then ``choose`` says which ranks are wanted; then every part goes to ``refine``.
    """

    def __init__(self) -> None:
        self._coarse = np.zeros(BINS, np.int64)
        self._fine: dict[int, NDArray[np.int64]] = {}
        self._ranks: list[tuple[int, int]] = []
        self._zero = int(_keys(np.zeros(1, np.float32))[0])

    def add(self, values: NDArray[np.float32]) -> None:
        """First pass."""
        self._coarse += np.bincount(_keys(values) >> HALF, minlength=BINS)

    def choose(self, ranks: Sequence[int], zeros: int) -> None:
        """Say what is wanted.

        Args:
            ranks: from 0, among all values.
            zeros: how many of them are 0.
        """
        self._coarse[self._zero >> HALF] += zeros
        ends = self._coarse.cumsum()
        bins = np.searchsorted(ends, ranks, side="right").tolist()
        self._ranks = [(b, rank - int(ends[b] - self._coarse[b])) for b, rank in zip(bins, ranks, strict=True)]
        self._fine = {b: np.zeros(BINS, np.int64) for b in bins}
        if self._zero >> HALF in self._fine:
            self._fine[self._zero >> HALF][self._zero % BINS] += zeros

    def refine(self, values: NDArray[np.float32]) -> None:
        """Second pass, over the same values."""
        keys = _keys(values)
        for number, counts in self._fine.items():
            counts += np.bincount(keys[keys >> HALF == number] % BINS, minlength=BINS)

    def values(self) -> NDArray[np.float32]:
        """The values of the ranks, in the order of ``choose``."""
        lower = [int(np.searchsorted(self._fine[b].cumsum(), rank, side="right")) for b, rank in self._ranks]
        keys = [(b << HALF) + low for (b, _), low in zip(self._ranks, lower, strict=True)]
        return _values(np.array(keys, np.uint32))


def _keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _values(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.where(keys & SIGN, keys ^ SIGN, ~keys).view(np.float32)
