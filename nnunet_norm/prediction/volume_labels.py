"""What a part of a volume becomes: its labels, from the region of the volume that the network must see for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.prediction.case_labels import CaseLabels
from nnunet_norm.prediction.halo import by
from nnunet_norm.prediction.predictor import HaloPredictor
from nnunet_norm.prediction.volume_parts import CoreOf, SubImage, surroundings
from nnunet_norm.prediction.work_folder import Work, WorkFolder
from nnunet_norm.stages.regions import Region, extent_of, whole
from nnunet_norm.volumes import NormalizedVolume

logger = logging.getLogger(__name__)


def labels_of_part(
    predictor: HaloPredictor,
    normalized: NormalizedVolume,
    box: Region,
    work: WorkFolder,
    *,
    probabilities: bool,
    num_parts: int,
) -> CaseLabels:
    """Predict what a part of the file holds.

    Args:
        predictor: with a model.
        normalized: the volume.
        box: the part, on the axes of the file.
        work: where labels and scratch lie; what another process left there is continued.
        probabilities: whether they are wanted, too.
        num_parts: into how many parts the volume is divided.

    Raises:
        PlansError: the plans resample with a function of their own.
        InputImageError, TilingError, OutputError: see ``HaloPredictor.predict_to``.
    """
    axes = predictor.plans_manager.transpose_forward
    core = normalized.from_file(box)
    identity = {
        "image": normalized.image.identity(),
        "box": box,
        "intensities": normalized.intensities.as_dict(),
        "parts": num_parts,
    }
    work.require(predictor.identity() | identity)
    origin = [box[axis][0] for axis in axes]
    inside = normalized.to_file(core) if core is not None else tuple((start, start) for start, _ in box)
    cropped = extent_of(core) if core is not None else (0,) * len(axes)
    properties = {
        "spacing": normalized.image.spacing,
        "shape_before_cropping": [box[axis][1] - box[axis][0] for axis in axes],
        "bbox_used_for_cropping": [
            [inside[axis][0] - o, inside[axis][1] - o] for axis, o in zip(axes, origin, strict=True)
        ],
        "shape_after_cropping_and_before_resampling": cropped,
    }
    made = CaseLabels(
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.label_manager,
        properties,
        cropped,
        probabilities=probabilities,
        allocate=work.allocate,
    )
    if not made.streams:
        raise PlansError("the plans resample with a function of their own, which volumes on disk cannot be given to")
    if core is not None:
        _predict(predictor, normalized, core, made, Work(work.path, identity), divides=num_parts > 1)
    made.finish()
    return made


def _predict(
    predictor: HaloPredictor,
    normalized: NormalizedVolume,
    core: Region,
    made: CaseLabels,
    work: Work,
    *,
    divides: bool,
) -> None:
    """Give the logits of a region of the network's axes to its labels."""
    extents = tuple(normalized.shape[1:])
    region = core
    if divides:
        region = surroundings(core, extents, predictor.field, predictor.mirror_axes)
        more = math.prod(extent_of(region)) / math.prod(extent_of(core))
        logger.info(
            "%s voxels of %s; with what the network sees around them %s, %.3g times as many",
            *(by(extent_of(core)), by(extents), by(extent_of(region)), more),
        )
    image = normalized if region == whole(extents) else SubImage(normalized, region)
    predictor.predict_to(CoreOf(made.sink, core, region), image, work)


def class_names(dataset_json: dict[str, Any]) -> dict[int, str]:
    """Name of every label that a segmentation can have; for regions those that the model was told to write."""
    labels: dict[str, Any] = dataset_json["labels"]
    if "regions_class_order" in dataset_json:
        regions = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0])]
        order: Sequence[int] = dataset_json["regions_class_order"]
        return {0: "background", **{int(value): name for value, name in zip(order, regions, strict=True)}}
    return {int(value): name for name, value in labels.items() if name != "ignore"}
