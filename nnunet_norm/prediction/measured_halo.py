"""The effective halo of a network, measured on patches of an image; kept per weights, since it costs a dozen tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from nnunetv2.utilities.helpers import empty_cache
from torch import nn

from nnunet_norm.errors import ArchitectureError, TilingError
from nnunet_norm.prediction.execution import Image, planes, read
from nnunet_norm.prediction.halo import planned_shape, tile_shape
from nnunet_norm.prediction.tile_axis import Sides
from nnunet_norm.receptive_field import ReceptiveField, effective
from nnunet_norm.tiling import plan_tiles

PROBES = 2
"""Tiles of an image on which the effective receptive field is measured."""


def fingerprint(network: nn.Module) -> tuple[float, ...]:
    """Tells the weights of one fold from those of another."""
    parameters = list(network.parameters())
    return tuple(parameter.detach().float().sum().item() for parameter in (parameters[0], parameters[-1]))


class MeasuredHalo:
    """Effective reaches, each measured once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._known: dict[tuple[float, ...], Sides | None] = {}

    def of(
        self, network: nn.Module, image: Image, field: ReceptiveField, patch_size: Sequence[int], *, required: bool
    ) -> Sides | None:
        """The reach for the weights that the network has now; None, and a line why, if it cannot be had.

        Args:
            network: without wrappers.
            image: (C, x, y, z); the patches are spread over it.
            field: the network's receptive field.
            patch_size: of the configuration.
            required: it was asked for by name.

        Raises:
            TilingError: it is required, and cannot be had.
        """
        weights = fingerprint(network)
        if weights not in self._known:
            self._known[weights] = self._measure(network, image, field, patch_size, required=required)
        return self._known[weights]

    def _measure(
        self, network: nn.Module, image: Image, field: ReceptiveField, patch_size: Sequence[int], *, required: bool
    ) -> Sides | None:
        shape = tuple(image.shape[-len(field.stride) :])
        patch, _ = tile_shape(None, patch_size, field)
        places = [
            (plane, tile.read)
            for _, plane in planes(image, len(shape))
            for tile in plan_tiles(planned_shape(shape, patch, field), patch, 0, field.stride)
        ]
        chosen = sorted({(2 * i + 1) * len(places) // (2 * PROBES) for i in range(PROBES)})
        with torch.inference_mode(False), torch.enable_grad():
            probes = torch.cat([read(*places[i]) for i in chosen])
            try:
                return effective(network, probes.clone())
            except (ArchitectureError, torch.OutOfMemoryError) as error:
                why = str(error).splitlines()[0]
                if required:
                    raise TilingError(f"no effective halo: {why}; choose --halo in voxels") from error
        empty_cache(next(network.parameters()).device)
        self._say(f"no effective halo ({why}): half of the tile is cut away instead")
        return None
