"""A U-Net of 3 or 4 stages, so shallow that the exact halo of the whole network fits a tile.

The theoretical reach of a U-Net with two 3-wide convolutions per stage and stride 2 is, before and after a voxel, 20/17
with 3 stages and 44/37 with 4 (5: 92/77, 6: 188/157). With fixed statistics (``nnUNetTrainerBRN``), tiles on the grid of
the total stride and that halo, the tiled prediction is the prediction of the whole image. The price is context: the
network sees some 40 or 80 voxels, where nnU-Net's own plans see hundreds.

References:
    Buglakova et al. 2025, section 3.1 (tiling with a halo); Majurski and Bajcsy 2021, doi 10.6028/jres.126.009 (exactness).
"""

import logging
from collections.abc import Sequence
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import derive_plans, resolve_configuration

# Under the library's name, whatever this module is called when it is imported from the folder itself.
LOGGER = logging.getLogger("nnunet_norm.plans.shallow")

STAGES = (3, 4)
PLAIN = "PlainConvUNet"


def derive(
    plans: dict[str, Any], configuration: str | Sequence[str], *, num_stages: int = 4, **options: Any
) -> dict[str, Any]:
    """The same plans with the finest ``num_stages`` stages only, for every stage of a cascade.

    Args:
        plans: as nnU-Net's planner wrote them.
        configuration: whose network becomes shallow; one name or several.
        num_stages: 3 or 4.
        options: any of :func:`nnunet_norm.planning.derive_plans`, on top. With ``replan_topology`` the finest stages are
            those of the new topology.

    Raises:
        PlansError: another number of stages, or whatever :func:`~nnunet_norm.planning.derive_plans` refuses.
    """
    if num_stages not in STAGES:
        raise PlansError(
            f"recipe shallow: num_stages is {num_stages}; choose 3 or 4 (deeper ones: leave out the recipe)"
        )
    derived = derive_plans(plans, configuration, num_stages=num_stages, **options)
    for name in [configuration] if isinstance(configuration, str) else configuration:
        network = resolve_configuration(derived, name)["architecture"]["network_class_name"].rsplit(".", 1)[-1]
        if network != PLAIN:
            LOGGER.warning(
                "%s: %s has more convolutions per stage than %s, so its reach is larger than 44/37; see which halo the "
                "predictor reports before relying on exactness",
                name,
                network,
                PLAIN,
            )
    return derived
