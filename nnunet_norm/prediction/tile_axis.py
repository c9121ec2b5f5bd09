"""What one axis of an image offers to tiles and halos: arithmetic of :mod:`nnunet_norm.prediction.halo`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_norm.tiling import round_up

Sides = tuple[tuple[int, int], ...]
"""(before, after) per spatial axis, in voxels."""

TOKENS = 2
"""Halo of a network that takes one extent alone, in total strides, which are the tokens of its transformer. UNETR's is 32
voxels by its effective receptive field (Buglakova et al. 2025, arXiv:2503.19545), two tokens of 16."""


@dataclass(frozen=True)
class TileAxis:
    """What one axis offers, in voxels: padded image, tile to start from, and how large a tile may become."""

    stride: int
    padded: int
    tile: int
    largest: int

    def edge_for(self, total: int, *, keep_half: bool) -> int | None:
        """Smallest tile edge that holds halos of ``total`` (both sides) and a core, or None.

        The core is at least one stride, with ``keep_half`` at least half of the tile. A tile that holds the whole axis needs
        no halo.
        """
        for edge in sorted({self.tile, 2 * total, self.padded, self.largest}):
            core = max(edge // 2, self.stride) if keep_half else self.stride
            if self.tile <= edge <= self.largest and (self.padded <= edge or total + core <= edge):
                return edge
        return None

    def cap(self, sides: tuple[int, int]) -> tuple[int, int]:
        """The sides, scaled down if they must be, so that the core is at least half of the tile."""
        room = self.tile - max(self.stride, round_up(math.ceil(self.tile / 2), self.stride))
        total = sum(sides)
        return sides if total <= room else (sides[0] * room // total, sides[1] * room // total)


def of_tokens(axes: Sequence[TileAxis]) -> tuple[Sides, str]:
    """The halo of a transformer: two tokens on every side, or less where the tile is small.

    Per axis two tokens where a third of the tile is left, else at most so much that half of it is.

    Returns:
        The halo, and where it comes from.
    """
    wanted = [TOKENS * axis.stride for axis in axes]
    fits = [axis.tile >= 3 * halo for axis, halo in zip(axes, wanted, strict=True)]
    sides = tuple(
        (halo, halo) if fit else axis.cap((halo, halo)) for axis, halo, fit in zip(axes, wanted, fits, strict=True)
    )
    return sides, "two tokens" if all(fits) else "two tokens, or half of the tile"
