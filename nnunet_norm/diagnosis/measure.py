"""What is measured on one case, and the disparity of all: numbers that JSON can keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_norm.diagnosis.cases import OUTSIDE, LoadedCase
from nnunet_norm.diagnosis.model import DiagnosedModel
from nnunet_norm.diagnosis.train_mode import as_at_the_end_of_training
from nnunet_norm.errors import InputImageError, TilingError
from nnunet_norm.metrics import PairDifference, class_masks, compare_pair, dice
from nnunet_norm.prediction import StagesPlan, TilesPlan, measure_block_pairs, measure_tile_pairs
from nnunet_norm.training.disparity import Disparity, DisparityCounts, measure_disparity
from nnunet_norm.training.patches import foreground_of, foreground_patches, whole_batches
from nnunet_norm.training.reporting import none_for_nan

PATCHES_PER_CASE = 8
"""Patches of a case that are kept for disparity, at most: a 2d batch may be larger than there are cases."""

MEASURED_BATCHES = 5
"""Batches on which disparity is measured, at most."""

Says = Callable[[str], object]
"""Called before each step with what comes next."""


def measure_case(
    model: DiagnosedModel,
    case: LoadedCase,
    sizes: Sequence[tuple[int, ...]],
    effective: Sequence[Sequence[int]] | None,
    say: Says,
) -> tuple[dict[str, Any], list[Tensor], dict[str, Any] | None]:
    """Predict a case by nnU-Net with tiles of several sizes and as a whole, and its voxels from different tiles.

    Args:
        model: whose predictors predict.
        case: loaded.
        sizes: tiles to compare; the patch of the plans is one of them.
        effective: the effective receptive field, (before, after) per axis, for halos; None if there is none.
        say: called before each step.

    Returns:
        The numbers; patches for the disparity; and one slice of the image with both predictions, where both are there.
    """
    say(f"{case.name}: the whole image")
    whole, found = _whole_image(model, case.image)
    reference = None if case.reference is None else reference_masks(model, case.reference)
    valid = None if case.reference is None else case.reference != OUTSIDE
    found["dice_whole"] = _dice(whole, reference, valid)
    picture, foreground = None, None if whole is None else whole[0].any(0)
    found["tile_sizes"] = []
    for size in sizes:
        say(f"{case.name}: nnU-Net with tiles of {' x '.join(map(str, size))}")
        started = time.perf_counter()
        logits = model.predict_as_nnunet(case.image, size)
        seconds = time.perf_counter() - started
        masks = class_masks(logits[None], regions=model.regions)
        changed = None if whole is None else (masks != whole).any(1)[0]
        found["tile_sizes"].append(
            {
                "size": size,
                "seconds": seconds,
                "dice": _dice(masks, reference, valid),
                "agreement": _dice(masks, whole, None),
                "labels_changed": None if changed is None else changed.float().mean().item(),
            }
        )
        if size == model.patch_size:
            foreground = foreground_of(logits, regions=model.regions) if foreground is None else foreground
            if changed is not None and whole is not None:
                picture = _picture(case, masks[0], whole[0], changed, reference)
    say(f"{case.name}: voxels from two tiles")
    found["tiles"] = _tile_pairs(model, case.image, effective)
    say(f"{case.name}: voxels from two grids of blocks")
    found["blocks"] = _block_pairs(model, case.image)
    assert foreground is not None
    count = min(model.batch_size, PATCHES_PER_CASE)
    patches = foreground_patches(case.image, foreground, count, model.patch_size)
    described = {"case": case.name, "shape": tuple(case.image.shape[1:]), "whole_shape": case.whole_shape}
    return described | {"labels": case.reference is not None} | found, patches, picture


def measure_batches(model: DiagnosedModel, patches: Sequence[Sequence[Tensor]]) -> Disparity:
    """Train/eval disparity on batches of the size of the plans, as far as the patches fill them."""
    counts = DisparityCounts()
    device = model.nnunet.device
    network = as_at_the_end_of_training(model.network, model.nnunet).eval()
    autocast = torch.autocast("cuda") if device.type == "cuda" else None
    for batch in whole_batches(patches, model.batch_size, MEASURED_BATCHES):
        counts += measure_disparity(
            network, batch.to(device), regions=model.regions, autocast=autocast, across_processes=False
        )
    return Disparity.of(counts)


def reference_masks(model: DiagnosedModel, reference: Tensor) -> Tensor:
    """Masks (1, K, x, y, z) of labels (x, y, z), in the order of the network's classes or regions."""
    manager = model.nnunet.label_manager
    wanted = manager.foreground_regions if model.regions else manager.foreground_labels
    groups = [value if isinstance(value, list | tuple) else (value,) for value in wanted]
    return torch.stack([torch.isin(reference, torch.tensor([int(label) for label in g])) for g in groups])[None]


