"""Train/eval disparity."""

from typing import Any

from torch import Tensor

from nnunet_norm.metrics.dice import class_masks, dice


def train_eval_disparity(train_logits: Any, eval_logits: Any, *, regions: bool = False) -> Tensor:
    """``1 - Dice(P_train, P_eval)`` of the same tiles in train and in eval mode, per foreground class or region.

    0: the network predicts with the population statistics what it predicts with those of the batch. NaN for a class that
    neither predicts.

    Args:
        train_logits: Output with the norms in train mode, ``(N, C, *spatial)``.
        eval_logits: Output with the norms in eval mode, same shape.
        regions: Whether the channels are regions (sigmoid) instead of labels (softmax).

    Returns:
        ``(K,)`` in float64.

    References:
        Buglakova et al. 2025, section 3.3.
    """
    return 1 - dice(class_masks(train_logits, regions=regions), class_masks(eval_logits, regions=regions))
