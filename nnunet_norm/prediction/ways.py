"""The ways of running images stage by stage: what lies where and in which blocks, and whether memory and disk hold it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_norm.prediction.memory import (
    MOST_OF_IT,
    anonymous_memory,
    default_max_memory,
    free_disk,
    free_on,
    size,
)
from nnunet_norm.stages import Graph, Schedule, make_schedule
from nnunet_norm.stages.schedule import BLOCK_BYTES

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


@dataclass(frozen=True)
class Way:
    """A way of running images stage by stage that memory and disk hold.

    Attributes:
        schedules: by the padded shape of an image.
        place: where scratch lies: "memory", "device", or "disk".
        scratch_bytes: of all images together.
        memory_bytes: anonymous memory at the peak, as predicted, on top of what the process has before.
        first_level: "stored", or "computed again".
        block_bytes: the widest map of a block.
    """

    schedules: Mapping[tuple[int, ...], Schedule]
    place: str
    scratch_bytes: int
    memory_bytes: int
    first_level: str
    block_bytes: int


def first_way(
    wishes: Wishes,
    graph: Graph,
    images: Mapping[tuple[int, ...], int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    on_device: bool,
    result_bytes: Callable[[bool], int] = lambda on_disk: 0,
    in_place: bool = True,
) -> Way | str:
    """The first way of running images that memory and disk hold, or what is missing.

    Args:
        wishes: what the user asked for.
        graph: the network.
        images: by padded shape, how many images have their maps in scratch at a time.
        device: where the network computes.
        dtype: of its weights.
        on_device: scratch may lie on the device.
        result_bytes: of the result, beside scratch, if it is on a disk or not; 0 if there is none.
        in_place: see ``stages.pieces.divide``; for scratch on a disk.
    """
    itemsize = itemsize_of(device, dtype)
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
                in_place=in_place or wishes.scratch is None,
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
            of_result = result_bytes(place == "disk")
            memory += (scratch if place == "memory" else 0) + (of_result if place != "disk" else 0)
            memory = int(memory * ALLOCATOR_SHARE) + ALLOCATOR_BYTES
            shortage = _shortage(wishes, place, memory, limit, scratch + of_result)
            if shortage is None:
                return Way(schedules, place, scratch, memory, first_level, block_bytes)
    assert shortage is not None
    return shortage  # of the last way, which takes the least


def itemsize_of(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of a number that the network computes with: autocast on CUDA takes half precision."""
    return torch.float16.itemsize if device.type == "cuda" and dtype == torch.float32 else dtype.itemsize


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
