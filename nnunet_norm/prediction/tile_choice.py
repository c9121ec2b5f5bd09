"""Which tile costs least among those that fit into memory: for ``--tile-size auto``, and to name sizes in a refusal.

Per axis the tiles worth a look are the smallest ones with which it is cut into one, two, three ... parts; with larger ones
more would be computed twice. Which of them fit is asked of the memory, by way of ``Budget``, from the cheapest on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from nnunetv2.utilities.helpers import empty_cache

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.halo import by
from nnunet_norm.prediction.memory import size
from nnunet_norm.prediction.tile_axis import Sides
from nnunet_norm.prediction.tile_memory import TileMemory
from nnunet_norm.tiling import padded_shape, round_up

OVERHEAD_VOXELS = {"cpu": 4096, "cuda": 2**18}
"""What a pass costs on top of its voxels, as voxels. CPU: measured with U-Nets of 16 to 32 features on one thread, 3 to 10 ms
at 2 microseconds per voxel. CUDA: not measured; a large GPU does about so many while a hundred kernels are launched."""

WIDE_MAP_BYTES, WIDE_MAP_COST = 32 * 2**20, 1.5
"""On a CPU a voxel costs so much more where maps are larger than what the C library keeps from one allocation to the next:
their pages are made anew each time (measured, 1.3 to 1.7)."""

MARGIN = 1.2
"""A tile that needs more than this many times the memory there is lets others be left out by their number of voxels."""

MORE = 1.01
"""What is asked for on top, since bytes are told in three figures."""

Extents = tuple[int, ...]


@dataclass(frozen=True)
class Tiling:
    """A tile, and what cutting an image with it costs.

    Attributes:
        tile: extents in voxels.
        count: number of tiles.
        cost: of the whole image, in voxels that go through the network.
    """

    tile: Extents
    count: int
    cost: float


class Budget(Protocol):
    """Memory that tiles must fit into."""

    @property
    def limit(self) -> int | None:
        """Bytes; None if it is not known."""

    def need(self, tile: Extents) -> int | str:
        """Bytes that a tile takes, or why the network cannot take it."""

    def holds(self, tile: Extents) -> bool:
        """Whether a tile, of which the need is within the limit, does fit."""


class CountedBudget:
    """Memory in bytes, and tiles whose need is counted before they are run.

    Args:
        memory_of: counts what a tile takes.
        limit: bytes that there are for it.
        need: all that is needed, in bytes, when a tile takes so much.
    """

    def __init__(
        self,
        memory_of: Callable[[Extents], TileMemory | str],
        limit: int | None,
        need: Callable[[TileMemory], int],
    ) -> None:
        self._memory_of, self._limit, self._need = memory_of, limit, need
        self._known: dict[Extents, int | str] = {}

    @property
    def limit(self) -> int | None:
        """See ``Budget.limit``."""
        return self._limit

    def need(self, tile: Extents) -> int | str:
        """See ``Budget.need``."""
        if tile not in self._known:
            memory = self._memory_of(tile)
            self._known[tile] = memory if isinstance(memory, str) else self._need(memory)
        return self._known[tile]

    def holds(self, tile: Extents) -> bool:
        """What is counted is what there is."""
        del tile
        return True


class DeviceBudget(CountedBudget):
    """Memory of a device, where only running a tile tells whether it fits: libraries take what they want.

    Args:
        memory_of: see ``CountedBudget``; the count is a lower bound.
        limit: bytes that are free.
        need: see ``CountedBudget``.
        run: gives a tile to the network.
        device: where.
    """

    def __init__(
        self,
        memory_of: Callable[[Extents], TileMemory | str],
        limit: int | None,
        need: Callable[[TileMemory], int],
        run: Callable[[Extents], object],
        device: torch.device,
    ) -> None:
        super().__init__(memory_of, limit, need)
        self._run, self._device = run, device
        self._held: dict[Extents, bool] = {}

    def holds(self, tile: Extents) -> bool:
        """Whether the network ran on a tile of this size without running out of memory."""
        if tile not in self._held:
            try:
                self._run(tile)
                self._held[tile] = True
            except torch.OutOfMemoryError:
                self._held[tile] = False
            empty_cache(self._device)
        return self._held[tile]


def tilings(
    image_shape: Sequence[int],
    stride: Sequence[int],
    halo: Sides,
    *,
    keep_half: bool,
    cost: Callable[[Extents], float],
    patch: Sequence[int] = (),
) -> list[Tiling]:
    """The tiles worth a look, cheapest first, and of equal cost the smallest.

    Args:
        image_shape: what is cut.
        stride: total stride per axis.
        halo: (before, after) per axis.
        keep_half: the core is at least half of the tile, except of one that holds the whole axis.
        cost: of one tile.
        patch: an edge per axis that is always among them: a network may take no other.
    """
    padded = padded_shape(image_shape, stride)
    axes = [
        _edges(n, s, sum(pair), keep_half=keep_half, patch=edge)
        for n, s, pair, edge in zip(padded, stride, halo, patch or padded, strict=True)
    ]
    found = []
    for choice in itertools.product(*axes):
        tile, count = tuple(edge for edge, _ in choice), math.prod(parts for _, parts in choice)
        found.append(Tiling(tile, count, count * cost(tile)))
    return sorted(found, key=lambda tiling: (tiling.cost, math.prod(tiling.tile)))


def cost_of(device: str, bytes_per_voxel: float, passes: int) -> Callable[[Extents], float]:
    """The cost of a tile as a function of its extents, in voxels.

    Args:
        device: "cpu" or another type of device.
        bytes_per_voxel: of the network's widest map.
        passes: mirrored passes and folds.
    """
    overhead = OVERHEAD_VOXELS.get(device, OVERHEAD_VOXELS["cuda"])

    def cost(tile: Extents) -> float:
        voxels = math.prod(tile)
        wide = device == "cpu" and voxels * bytes_per_voxel > WIDE_MAP_BYTES
        return passes * (voxels * (WIDE_MAP_COST if wide else 1.0) + overhead)

    return cost


def cheapest(candidates: Sequence[Tiling], budget: Budget) -> Tiling | None:
    """The first that fits.

    Where one does not, those that are larger on every axis are left out, and after a device ran out of memory all with more
    than half of its voxels.
    """
    too_large: list[Extents] = []
    most_voxels = math.inf
    for candidate in candidates:
        voxels = math.prod(candidate.tile)
        if voxels > most_voxels or any(_within(tile, candidate.tile) for tile in too_large):
            continue
        need = budget.need(candidate.tile)
        if isinstance(need, str):
            continue  # not for this network
        if budget.limit is not None and need > budget.limit:
            too_large.append(candidate.tile)
            if need > MARGIN * budget.limit:
                most_voxels = min(most_voxels, voxels * max(budget.limit, 0) / need * MARGIN)
        elif budget.holds(candidate.tile):
            return candidate
        else:
            most_voxels = min(most_voxels, voxels / 2)
    return None


def affordable(tile: Extents, budget: Budget) -> bool:
    """Whether memory holds a tile, and the network takes it."""
    need = budget.need(tile)
    return not isinstance(need, str) and (budget.limit is None or need <= budget.limit) and budget.holds(tile)


def require_room(tile: Extents, budget: Budget, candidates: Sequence[Tiling], given: str) -> None:
    """Refuse a tile for which there is not enough memory.

    Args:
        tile: extents.
        budget: the memory.
        candidates: tiles that may do instead.
        given: how the user stated the memory.

    Raises:
        TilingError: with the sizes that do, or the memory that it takes.
    """
    need = budget.need(tile)
    if isinstance(need, str) or budget.limit is None or need <= budget.limit:
        return
    raise TilingError(f"a tile of {by(tile)} takes {size(need)} of memory in all, and {given} does not suffice: "
                      f"{remedy(candidates, budget)}")  # fmt: skip


def remedy(candidates: Sequence[Tiling], budget: Budget) -> str:
    """The cheapest tile that memory holds, or how much memory the smallest takes."""
    fitting = cheapest(candidates, budget)
    if fitting is not None:
        return f"choose --tile-size {' '.join(map(str, fitting.tile))} or smaller, or give more"
    for candidate in sorted(candidates, key=lambda tiling: math.prod(tiling.tile)):
        need = budget.need(candidate.tile)
        if not isinstance(need, str):
            more = size(round(need * MORE))
            return f"give at least {more}, with --tile-size {' '.join(map(str, candidate.tile))}"
    return "the network takes no smaller tile: give more"


def _edges(padded: int, stride: int, halo: int, *, keep_half: bool, patch: int) -> list[tuple[int, int]]:
    """(edge, number of tiles) along an axis: the smallest edge for every number, by the arithmetic of ``plan_tiles``."""
    smallest: dict[int, int] = {}
    found = [(padded, 1)]
    for edge in range(stride, padded, stride):
        core = max(stride, round_up(-(-edge // 2), stride)) if keep_half else stride
        if halo + core > edge:
            continue
        parts = -(-(padded - edge) // ((edge - halo) // stride * stride)) + 1
        if smallest.setdefault(parts, edge) == edge or edge == patch:
            found.append((edge, parts))
    return found


def _within(small: Extents, large: Extents) -> bool:
    return all(a <= b for a, b in zip(small, large, strict=True))
