"""The numbers of all cases together, as they stand in ``diagnosis.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from nnunet_norm.diagnosis.cases import Chosen
from nnunet_norm.diagnosis.findings import Findings, verdict_of
from nnunet_norm.diagnosis.measure import pair_of
from nnunet_norm.diagnosis.model import DiagnosedModel
from nnunet_norm.layers.input_normalization import ATTRIBUTE, InputNormalization
from nnunet_norm.metrics import summarize
from nnunet_norm.training.disparity import nanmean
from nnunet_norm.training.reporting import mismatch_as_dict, named, none_for_nan

NO_NORM = "no norm"


def summarized(
    model: DiagnosedModel,
    chosen: Chosen,
    cases: Sequence[dict[str, Any]],
    disparity: dict[str, Any],
    field: dict[str, Any],
    max_voxels: int,
) -> dict[str, Any]:
    """The diagnosis for a JSON file.

    Args:
        model: what was diagnosed.
        chosen: on which cases.
        cases: from ``measure_case``.
        disparity: of all cases.
        field: from ``Fields.as_dict``.
        max_voxels: of a case.
    """
    names = model.class_names
    of_tiles = summarize([pair_of(pair) for case in cases for pair in case["tiles"]["pairs"]])
    of_blocks = summarize([pair_of(pair) for case in cases for pair in case["blocks"]["pairs"]])
    rows = tile_size_rows(cases, names)
    patch = next(row for row in rows if row["tile_size"] == list(model.patch_size))
    known = field["theoretical"] is not None
    layers = field["tile_statistics"]["layers"]
    norms = [name for name in field["tile_statistics"]["norms"] if name != InputNormalization.__name__]
    larger = any(_larger(case["shape"], model.patch_size) for case in cases)
    mean_disparity = _mean(disparity["per_class"])
    findings = Findings(
        tile_norms=len(layers) if known else None,
        norm=" and ".join(norms or model.norms) or NO_NORM,
        of_tiles=of_tiles,
        of_blocks=of_blocks,
        halo_is_exact=all(case["tiles"].get("exact", True) for case in cases),
        in_stages=all(case["plan"] == "stages" for case in cases),
        labels_changed=patch["labels_changed"],
        larger_than_patch=larger,
        disparity=math.nan if mean_disparity is None else mean_disparity,
        dice_nnunet=None if patch["dice"] is None else _mean(patch["dice"].values()),
        dice_whole=None if rows[-1]["tile_size"] or rows[-1]["dice"] is None else _mean(rows[-1]["dice"].values()),
        normalizes_tiles=ATTRIBUTE in layers,
    )
    verdict = verdict_of(findings)
    tiles = next((case["tiles"] for case in cases if case["tiles"]["pairs"]), cases[0]["tiles"])
    return {
        "verdict": {"kind": verdict.kind, "sentence": verdict.sentence},
        "model": model.describe(),
        "source": chosen.source,
        "labels": all(case["labels"] for case in cases),
        "max_voxels": max_voxels,
        "larger_than_patch": larger,
        "train_eval_disparity": {
            "per_class": named(names, disparity["per_class"]),
            "mean": mean_disparity,
            "mean_of_batch_statistics": _mean(disparity["batch_statistics"]),
            "num_batches": disparity["num_batches"],
            "batch_size": disparity["batch_size"],
        },
        "tile_mismatch": mismatch_as_dict(names, of_tiles)
        | {key: tiles.get(key) for key in ("size", "halo", "exact", "is_patch", "why_none")},
        "stages_mismatch": mismatch_as_dict(names, of_blocks) | {"why_none": cases[0]["blocks"]["why_none"]},
        "dice_against_tile_size": rows,
        "labels_changed": patch["labels_changed"],
        "seconds": {
            "nnunet": patch["seconds"],
            "whole": rows[-1]["seconds"] if rows[-1]["tile_size"] is None else None,
        },
        "receptive_field": field,
        "cases": [
            {key: case[key] for key in ("case", "shape", "whole_shape", "labels", "whole", "plan", "why_not_whole")}
            | {"seconds_whole": case["seconds_whole"], "seconds_nnunet": _of_patch(case, model, "seconds")}
            | {"labels_changed": _of_patch(case, model, "labels_changed")}
            for case in cases
        ],
    }


def tile_size_rows(cases: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the cases per tile size, and last for the whole image if every case was predicted so.

    A size that only the larger cases were predicted with is left out: the others would be missing from its mean.

    Args:
        cases: from ``measure_case``.
        names: of the classes.
    """
    sizes = [[list(row["size"]) for row in case["tile_sizes"]] for case in cases]
    rows = []
    for size in [size for size in sizes[0] if all(size in other for other in sizes)]:
        found = [case["tile_sizes"][of.index(size)] for case, of in zip(cases, sizes, strict=True)]
        rows.append(
            {
                "tile_size": size,
                "dice": _means(names, [row["dice"] for row in found]),
                "agreement": _means(names, [row["agreement"] for row in found]),
                "labels_changed": _mean([row["labels_changed"] for row in found]),
                "seconds": _mean([row["seconds"] for row in found]),
            }
        )
    if all(case["whole"] is not None for case in cases):
        rows.append(
            {
                "tile_size": None,
                "dice": _means(names, [case["dice_whole"] for case in cases]),
                "agreement": None,
                "labels_changed": 0.0,
                "seconds": _mean([case["seconds_whole"] for case in cases]),
            }
        )
    return rows


def _of_patch(case: dict[str, Any], model: DiagnosedModel, key: str) -> Any:
    return next(row[key] for row in case["tile_sizes"] if tuple(row["size"]) == model.patch_size)


def _larger(shape: Sequence[int], patch: Sequence[int]) -> bool:
    return any(n > p for n, p in zip(list(shape)[-len(patch) :], patch, strict=True))


def _means(names: Sequence[str], found: Sequence[Sequence[float | None] | None]) -> dict[str, float | None] | None:
    """Per class the mean over the cases that have it; None if a case has no such score."""
    if any(values is None for values in found):
        return None
    return named(names, [_mean(of_class) for of_class in zip(*(values or [] for values in found), strict=True)])


def _mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are there; None if there are none."""
    return none_for_nan(nanmean([math.nan if value is None else value for value in values]))
