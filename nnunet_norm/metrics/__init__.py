"""Pure functions on arrays or tensors: how good a prediction is, and what normalization does to it."""

from nnunet_norm.metrics.dice import class_masks, dice, dice_counts
from nnunet_norm.metrics.disparity import train_eval_disparity
from nnunet_norm.metrics.mismatch import PairDifference, TileMismatch, compare_pair, summarize, tile_mismatch
from nnunet_norm.metrics.surface import hausdorff_distance_95, normalized_surface_dice

__all__ = [
    "PairDifference",
    "TileMismatch",
    "class_masks",
    "compare_pair",
    "dice",
    "dice_counts",
    "hausdorff_distance_95",
    "normalized_surface_dice",
    "summarize",
    "tile_mismatch",
    "train_eval_disparity",
]
