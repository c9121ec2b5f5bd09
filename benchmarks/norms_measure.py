"""Dice and disparity of a trained network in the modes of its norms, on the same batches of validation tiles."""

import contextlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from torch import Tensor, nn

from nnunet_norm.layers import differs_from_batch_norm, plain_batch_statistics
from nnunet_norm.metrics import class_masks, dice_counts
from nnunet_norm.statistics import norms_in_train_mode
from nnunet_norm.training import NormTrainer
from nnunet_norm.training.disparity import Disparity, DisparityCounts, measure_disparity

SHUFFLE = 0
"""Seed of the order of the tiles: a batch holds tiles of any place and case, as in training."""


def trained(dataset: str, configuration: str, trainer: str, plans: str, checkpoint: Path) -> NormTrainer:
    """nnU-Net's trainer with the weights of ``checkpoint``: unlike a predictor's, its network has the training's schedule."""
    with contextlib.redirect_stdout(io.StringIO()):
        made: NormTrainer = get_trainer_from_args(
            dataset, configuration, 0, trainer, plans, False, device=torch.device("cpu")
        )
        made.initialize()
        made.load_checkpoint(str(checkpoint))
        made.set_deep_supervision_enabled(False)
    made.network.eval()
    return made


def tiles(trainer: NormTrainer) -> list[tuple[Tensor, Tensor]]:
    """All validation cases cut into patches side by side, as (C, *patch) and labels (1, *patch); for 2d slice by slice."""
    patch = trainer.configuration_manager.patch_size
    found = []
    with contextlib.redirect_stdout(io.StringIO()):
        _, validation = trainer.get_tr_and_val_datasets()
    for case in sorted(validation.identifiers):
        data, labels, *_ = validation.load_case(case)
        image, reference = (torch.from_numpy(np.asarray(array[:]).astype(np.float32)) for array in (data, labels))
        by_slice = zip(image.unbind(1), reference.unbind(1), strict=True)
        for part, truth in by_slice if len(patch) == 2 else [(image, reference)]:
            starts = [range(0, n - p + 1, p) for n, p in zip(part.shape[1:], patch, strict=True)]
            for place in itertools.product(*starts):
                box = (slice(None), *[slice(s, s + p) for s, p in zip(place, patch, strict=True)])
                found.append((part[box].contiguous(), truth[box].long().clamp(min=0)))
    order = np.random.default_rng(SHUFFLE).permutation(len(found))
    return [found[number] for number in order]


def batches(cut: list[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches: their size decides what BatchNorm does."""
    for start in range(0, len(cut) - size + 1, size):
        images, labels = zip(*cut[start : start + size], strict=True)
        yield torch.stack(images), torch.stack(labels)


@contextlib.contextmanager
def in_mode(network: nn.Module, mode: str) -> Iterator[None]:
    """Inside, the norms are in "eval" or "train" mode, or normalize by the statistics of the "batch" alone."""
    with contextlib.ExitStack() as stack:
        if mode != "eval":
            stack.enter_context(norms_in_train_mode(network))
        if mode == "batch":
            stack.enter_context(plain_batch_statistics(network))
        yield


@torch.no_grad()
def measure(trainer: NormTrainer) -> dict[str, Any]:
    """Dice with the labels in each mode, and the disparities, all over the same batches.

    Returns:
        ``dice``: per mode a list with one value per foreground class; ``disparity`` and ``batch_disparity`` (None where train
        mode is the batch's statistics): lists; ``clipped``: share of channels, None without BatchRenorm; ``tiles``,
        ``batch_size``: what they were measured on.
    """
    network, cut = trainer.bare_network, tiles(trainer)
    modes = ["eval", "train", "batch"] if differs_from_batch_norm(network) else ["eval", "train"]
    sums: dict[str, Tensor] = {}
    counts = DisparityCounts()
    for images, labels in batches(cut, trainer.batch_size):
        for mode in modes:
            with in_mode(network, mode):
                predicted = class_masks(network(images))
            classes = torch.arange(1, predicted.size(1) + 1).view(1, -1, *[1] * (labels.dim() - 2))
            of_batch = dice_counts(predicted, labels == classes)
            sums[mode] = sums[mode] + of_batch if mode in sums else of_batch
        counts += measure_disparity(network, images, regions=False)
    found = Disparity.of(counts)
    return {
        "dice": {mode: numbers((twice / both).tolist()) for mode, (twice, both) in sums.items()},
        "disparity": numbers(found.per_class),
        "batch_disparity": numbers(found.batch_statistics) or None,
        "clipped": numbers([found.clipped])[0],
        "tiles": len(cut) // trainer.batch_size * trainer.batch_size,
        "batch_size": trainer.batch_size,
    }


def numbers(values: list[float]) -> list[float | None]:
    """None for NaN, which JSON lacks."""
    return [None if value != value else value for value in values]


def reported(fold: Path) -> dict[str, Any]:
    """What the training itself wrote: Dice of whole images, and its own measurements."""
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    report = json.loads((fold / "validation" / "norm_report.json").read_text())
    per_class = {int(label): found["Dice"] for label, found in summary["mean"].items()}
    return {
        "dice": numbers([per_class[label] for label in sorted(per_class)]),
        "disparity": report["train_eval_disparity"]["mean"],
        "batch_size": report["train_eval_disparity"]["batch_size"],
        "tile_mismatch": report["tile_mismatch"]["verdict"],
        "batch_renorm": report.get("batch_renorm"),
        "frozen_batch_norm": report.get("frozen_batch_norm"),
    }
