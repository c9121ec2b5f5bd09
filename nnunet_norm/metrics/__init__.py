"""Pure functions on arrays or tensors: what normalization does to a prediction."""

from nnunet_norm.metrics.dice import class_masks, dice, dice_counts
from nnunet_norm.metrics.disparity import train_eval_disparity
from nnunet_norm.metrics.mismatch import PairDifference, TileMismatch, compare_pair, summarize, tile_mismatch

__all__ = [
    "PairDifference",
    "TileMismatch",
    "class_masks",
    "compare_pair",
    "dice",
    "dice_counts",
    "summarize",
    "tile_mismatch",
    "train_eval_disparity",
]
