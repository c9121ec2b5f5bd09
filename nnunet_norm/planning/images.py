"""How large the images of a dataset are where a configuration's patches are cut from."""

import json
from pathlib import Path
from typing import Any

from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunet_norm.architectures import TOKEN
from nnunet_norm.errors import PlansError
from nnunet_norm.planning.configurations import Plans, require_architecture, resolve_configuration
from nnunet_norm.planning.topology import as_text, divisible_patch, smallest_patch, total_stride
from nnunet_norm.settings import NormSettings

UNCHANGED = "no_resampling_hack"
"""nnU-Net's name for a resampling that leaves images as they are."""


def largest_image(plans: Plans, configuration: str, fingerprint: dict[str, Any]) -> tuple[int, ...]:
    """Per axis of the patch, the voxels of the image that has most there, after cropping, transposing and resampling.

    Args:
        plans: of the dataset.
        configuration: its name.
        fingerprint: ``dataset_fingerprint.json`` as nnU-Net extracted it.
    """
    resolved = resolve_configuration(plans, configuration)
    order = plans["transpose_forward"]
    target = list(resolved["spacing"])
    shapes = []
    for shape, spacing in zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True):
        shape, spacing = [shape[axis] for axis in order], [spacing[axis] for axis in order]
        # The images of 2d configurations are resampled within their slices only.
        wanted = [*spacing[: len(spacing) - len(target)], *target]
        if resolved.get("resampling_fn_data") != UNCHANGED:
            shape = compute_new_shape(shape, spacing, wanted)
        shapes.append(shape[-len(target) :])
    return tuple(int(max(sizes)) for sizes in zip(*shapes, strict=True))


def check_patch(plans: Plans, configuration: str, fingerprint: dict[str, Any]) -> None:
    """Refuse a patch that is larger than every image on some axis, beyond what divisibility asks for.

    Raises:
        PlansError: it is; the line names the largest patch that makes sense.
    """
    resolved = resolve_configuration(plans, configuration)
    patch = resolved["patch_size"]
    largest = largest_image(plans, configuration, fingerprint)
    if NormSettings.from_configuration(resolved).unetr is not None:
        stride = smallest = (TOKEN,) * len(patch)
    else:
        stride = total_stride(require_architecture(resolved, configuration), len(patch), configuration)
        smallest = smallest_patch(stride)
    sensible = tuple(map(max, divisible_patch(largest, stride), smallest))
    axes = [axis for axis, (size, most) in enumerate(zip(patch, sensible, strict=True)) if size > most]
    if axes:
        raise PlansError(
            f"configuration {configuration}: patch size {as_text(patch)} is larger than every image on "
            f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))} (the largest extents are "
            f"{as_text(largest)}): give at most {as_text(tuple(map(min, patch, sensible)))}"
        )


def fingerprint_in(folder: Path) -> dict[str, Any] | None:
    """nnU-Net's fingerprint of a dataset, in its preprocessed folder; None if there is none."""
    path = folder / "dataset_fingerprint.json"
    if not path.is_file():
        return None
    fingerprint: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fingerprint


def check_changed_patches(plans: Plans, derived: Plans, fingerprint: dict[str, Any]) -> None:
    """Refuse patches that differ from those of the plans before, in any configuration, and that no image fills.

    Args:
        plans: before.
        derived: after.
        fingerprint: see :func:`largest_image`.

    Raises:
        PlansError: see :func:`check_patch`.
    """
    for name in derived["configurations"]:
        before, after = (resolve_configuration(each, name)["patch_size"] for each in (plans, derived))
        if list(before) != list(after):
            check_patch(derived, name, fingerprint)
