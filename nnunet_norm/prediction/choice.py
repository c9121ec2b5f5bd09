"""Which execution plan predicts an image, and with whose statistics; refusals of what cannot be honoured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.memory import (
    MOST_OF_IT,
    anonymous_memory,
    default_max_memory,
    free_disk,
    free_on,
    size,
)
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.stages import Graph, Schedule, make_schedule
from nnunet_norm.stages.schedule import BLOCK_BYTES
from nnunet_norm.tiling import padded_shape

EXECUTIONS = ("auto", "stages", "tiles")
POPULATIONS = ("stored", "image", "tile", "batch")

SMALLEST_BLOCK_BYTES = 2**20
"""The widest map of a block is not made smaller than this to fit into memory: halos would cost more than the network."""

BLOCK_BYTES_ON_DEVICE = 512 * 2**20
"""The widest map of a block on a GPU, which wants large ones."""

BLOCKS_AT_A_TIME = 3
"""With scratch on disk one is read, one computed and one written."""

PINNED_MAPS = 8
"""Maps of a block in pinned memory: what is read for one block and written of others, rounded up to powers of two."""


MAPS_ON_DEVICE = 20
"""A block's widest map takes at most one part in so many of a GPU's memory: there are several, and the convolution's own."""

ALLOCATOR_SHARE, ALLOCATOR_BYTES = 1.1, 192 * 2**20
"""What the allocator and the libraries take on top of what is counted: a factor, and bytes."""


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; see ``HaloPredictor``."""

    execution: str
    population: str | None
    scratch: Path | None
    max_memory: int | None
    tiles_are_given: bool


def population_of(wishes: Wishes, field: ReceptiveField) -> str:
    """Whose statistics are used: ``stored``, ``image``, ``tile`` or ``batch``.

    A network whose stored statistics are not to be used has lost them (``populations.network_for``); one that is to have
    those of a batch has places for them.

    Raises:
        TilingError: statistics that the network does not have, or that the execution asked for cannot use.
    """
    population = _population(wishes, field)
    if wishes.execution == "stages" and population == "tile":
        raise TilingError("execution 'stages' has no tiles, so --population tile needs --execution tiles (or auto)")
    if wishes.execution == "stages" and wishes.tiles_are_given:
        raise TilingError("--tile-size and --halo are for tiles: leave them out, or choose --execution tiles")
    if population == "image" and (wishes.execution == "tiles" or wishes.tiles_are_given):
        chosen = "--execution tiles was chosen" if wishes.execution == "tiles" else "--tile-size or --halo was given"
        raise TilingError(
            f"tiles cannot use the whole image's statistics, and {chosen}: leave that out, or choose --population tile, as "
            "nnU-Net does with InstanceNorm"
        )
    for_tiles = wishes.execution == "tiles" or wishes.tiles_are_given or population == "tile"
    if for_tiles and _limits(wishes):
        raise TilingError(f"{_limits(wishes)} is for stages, and tiles were asked for: leave one of the two out")
    return population


def _limits(wishes: Wishes) -> str:
    """The options that only stages honour; estimating the statistics of a batch honours them, too."""
    if wishes.population == "batch":
        return ""
    return "--max-memory" if wishes.max_memory is not None else "--scratch" if wishes.scratch is not None else ""


def _population(wishes: Wishes, field: ReceptiveField) -> str:
    if wishes.population == "batch":
        return "batch"
    if not field.tile_statistics:
        if wishes.population not in (None, "stored"):
            raise TilingError(
                f"population {wishes.population!r} is of no use: this network has no norm that takes statistics; leave "
                "--population out"
            )
        return "stored"
    if wishes.population == "stored":
        raise TilingError(
            f"population 'stored' does not exist for this network: {field.tile_statistics[0]} has no stored statistics; "
            "choose --population image, tile or batch"
        )
    return wishes.population or "image"


def stages_or_reason(
    wishes: Wishes,
    population: str,
    graph: Graph | str,
    image_shape: Sequence[int],
    *,
    slices: int,
    mirror_axes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    on_device: bool,
) -> StagesPlan | str:
    """The plan that runs the image stage by stage, or why tiles do.

    Args:
        wishes: what the user asked for.
        population: from ``population_of``.
        graph: the network, or why it cannot be run stage by stage.
        image_shape: spatial axes of the network.
        slices: how many slices of this shape there are.
        mirror_axes: spatial axes that are mirrored.
        device: where the network computes.
        dtype: of its weights.
        on_device: scratch may lie on the device.

    Raises:
        TilingError: stages were asked for, or are needed for the statistics, and cannot be had.
    """
    if population == "tile":
        return "the statistics of tiles were asked for"
    reason = _why_tiles(wishes, graph)
    if reason is None:
        assert isinstance(graph, Graph)
        plan = _fitting(wishes, population, graph, image_shape, slices, mirror_axes, device, dtype, on_device=on_device)
        if isinstance(plan, StagesPlan):
            return plan
        reason = plan
    _refuse_tiles(wishes, population, reason)
    return reason


def why_never_stages(wishes: Wishes, population: str, graph: Graph | str) -> None:
    """Refuse what no image can mend: stages were asked for, or are needed, and the network's operators are not known.

    Raises:
        TilingError: as said.
    """
    reason = _why_tiles(wishes, graph)
    if population != "tile" and reason is not None:
        _refuse_tiles(wishes, population, reason)


def _refuse_tiles(wishes: Wishes, population: str, reason: str) -> None:
    """Refuse to cut the image into tiles, for a reason, where that would break what was asked for."""
    if wishes.execution == "stages":
        other = "--execution tiles" + (" --population tile" if population == "image" else "")
        raise TilingError(f"execution 'stages' is not possible: {reason}; else choose {other}")
    if population == "image":
        raise TilingError(
            f"the whole image's statistics cannot be had: {reason}; else choose --population tile, as nnU-Net does "
            "with InstanceNorm"
        )
    if _limits(wishes):
        raise TilingError(
            f"{_limits(wishes)} is for stages: {reason}; else leave it out, and the image is cut into tiles"
        )


def _why_tiles(wishes: Wishes, graph: Graph | str) -> str | None:
    if wishes.execution == "tiles":
        return "--execution tiles was chosen"
    if wishes.tiles_are_given:
        return "--tile-size or --halo was given, which are for tiles"
    if isinstance(graph, str):
        return f"this network cannot be run stage by stage: {graph}"
    return None


@dataclass(frozen=True)
class Way:
    """A way of running images stage by stage that memory and disk hold.

    Attributes:
        schedules: by the padded shape of an image.
        place: where scratch lies: "memory", "device", or "disk".
        scratch_bytes: of all images together.
        memory_bytes: anonymous memory at the peak, as predicted, on top of what the process has before.
        first_level: "stored", or "computed again".
    """

    schedules: Mapping[tuple[int, ...], Schedule]
    place: str
    scratch_bytes: int
    memory_bytes: int
    first_level: str


def first_way(
    wishes: Wishes,
    graph: Graph,
    images: Mapping[tuple[int, ...], int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    on_device: bool,
    result_bytes: int = 0,
) -> Way | str:
    """The first way of running images that memory and disk hold, or what is missing.

    Args:
        wishes: what the user asked for.
        graph: the network.
        images: by padded shape, how many images have their maps in scratch at a time.
        device: where the network computes.
        dtype: of its weights.
        on_device: scratch may lie on the device.
        result_bytes: of the result, beside scratch; 0 if there is none.
    """
    itemsize = torch.float16.itemsize if device.type == "cuda" and dtype == torch.float32 else dtype.itemsize
    limit = wishes.max_memory or default_max_memory()
    shortage: str | None = None
    for first_level, block_bytes in itertools.product(("stored", "computed again"), _block_sizes(device)):
        schedules = {
            padded: make_schedule(
                graph,
                padded,
                itemsize=itemsize,
                store_first_level=first_level == "stored",
                block_bytes=block_bytes,
            )
            for padded in images
        }
        scratch = sum(count * schedules[padded].scratch_bytes for padded, count in images.items())
        stores = sum(images.values()) > 1 or not all(schedule.is_one_pass for schedule in schedules.values())
        for place in _places(wishes, device, scratch, stores=stores, on_device=on_device):
            on_cuda = device.type == "cuda"  # then only what is on its way is in the computer's memory
            blocks = BLOCKS_AT_A_TIME if place == "disk" else 1
            of_block = max(schedule.block_bytes for schedule in schedules.values())
            memory = PINNED_MAPS * block_bytes if on_cuda else of_block * blocks
            memory += (scratch if place == "memory" else 0) + (result_bytes if place != "disk" else 0)
            memory = int(memory * ALLOCATOR_SHARE) + ALLOCATOR_BYTES
            shortage = _shortage(wishes, place, memory, limit, scratch + result_bytes)
            if shortage is None:
                return Way(schedules, place, scratch, memory, first_level)
    assert shortage is not None
    return shortage  # of the last way, which takes the least


def _fitting(
    wishes: Wishes,
    population: str,
    graph: Graph,
    image_shape: Sequence[int],
    slices: int,
    mirror_axes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    on_device: bool,
) -> StagesPlan | str:
    """The plan that memory and disk hold, or what is missing."""
    padded = padded_shape(image_shape, graph.stride)
    voxels = slices * torch.Size(image_shape).numel()
    result_bytes = graph.nodes[-1].channels * voxels * max(dtype.itemsize, torch.float32.itemsize)
    way = first_way(wishes, graph, {padded: 1}, device, dtype, on_device=on_device, result_bytes=result_bytes)
    if isinstance(way, str):
        return way
    return StagesPlan(
        schedule=way.schedules[padded],
        image_shape=tuple(image_shape),
        slices=slices,
        mirror_axes=tuple(mirror_axes),
        population=population,
        device=device,
        dtype=dtype,
        place=way.place,
        scratch_folder=wishes.scratch,
        result_bytes=result_bytes,
        memory_bytes=way.memory_bytes,
        first_level=way.first_level,
        reason="norms see the whole image" if population == "image" else "the halo is that of every stage",
    )


def _block_sizes(device: torch.device) -> list[int]:
    """The widest map of a block, from what runs best down to what takes the least memory."""
    most = BLOCK_BYTES
    if device.type == "cuda":
        most = min(BLOCK_BYTES_ON_DEVICE, max(free_on(device) // MAPS_ON_DEVICE, SMALLEST_BLOCK_BYTES))
    sizes = [most]
    while sizes[-1] // 2 >= SMALLEST_BLOCK_BYTES:
        sizes.append(sizes[-1] // 2)
    return sizes


def _places(wishes: Wishes, device: torch.device, scratch_bytes: int, *, stores: bool, on_device: bool) -> list[str]:
    """Where scratch may lie, best first; one pass stores nothing."""
    fits = device.type == "cuda" and on_device and scratch_bytes <= MOST_OF_IT * free_on(device) / 2
    on_disk = wishes.scratch is not None and stores
    return (["device"] if fits else []) + (["disk"] if on_disk else ["memory"])


def _shortage(wishes: Wishes, place: str, memory: int, limit: int | None, scratch: int) -> str | None:
    """What does not suffice, with what would do; None if all does. Memory is what comes on top of what is taken already."""
    memory += anonymous_memory()
    if limit is not None and memory > limit:
        given = f"--max-memory {size(limit)}" if wishes.max_memory else f"the {size(limit)} that are available"
        advice = ["give --max-memory more"] if wishes.max_memory else []
        advice += [] if place == "disk" else [f"give --scratch a folder with {size(scratch)}"]
        remedy = " or ".join(advice) or "free some"
        return f"it takes {size(memory)} of memory, and {given} do not suffice: {remedy}"
    if place == "disk":
        assert wishes.scratch is not None
        free = free_disk(wishes.scratch)
        if scratch > free:
            return f"its scratch takes {size(scratch)}, and --scratch has {size(free)} free: choose a folder with more"
    return None
