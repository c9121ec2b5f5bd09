"""What ``normalization.py`` measures on a trained model: modes of the norms, seams, tile sizes, batch sizes."""

import contextlib
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from normalization_models import Patch, Trained, batches, numbers, of_counts
from normalization_settings import NORMALIZATION_BATCHES
from torch import Tensor, nn
from trainings import Training

from nnunet_norm.diagnosis.model import Plan
from nnunet_norm.layers import differs_from_batch_norm, plain_batch_statistics
from nnunet_norm.metrics import class_masks, compare_pair, dice_counts, summarize
from nnunet_norm.prediction import TilesPlan, measure_tile_pairs
from nnunet_norm.statistics import norms_in_train_mode
from nnunet_norm.training.reporting import mismatch_as_dict
from nnunet_norm.training.validation import REPORT

MOST_PATCHES, MOST_GHOST_PATCHES = 96, 384
"""On which sizes of batches are compared: the dearest measurement, with as many passes as sizes."""


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
def modes(
    network: nn.Module, patches: Sequence[Patch], sizes: Sequence[int], *, regions: bool = False
) -> list[dict[str, Any]]:
    """Dice with the labels and disparity in each mode of the norms, with batches of several sizes of the same patches.

    Returns:
        Per size ``dice``: per mode a list with one value per class; ``disparity``: per mode that is not eval, 1 - Dice
        between it and eval mode. "batch" is there only where the train mode is not that of BatchNorm. A size of which there
        are not enough patches is left out.
    """
    sizes = [size for size in sizes if size <= len(patches)]
    if not sizes:
        return []
    other = ["train", "batch"] if differs_from_batch_norm(network) else ["train"]
    counts: dict[Any, Tensor] = defaultdict(lambda: torch.zeros(()))
    used = 0
    for images, masks, valid in batches(patches, math.lcm(*sizes) if math.lcm(*sizes) <= len(patches) else max(sizes)):
        used += len(images)
        evaluated = _masks(network, images, min(sizes), regions, "eval")
        counts["eval"] = counts["eval"] + dice_counts(evaluated & valid, masks)
        for size, mode in itertools.product(sizes, other):
            found = _masks(network, images, size, regions, mode)
            counts[size, mode] = counts[size, mode] + dice_counts(found & valid, masks)
            counts[size, mode, "eval"] = counts[size, mode, "eval"] + dice_counts(found, evaluated)
    return [
        {
            "batch_size": size,
            "tiles": used,
            "dice": {"eval": of_counts(counts["eval"])} | {mode: of_counts(counts[size, mode]) for mode in other},
            "disparity": {mode: one_minus(of_counts(counts[size, mode, "eval"])) for mode in other},
        }
        for size in sizes
    ]


def _masks(network: nn.Module, images: Tensor, size: int, regions: bool, mode: str) -> Tensor:
    """Predicted in batches of ``size``, each with the running statistics of the trained network."""
    found = []
    for part in images.split(size):
        with in_mode(network, mode):  # inside, running statistics move
            found.append(class_masks(network(part), regions=regions))
    return torch.cat(found)


def one_minus(values: Sequence[float | None]) -> list[float | None]:
    """Disparity of Dice."""
    return [None if value is None else 1 - value for value in values]


def tables(trained: Trained, run: Training) -> dict[str, Any]:
    """Everything for the tables; blended tiles only where a prediction depends on the tiles."""
    model = trained.model
    patches = trained.patches(model.patch_size)
    (found,) = modes(trained.network, patches, [model.batch_size], regions=model.regions) or [None]
    plans: list[Plan] = []

    def best(image: Tensor) -> Tensor:
        plan = trained.best_plan(image)
        plans.append(plan)
        return model.halo.predict_with(plan, image).cpu()

    start = time.perf_counter()
    whole = {"dice": trained.dice(best), "seconds": time.perf_counter() - start}
    whole |= {"plan": plans[0].describe(), "in_tiles": any(map(_depends_on_tiles, plans))}
    depends = trained.one_size or model.halo.field.tile_statistics
    blended = trained.dice(model.predict_as_nnunet) if depends else None
    about = {"reported": reported(run), "classes": model.class_names, "images": len(trained.images)}
    return {"modes": found, "mismatch": mismatch(trained), "whole": whole, "blending": blended} | about


def _depends_on_tiles(plan: Plan) -> bool:
    """Whether the prediction is not that of one pass over the whole image."""
    return isinstance(plan, TilesPlan) and not plan.decision.exact


def mismatch(trained: Trained) -> dict[str, Any]:
    """Voxels from different tiles with a halo for the convolutions, or that of the predictor for one without bounds."""
    model, pairs, plan = trained.model, [], None
    for case, *_ in trained.images:
        if trained.one_size:
            plan = model.halo.tiles_plan(case.image)
        else:
            plan = trained.tiles_plan(case.image, trained.comparable_tile(case.image), trained.reach)
        for first, second in measure_tile_pairs(model.halo, case.image, plan=plan):
            pairs.append(compare_pair(first, second, regions=model.regions, dtype=model.halo.network_dtype))
    assert plan is not None
    about = {"tile": plan.decision.tile_size, "halo": plan.decision.halo, "exact": plan.decision.exact}
    return mismatch_as_dict(model.class_names, summarize(pairs)) | about


def tiles(trained: Trained) -> dict[str, Any]:
    """Dice against tile size, up to the whole image; the halo is that of the convolutions, at most a quarter of a tile."""
    model = trained.model
    largest = max((case.image for case, *_ in trained.images), key=lambda image: image.numel())
    found = []
    for size in trained.tile_sizes(largest):
        halo = tuple(min(r, t // 4) for r, t in zip(trained.reach, size, strict=True))
        start = time.perf_counter()
        dice = trained.dice(lambda image, size=size, halo=halo: trained.in_tiles_of(image, size, halo))
        found.append({"size": size, "halo": halo, "dice": dice, "seconds": time.perf_counter() - start})
    return {"classes": model.class_names, "image": tuple(largest.shape[1:]), "sizes": found}


def batch_sizes(trained: Trained) -> dict[str, Any]:
    """The modes of a network with batches of several sizes."""
    model = trained.model
    patches = trained.patches(model.patch_size)[:MOST_PATCHES]
    found = modes(trained.network, patches, NORMALIZATION_BATCHES, regions=model.regions)
    return {"classes": model.class_names, "sizes": found}


def ghost(trained: Trained) -> dict[str, Any]:
    """The modes of GhostBN with the batch of its training, which it cuts by itself."""
    model = trained.model
    (found,) = modes(
        trained.network,
        trained.patches(model.patch_size)[:MOST_GHOST_PATCHES],
        [model.batch_size],
        regions=model.regions,
    ) or [None]
    return {"classes": model.class_names, "modes": found}


def reported(run: Training) -> dict[str, Any]:
    """What the training itself wrote: mean Dice of the images by the halo predictor, mirrored, and its own measurements."""
    validation = run.fold / "validation"
    summary, report = (json.loads((validation / name).read_text()) for name in ("summary.json", REPORT))
    clipped = (report.get("batch_renorm") or {}).get("clipped_channels")
    return {
        "dice": numbers([of["Dice"] for of in summary["mean"].values()]),
        "disparity": report["train_eval_disparity"]["mean"],
        "tile_mismatch": report["tile_mismatch"]["verdict"],
        "clipped": clipped,
    }
