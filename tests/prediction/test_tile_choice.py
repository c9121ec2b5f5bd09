import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.tile_choice import (
    OVERHEAD_VOXELS,
    WIDE_MAP_BYTES,
    WIDE_MAP_COST,
    CountedBudget,
    DeviceBudget,
    affordable,
    cheapest,
    cost_of,
    require_room,
    tilings,
)
from nnunet_norm.prediction.tile_memory import TileMemory
from nnunet_norm.tiling import plan_tiles


def counted(tile, per_voxel=10, classes=2):
    """A network whose memory is so many bytes per voxel."""
    return TileMemory(per_voxel * math.prod(tile), 0, 0, math.prod(tile), classes)


def budget(limit, memory_of=counted):
    return CountedBudget(memory_of, limit, lambda memory: memory.peak_bytes)


@given(
    st.integers(1, 200),
    st.sampled_from([1, 2, 4, 8]),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.booleans(),
)
def test_numbers_of_tiles_are_those_of_the_plan(extent, stride, halo, keep_half):
    """Every tile worth a look is cut by ``plan_tiles`` into that many, and a stride less gives more."""
    for tiling in tilings((extent,), (stride,), (halo,), keep_half=keep_half, cost=lambda tile: 1.0):
        assert len(plan_tiles((extent,), tiling.tile, [halo], (stride,))) == tiling.count
        smaller = tiling.tile[0] - stride
        if tiling.count > 1 and smaller >= sum(halo) + stride:
            assert len(plan_tiles((extent,), (smaller,), [halo], (stride,))) > tiling.count or keep_half


def test_the_cheapest_tile_is_found_among_all():
    """Against every tile on the grid of the stride, by the same cost, for a two-dimensional image and uneven halos."""
    shape, stride, halo = (90, 70), (4, 4), ((8, 4), (12, 12))
    cost = cost_of("cpu", 0.0, 1)
    by_hand = min(
        len(plan_tiles(shape, (a, b), halo, stride)) * cost((a, b))
        for a in range(16, 93, 4)
        for b in range(28, 73, 4)
        if a * b <= 3000
    )
    limited = budget(10 * 3000)
    found = cheapest(tilings(shape, stride, halo, keep_half=False, cost=cost), limited)
    assert found.cost == by_hand
    assert math.prod(found.tile) <= 3000


def test_cost_counts_overhead_mirrored_passes_and_wide_maps():
    """By the formula of the docstrings."""
    voxels = 64 * 64
    assert cost_of("cpu", 1.0, 4)((64, 64)) == 4 * (voxels + OVERHEAD_VOXELS["cpu"])
    wide = WIDE_MAP_BYTES / voxels + 1
    assert cost_of("cpu", wide, 1)((64, 64)) == WIDE_MAP_COST * voxels + OVERHEAD_VOXELS["cpu"]
    assert cost_of("cuda", wide, 1)((64, 64)) == voxels + OVERHEAD_VOXELS["cuda"]


def test_shapes_that_the_network_cannot_take_are_left_out():
    """Attention of a fixed size: only one extent is taken, although others are cheaper."""
    fixed = budget(None, lambda tile: counted(tile) if tile == (32,) else "the embedding has 32 places")
    assert cheapest(tilings((100,), (8,), ((4, 4),), keep_half=False, cost=lambda tile: 1.0), fixed).tile == (32,)
    assert not affordable((40,), fixed)


def test_out_of_memory_on_a_device_is_answered_with_half_of_the_voxels():
    """The forward pass raises what torch raises; every further try has at most half, and what fits is tried once."""
    tried = []

    def run(tile):
        tried.append(tile)
        if math.prod(tile) > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")

    device = DeviceBudget(counted, 10 * 5000, lambda memory: memory.peak_bytes, run, torch.device("cpu"))
    candidates = tilings((96, 96), (8, 8), ((4, 4), (4, 4)), keep_half=False, cost=cost_of("cpu", 0.0, 1))
    found = cheapest(candidates, device)
    sizes = [math.prod(tile) for tile in tried]
    assert sizes[0] <= 5000  # what is more than all of its memory is not tried
    assert all(after <= before / 2 for before, after in itertools.pairwise(sizes))
    assert len(sizes) > 2
    assert found.tile == tried[-1]
    assert math.prod(found.tile) <= 600
    assert affordable(found.tile, device)
    assert len(tried) == len(sizes)


def test_an_error_that_is_none_of_memory_is_not_hidden():
    """A network that fails otherwise on the device fails."""

    def run(tile):
        raise RuntimeError("no kernel image")

    device = DeviceBudget(counted, None, lambda memory: memory.peak_bytes, run, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        cheapest(tilings((96,), (8,), ((4, 4),), keep_half=False, cost=lambda tile: 1.0), device)


def test_a_tile_without_room_is_refused_with_sizes_that_have_it():
    """The cheapest that fits, or what the smallest takes; without a known limit nothing is refused."""
    candidates = tilings((100, 100), (4, 4), ((4, 4), (4, 4)), keep_half=False, cost=cost_of("cpu", 0.0, 1))
    fitting = cheapest(candidates, budget(2**14))
    expected = (
        rf"a tile of 64 x 64 takes 40 KiB .*16 KiB does not suffice: .*--tile-size {fitting.tile[0]} {fitting.tile[1]}"
    )
    with pytest.raises(TilingError, match=expected):
        require_room((64, 64), budget(2**14), candidates, "--max-memory 16 KiB")
    with pytest.raises(TilingError, match=r"does not suffice: give at least 1.42 KiB, with --tile-size 12 12$"):
        require_room((64, 64), budget(1), candidates, "--max-memory 1")
    require_room(fitting.tile, budget(2**14), candidates, "--max-memory 16 KiB")
    require_room((64, 64), budget(None), candidates, "nothing")
