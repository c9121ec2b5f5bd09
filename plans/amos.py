"""Large patches and large batches: the settings of the study on AMOS 2022, over the plans of any dataset.

The study trained nnU-Net's 3d_fullres with patches of 64x160x160 (``p160``), 64x288x288 (``p288``), 64x352x352 (``p352``) and
64x384x384 (``p384``) at a batch of 2, and with batches of 2, 4, 16 and 64 (``b2``, ``b4``, ``b16``, ``b64``) at a patch of
64x160x160, each with Dice and cross-entropy, and with focal, top-k or perimeter loss in place of the cross-entropy. (Its
patches of 354 are 352 here: 32 does not divide 354.) Its gains came from a batch of 16, and from patches of 64x288x288.

Other plans are scaled by the same factors: the batch of the plans times 1, 2, 8 or 32; the patch of the plans times 1, 1.8,
2.2 or 2.4 within the slice, enlarged to what the strides divide. The axis of coarsest spacing stays as it is, or the shortest
one where none is coarsest; in 2d both axes are within the slice.

The loss belongs to the trainer's name (``nnUNetTrainerBRN_DiceFocal``), so it is no setting here.
``nnunet-norm sweep run amos`` trains them all, with InstanceNorm as the study did and with BatchRenorm.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import derive_plans, resolve_configuration

STUDY_BATCH, STUDY_SIDE = 2, 160
"""What all factors refer to."""

SIDES = {"p160": 160, "p288": 288, "p352": 352, "p384": 384}
BATCHES = {"b2": 2, "b4": 4, "b16": 16, "b64": 64}

SETTINGS = (*SIDES, *BATCHES)
"""What ``--setting`` may name."""

LOSSES = ("DiceFocal", "DiceTopK", "DicePerim")
"""Endings of the trainers of the study, besides none."""

GRID = {
    "recipe": "amos",
    "axes": {
        "norm": ["InstanceNorm", "BRN"],
        "loss": ["DiceCE", *LOSSES],
        "setting": [setting for setting in SETTINGS if setting != "b2"],  # b2 is p160
    },
}
"""The study as a sweep: every setting with every loss, compared with the first one."""


def derive(
    plans: dict[str, Any], configuration: str | Sequence[str], *, setting: str, **options: Any
) -> dict[str, Any]:
    """The same plans with the batch and the patch of one setting.

    Args:
        plans: as nnU-Net's planner wrote them.
        configuration: the one to scale.
        setting: one of :data:`SETTINGS`.
        options: any of :func:`nnunet_norm.planning.derive_plans`, on top.

    Raises:
        PlansError: another setting, several configurations at once, or whatever
            :func:`~nnunet_norm.planning.derive_plans` refuses.
    """
    if setting not in SETTINGS:
        raise PlansError(f"recipe amos: setting is {setting}; choose from {', '.join(SETTINGS)}")
    named = [configuration] if isinstance(configuration, str) else list(dict.fromkeys(configuration))
    if len(named) != 1:
        raise PlansError(f"recipe amos: configuration is {', '.join(named)}; every one is scaled by itself: give one")
    resolved = resolve_configuration(plans, named[0])
    scaled = {
        "batch_size": resolved["batch_size"] * BATCHES.get(setting, STUDY_BATCH) // STUDY_BATCH,
        "patch_size": scaled_patch(resolved, Fraction(SIDES.get(setting, STUDY_SIDE), STUDY_SIDE)),
    }
    return derive_plans(plans, named[0], **(scaled | options))


def scaled_patch(resolved: dict[str, Any], factor: Fraction) -> list[int]:
    """The patch with every axis within the slice times ``factor``, to the nearest voxel."""
    patch = resolved["patch_size"]
    kept = _through_the_slices(patch, resolved["spacing"])
    return [size if axis == kept else round(size * factor) for axis, size in enumerate(patch)]


def _through_the_slices(patch: Sequence[int], spacing: Sequence[float]) -> int | None:
    """The axis of coarsest spacing; the shortest one (the first of several) where no axis is coarser than all others."""
    if len(patch) == 2:
        return None
    coarsest = max(spacing)
    if list(spacing).count(coarsest) == 1:
        return list(spacing).index(coarsest)
    return list(patch).index(min(patch))
