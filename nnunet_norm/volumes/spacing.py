"""Whether nnU-Net would resample a volume: one that is too large for memory is predicted as it is, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.volumes.ome import MILLIMETRES
from nnunet_norm.volumes.zarr_image import ZarrImage

logger = logging.getLogger(__name__)


def refuse_resampling(image: ZarrImage, plans_manager: Any, configuration_manager: Any) -> None:
    """Refuse plans that would change the volume's shape: those of a 3d configuration on any axis, of a 2d one in the plane.

    Plans do not tell their unit, so a volume fits with its spacing as it is written, or in millimetres. One without
    spacing is taken to have that of the plans, and so is any for a model that was trained on images without spacing
    (``NaturalImage2DIO``); the log says so.

    Args:
        image: the volume; its other levels are looked at for the remedy.
        plans_manager: nnU-Net's, of the plans.
        configuration_manager: nnU-Net's, of the configuration.

    Raises:
        PlansError: they would.
    """
    axes, target = plans_manager.transpose_forward, list(configuration_manager.spacing)
    if image.spacing is None:
        logger.info("volume %r tells no spacing: it is taken to have that of the plans, %s", image.name, target)
        return
    if plans_manager.plans.get("image_reader_writer") == "NaturalImage2DIO":
        logger.info("volume %r: the model was trained on images without spacing, its own is not used", image.name)
        return
    if (unit := _fits(image.shape[1:], image.spacing, image.units, axes, target)) is not None:
        if unit:
            logger.info("volume %r: its spacing in millimetres is that of the plans, %s", image.name, target)
        return
    fitting = next(
        (
            level
            for level in image.levels
            if level.spacing is not None
            and _fits(image.shape_of(level), level.spacing, image.units, axes, target) is not None
        ),
        None,
    )
    remedy = f"choose level {fitting.path!r}, which has it" if fitting else "resample the volume to it"
    here = [image.spacing[axis] for axis in axes[-len(target) :]]
    unit_names = " x ".join(dict.fromkeys(image.units[axis] or "no unit" for axis in axes[-len(target) :]))
    raise PlansError(
        f"volume {image.name!r} has a spacing of {_told(here)} ({unit_names}; the plans' order of axes), the plans have "
        f"{_told(target)}, and a volume on disk is not resampled: {remedy}, or train with plans of the volume's spacing"
    )


def _fits(
    shape: Sequence[int],
    spacing: Sequence[float],
    units: Sequence[str | None],
    axes: Sequence[int],
    target: Sequence[float],
) -> str | None:
    """How the spacing must be read to need no resampling: "" as it is, "mm" in millimetres, or None if it never does."""
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape  # takes seconds to import

    shape, units = [shape[axis] for axis in axes], [units[axis] for axis in axes]
    lengths = [MILLIMETRES.get((unit or "").lower()) for unit in units]
    as_written = [spacing[axis] for axis in axes]
    in_millimetres = [value * (length or 1.0) for value, length in zip(as_written, lengths, strict=True)]
    for how, current in (("", as_written), ("mm", in_millimetres)):
        # A 2d configuration leaves the distance of planes as it is.
        wanted = [*current[: len(current) - len(target)], *target]
        if list(compute_new_shape(shape, current, wanted)) == list(shape):
            return how
    return None


def _told(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
