"""Norms folded into convolutions for prediction, with the weights of every fold of a trained model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.stages.folding import Pair, find_foldable, fold_norms


def fold_model(network: nn.Module, list_of_parameters: list[dict[str, Any]]) -> tuple[Pair, ...]:
    """Fold a network, in place, and replace the weights of every fold by those that the folded network takes.

    A network whose forward cannot be followed stays as it is: it is never guessed how it is wired.

    Args:
        network: without wrappers; it ends with the weights of the first fold.
        list_of_parameters: a state dict per fold (of the cross-validation), as nnU-Net's predictor holds them.

    Returns:
        What was folded; empty where nothing can be.
    """
    try:
        pairs = find_foldable(network)
    except ArchitectureError:
        return ()
    if not pairs:
        return ()
    for number, weights in enumerate(list_of_parameters):  # one at a time: then only one is in memory twice
        of_fold = copy.deepcopy(network)
        of_fold.load_state_dict(weights)
        fold_norms(of_fold, pairs)
        list_of_parameters[number] = of_fold.state_dict()
    fold_norms(network, pairs)
    network.load_state_dict(list_of_parameters[0])
    return pairs
