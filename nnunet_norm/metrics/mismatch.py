"""Tile mismatch and max dist."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from nnunet_norm.metrics.dice import class_masks, dice

_ROUNDING = {"float16": 8, "bfloat16": 8}
_ROUNDING_ELSE = 100
"""Units in the last place of the largest logit that rounding alone explains: sums of thousands of products, layer upon
layer, in another order. Half precision sums in single and rounds once a layer. A norm that sees the tile is off by units
of the first place."""


@dataclass(frozen=True)
class TileMismatch:
    """How far predictions of the same voxels from different tiles are apart.

    Attributes:
        per_class: Median over the pairs of ``1 - Dice``, per foreground class or region; NaN for a class in no pair.
        max_dist: Largest absolute difference of logits, over all channels, voxels and pairs; None without a pair.
        max_logit: Largest absolute logit met, the scale of ``max_dist``.
        num_pairs: Pairs of tiles compared.
        dtype: Precision of the logits, ``"float32"`` for example.
    """

    per_class: tuple[float, ...]
    max_dist: float | None
    max_logit: float
    num_pairs: int
    dtype: str

    @property
    def is_rounding(self) -> bool:
        """Whether ``max_dist`` is not zero, and no more than the rounding of this precision."""
        if not self.max_dist:
            return False
        units = _ROUNDING.get(self.dtype, _ROUNDING_ELSE)
        return self.max_dist <= units * torch.finfo(getattr(torch, self.dtype)).eps * self.max_logit

    @property
    def verdict(self) -> str:
        """``max_dist`` in words: "not measured", "no", "no (float32 rounding, 2.4e-06)", or the number."""
        if self.max_dist is None:
            return "not measured"
        if self.max_dist == 0:
            return "no"
        if self.is_rounding:
            return f"no ({self.dtype} rounding, {self.max_dist:.1e})"
        return f"{self.max_dist:.3g}"


@dataclass(frozen=True)
class PairDifference:
    """What :func:`tile_mismatch` needs to know of one pair; a few numbers, so that pairs need not be kept.

    Attributes:
        dice: Dice per foreground class or region; NaN for a class in neither tile.
        max_dist: Largest absolute difference of logits.
        max_logit: Largest absolute logit.
        dtype: Precision of the logits.
    """

    dice: tuple[float, ...]
    max_dist: float
    max_logit: float
    dtype: str


def compare_pair(first: Any, second: Any, *, regions: bool = False, dtype: torch.dtype | None = None) -> PairDifference:
    """Compare logits ``(C, *box)`` of the same voxels from two tiles; see :func:`tile_mismatch`.

    Args:
        first: From one tile.
        second: From the other.
        regions: Whether the channels are regions (sigmoid) instead of labels (softmax).
        dtype: Precision in which they were computed, if they were converted since.
    """
    a, b = torch.as_tensor(first), torch.as_tensor(second)
    return PairDifference(
        dice=tuple(dice(class_masks(a[None], regions=regions), class_masks(b[None], regions=regions)).tolist()),
        max_dist=(a - b).abs().max().item(),
        max_logit=_largest([a.abs().max().item(), b.abs().max().item()]),
        dtype=str(dtype or a.dtype).removeprefix("torch."),
    )


def summarize(differences: Sequence[PairDifference]) -> TileMismatch:
    """The mismatch over all pairs; without any its ``verdict`` is "not measured"."""
    if not differences:
        return TileMismatch((), None, 0.0, 0, "float32")
    return TileMismatch(
        per_class=tuple(_median([1 - d for d in dices]) for dices in zip(*(p.dice for p in differences), strict=True)),
        max_dist=_largest([pair.max_dist for pair in differences]),
        max_logit=_largest([pair.max_logit for pair in differences]),
        num_pairs=len(differences),
        dtype=differences[0].dtype,
    )


def tile_mismatch(pairs: Iterable[tuple[Any, Any]], *, regions: bool = False) -> TileMismatch:
    """Compare predictions of the same voxels that come from two tiles.

    Args:
        pairs: Logits ``(C, *box)`` of one box of the image, twice: from one tile and from another. Only voxels that are valid
            in both tiles (their halos cut away) belong in a pair. Taken one by one, not kept.
        regions: Whether the channels are regions (sigmoid) instead of labels (softmax).

    Returns:
        The mismatch; without any pair its ``verdict`` is "not measured".

    References:
        Buglakova et al. 2025, section 3.3.
    """
    return summarize([compare_pair(a, b, regions=regions) for a, b in pairs])


def _largest(values: Sequence[float]) -> float:
    """The maximum; NaN if one is NaN, where Python's max depends on the order."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _median(values: Sequence[float]) -> float:
    present = [v for v in values if not math.isnan(v)]
    return median(present) if present else math.nan
