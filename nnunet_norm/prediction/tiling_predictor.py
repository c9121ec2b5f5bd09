"""How an image is cut into tiles, decided before anything runs: the part of ``HaloPredictor`` that knows tiles and memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnunet_norm.errors import InputImageError, TilingError
from nnunet_norm.prediction.execution import Image, read
from nnunet_norm.prediction.halo import HALO_WORDS, Decision
from nnunet_norm.prediction.halo_error import HaloError, measure_halo_error
from nnunet_norm.prediction.measured_halo import MeasuredHalo, fingerprint
from nnunet_norm.prediction.memory import anonymous_memory, default_max_memory, free_on, size
from nnunet_norm.prediction.population_predictor import PopulationPredictor
from nnunet_norm.prediction.tile_choice import Budget, CountedBudget, DeviceBudget, Extents, affordable, cost_of
from nnunet_norm.prediction.tile_memory import TileMemory, tile_memory
from nnunet_norm.prediction.tile_planning import AUTO, TileTask, planned
from nnunet_norm.prediction.tiles_plan import TilesPlan
from nnunet_norm.prediction.ways import ALLOCATOR_BYTES, ALLOCATOR_SHARE, itemsize_of
from nnunet_norm.receptive_field import ReceptiveField, trace_at
from nnunet_norm.tiling import padded_shape

logger = logging.getLogger(__name__)

INPUTS, OUTPUTS = 2, 3
"""Tiles and logits beside the forward pass: the next tile and the mirrored one; the sum, the mirrored logits, their mean."""


class TilingPredictor(PopulationPredictor):
    """Cuts images into tiles; the arguments are those of ``HaloPredictor``."""

    max_memory: int | None = None

    def _choose_tiles(self, tile_size: Sequence[int] | str | None, halo: str | int | Sequence[int]) -> None:
        """Take the options about tiles.

        Raises:
            TilingError: a word that is not known.
        """
        if isinstance(halo, str) and halo not in HALO_WORDS:
            raise TilingError(f"halo {halo!r} is unknown: choose {', '.join(HALO_WORDS)} or a number of voxels")
        if isinstance(tile_size, str) and tile_size != AUTO:
            raise TilingError(f"tile_size {tile_size!r} is unknown: choose {AUTO}, or a number of voxels")
        self.tile_size = tile_size
        self.halo = halo
        self._fields: WeakKeyDictionary[nn.Module, ReceptiveField] = WeakKeyDictionary()
        self._tile_memory: WeakKeyDictionary[nn.Module, dict[Extents, TileMemory | str]] = WeakKeyDictionary()
        self._measured = MeasuredHalo(self._say)
        self._halo_errors: dict[tuple[tuple[float, ...], Decision], HaloError | None] = {}
        self._said: set[str] = set()

    @property
    def field(self) -> ReceptiveField:
        """The network's receptive field, traced once per network."""
        network = self.bare_network
        if network not in self._fields:
            self._fields[network] = trace_at(network, self.configuration_manager.patch_size)
        return self._fields[network]

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Spatial axes that are mirrored."""
        return tuple(self.allowed_mirroring_axes or ()) if self.use_mirroring else ()

    @property
    def tiles_are_given(self) -> bool:
        """Whether the user chose a tile or a halo, and so tiles; a tile that is to be chosen here is no such choice."""
        return self.tile_size not in (None, AUTO) or self.halo != "auto"

    def tile_logits(self, batch: Tensor, mirror_axes: Sequence[int] = ()) -> Tensor:
        """See ``HaloPredictor.tile_logits``."""
        raise NotImplementedError

    def tiles_plan(self, image: Image, reason: str = "", *, streamed: bool = False) -> TilesPlan:
        """How ``image`` (C, x, y, z) would be predicted in tiles, for a reason.

        Args:
            image: preprocessed.
            reason: why in tiles.
            streamed: logits are handed on tile by tile; else they are gathered in memory.

        Raises:
            TilingError: tile size or halo that do not go together, do not suit the network, or that memory does not hold.
        """
        shape, slices = self._axes(image)
        patch_size = self.configuration_manager.patch_size
        on_cuda = self.device.type == "cuda"
        task = TileTask(
            image_shape=shape,
            slices=slices,
            field=self.field,
            patch_size=patch_size,
            tile_size=self.tile_size,
            halo=self.halo,
            mirror_axes=self.mirror_axes,
            effective=lambda: self._measured.of(
                self.bare_network, image, self.field, patch_size, required=self.halo == "erf"
            ),
            budget=self._budget(image, streamed=streamed),
            cost=self._cost(image),
            stated=None if self.max_memory is None or on_cuda else f"--max-memory {size(self.max_memory)}",
            say=self._say,
        )
        decision, cut = planned(task)
        return TilesPlan(decision, cut, reason, self.device)

    def with_halo_error(self, plan: TilesPlan, image: Image, *, streamed: bool = False) -> TilesPlan:
        """The plan with the error of its halo, measured on the image once per shape and weights; as it is if there is none.

        Args:
            plan: for the image.
            image: preprocessed.
            streamed: see ``tiles_plan``.
        """
        decision = plan.decision
        if decision.exact or decision.statistics == "tile" or self.field.unbounded is not None:
            return plan
        key = (fingerprint(self.bare_network), decision)
        if key not in self._halo_errors:
            plane = image if image.ndim == len(plan.shape) + 1 else image[:, image.shape[1] // 2]
            budget = self._budget(image, streamed=streamed)
            error = measure_halo_error(
                lambda box: read(plane, box),
                decision,
                self.field,
                self.tile_logits,
                lambda tile: affordable(tile, budget),
                passes=2 ** len(self.mirror_axes),
                regions=self.label_manager is not None and self.label_manager.has_regions,
            )
            self._halo_errors[key] = error
            self._say(
                "no larger halo fits into memory: its error is not measured" if error is None else error.describe()
            )
        error = self._halo_errors[key]
        if error is None:
            return plan
        measured = replace(decision, measured_error=error.as_dict())
        return TilesPlan(measured, plan.shape, plan.reason, self.device)

    def _budget(self, image: Image, *, streamed: bool) -> Budget:
        """The memory that a tile of this image must fit into: that of the device, or the process's on a CPU."""
        channels, itemsize = image.shape[0], self._dtype.itemsize
        result_voxels = 0 if streamed else math.prod(image.shape[1:])
        taken = anonymous_memory()

        def at_work(memory: TileMemory) -> int:
            return memory.peak_bytes + INPUTS * memory.input_bytes + OUTPUTS * memory.output_bytes

        def need(memory: TileMemory) -> int:
            result = memory.classes * result_voxels * max(itemsize, torch.float32.itemsize)
            return taken + int(at_work(memory) * ALLOCATOR_SHARE) + ALLOCATOR_BYTES + result

        if self.device.type != "cuda":
            return CountedBudget(
                lambda tile: self._memory_of(tile, channels), self.max_memory or default_max_memory(), need
            )
        return DeviceBudget(
            lambda tile: self._memory_of(tile, channels),
            free_on(self.device),
            lambda memory: at_work(memory) * itemsize_of(self.device, self._dtype) // itemsize,
            lambda tile: self.tile_logits(torch.zeros((1, channels, *tile)), self.mirror_axes[:1]),
            self.device,
        )

    def _memory_of(self, tile: Extents, channels: int) -> TileMemory | str:
        """What a tile takes, counted once per network."""
        known = self._tile_memory.setdefault(self.bare_network, {})
        if (channels, *tile) not in known:
            known[(channels, *tile)] = tile_memory(self.bare_network, tile, channels, self._dtype)
        return known[(channels, *tile)]

    def _cost(self, image: Image) -> Callable[[Extents], float]:
        """The cost of a tile; how wide maps are per voxel is counted for the patch, once a cost is asked for."""
        channels, itemsize = image.shape[0], self._dtype.itemsize
        patch = padded_shape(self.configuration_manager.patch_size, self.field.stride)

        def cost(tile: Extents) -> float:
            memory = self._memory_of(patch, channels)
            widest = 0.0 if isinstance(memory, str) else memory.largest_numbers * itemsize / math.prod(patch)
            return cost_of(self.device.type, widest, 2 ** len(self.mirror_axes))(tile)

        return cost

    @property
    def _dtype(self) -> torch.dtype:
        """Of the network's weights."""
        weight = next((p for p in self.bare_network.parameters() if p.is_floating_point()), None)
        return torch.float32 if weight is None else weight.dtype

    def _axes(self, image: Image) -> tuple[tuple[int, ...], int]:
        """The image's extents along the network's axes, and how many slices of that shape it has."""
        ndim = len(self.field.stride)
        if image.ndim not in (4, ndim + 1):
            raise InputImageError(f"image of shape {tuple(image.shape)} has not the four axes (C, x, y, z)")
        if not math.prod(image.shape):
            raise InputImageError(f"image of shape {tuple(image.shape)} is empty")
        return tuple(image.shape[-ndim:]), 1 if image.ndim == ndim + 1 else image.shape[1]

    def _say(self, line: str | None) -> None:
        """Log a line once."""
        if line is not None and line not in self._said:
            self._said.add(line)
            logger.info(line)