def labels_of(masks: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Masks (K, ...) as one picture: 0, or the number of the last class or region that is there."""
    numbers = np.arange(1, len(masks) + 1, dtype=np.int16).reshape(-1, *[1] * (masks.ndim - 1))
    found: NDArray[np.int16] = (masks * numbers).max(0)
    return found


def _whole_image(model: DiagnosedModel, image: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    """Masks (1, K, x, y, z) of the whole image predicted in one piece, and how; None if it cannot be."""
    plan = model.whole_image_plan(image)
    if isinstance(plan, str):
        return None, {"whole": None, "plan": None, "why_not_whole": plan, "seconds_whole": None}
    started = time.perf_counter()
    try:
        logits = model.halo.predict_with(plan, image).cpu()
    except TilingError as error:
        return None, {"whole": None, "plan": None, "why_not_whole": str(error), "seconds_whole": None}
    seconds = time.perf_counter() - started
    masks = class_masks(logits[None], regions=model.regions)
    described = {"whole": plan.describe(), "plan": plan.as_dict()["plan"]}
    return masks, described | {"why_not_whole": None, "seconds_whole": seconds}


def _tile_pairs(model: DiagnosedModel, image: Tensor, effective: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """Differences of voxels predicted from two tiles."""
    if model.why_no_tiles is not None:
        return {"pairs": [], "why_none": model.why_no_tiles}
    size = model.tile_to_compare(image)
    if size is None:
        return {"pairs": [], "why_none": "the image fits the smallest tile"}
    plan: TilesPlan = model.tiles_plan(image, size, effective)
    pairs = _compared(model, measure_tile_pairs(model.halo, image, plan=plan))
    decision = plan.decision
    return {
        "pairs": pairs,
        "why_none": None if pairs else "tiles without their halo have nothing in common",
        "size": decision.tile_size,
        "halo": decision.halo,
        "exact": decision.exact,
        "is_patch": size == model.patch_size,
    }


def _block_pairs(model: DiagnosedModel, image: Tensor) -> dict[str, Any]:
    """Differences of voxels predicted stage by stage with two grids of blocks."""
    plan = model.whole_image_plan(image)
    if isinstance(plan, str):
        return {"pairs": [], "why_none": plan}
    if not isinstance(plan, StagesPlan):
        return {"pairs": [], "why_none": "the network cannot be run stage by stage"}
    pairs = _compared(model, measure_block_pairs(model.halo, image, plan))
    return {"pairs": pairs, "why_none": None if pairs else "the image is one block"}


def _compared(model: DiagnosedModel, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    return [pair_as_dict(compare_pair(a, b, regions=model.regions, dtype=model.halo.network_dtype)) for a, b in pairs]


def pair_as_dict(pair: PairDifference) -> dict[str, Any]:
    """A difference for JSON, which has no NaN."""
    return asdict(pair) | {"dice": [none_for_nan(value) for value in pair.dice]}


def pair_of(kept: dict[str, Any]) -> PairDifference:
    """The difference that ``pair_as_dict`` wrote."""
    values = tuple(float("nan") if value is None else float(value) for value in kept["dice"])
    return PairDifference(values, kept["max_dist"], kept["max_logit"], kept["dtype"])


def _dice(masks: Tensor | None, reference: Tensor | None, valid: Tensor | None) -> list[float | None] | None:
    """Dice per class, None for one that is in neither; None if there is nothing to compare."""
    if masks is None or reference is None:
        return None
    if masks.shape != reference.shape:
        raise InputImageError(f"labels of shape {tuple(reference.shape[2:])} do not fit {tuple(masks.shape[2:])}")
    kept = masks if valid is None else masks & valid
    return [none_for_nan(value) for value in dice(kept, reference if valid is None else reference & valid).tolist()]


def _picture(
    case: LoadedCase, tiles: Tensor, whole: Tensor, changed: Tensor, reference: Tensor | None
) -> dict[str, Any]:
    """The slice across the first axis in which most labels change, or where most is predicted if none does."""
    counts = changed.sum((1, 2)) if changed.any() else whole.any(0).sum((1, 2))
    number = int(counts.argmax())
    return {
        "slice": number,
        "slices": len(counts),
        "image": case.image[0, number].numpy(),
        "tiles": labels_of(tiles[:, number].numpy()),
        "whole": labels_of(whole[:, number].numpy()),
        "changed": changed[number].numpy(),
        "reference": None if reference is None else labels_of(reference[0, :, number].numpy()),
    }
