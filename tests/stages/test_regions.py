import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_norm.stages.regions import block_shape, blocks, clip, crop, extent_of, hull, pad, slices, whole

MAPS = st.integers(1, 3).flatmap(lambda axes: st.tuples(*[st.integers(1, {1: 90, 2: 30, 3: 11}[axes])] * axes))


@st.composite
def grids(draw):
    """Extents of a map, of the blocks, and a shift or none."""
    extents = draw(MAPS)
    shape = tuple(draw(st.integers(1, n + 3)) for n in extents)
    shift = draw(st.none() | st.tuples(*[st.integers(0, edge) for edge in shape]))
    return extents, shape, shift


@given(grids())
@settings(max_examples=200, deadline=None)
def test_blocks_cover_every_voxel_exactly_once(grid):
    """For any map, blocks and shift the blocks partition the map, and none is larger than was asked for."""
    extents, shape, shift = grid
    covered = np.zeros(extents, dtype=int)
    for region in blocks(extents, shape, shift):
        covered[slices(region)] += 1
        assert all(1 <= n <= edge for n, edge in zip(extent_of(region), shape, strict=True))
    assert (covered == 1).all()


@given(MAPS, st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_blocks_are_as_large_as_each_other_without_a_shift(extents, edge, parts):
    """No edge of a block differs from another along the same axis by more than a voxel."""
    shape = tuple(min(edge, -(-n // parts)) for n in extents)
    edges = np.array([extent_of(region) for region in blocks(extents, shape)])
    assert (edges.max(0) - edges.min(0)).max() <= 1


@given(MAPS, st.floats(0.5, 4000))
@settings(max_examples=200, deadline=None)
def test_blocks_hold_what_was_asked_for_or_are_short(extents, most):
    """At most so many voxels, unless the edges are short already; no cut makes them shorter than 8."""
    shape = block_shape(extents, most)
    assert np.prod(shape) <= most or max(shape) < 16
    assert all(edge == n or 8 <= edge < n for edge, n in zip(shape, extents, strict=True))


def test_one_block_where_the_whole_map_fits():
    """A map with just so many voxels as a block may have is not cut."""
    assert block_shape((20, 30), 600) == (20, 30)
    assert block_shape((20, 30), 599) == (20, 15)
    assert list(blocks((20, 30), (20, 30))) == [whole((20, 30))]


@given(grids(), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_a_block_with_its_halo_is_cut_from_the_padded_map(grid, halo):
    """Clipped to the map, cropped from it and padded again, a region is what it is in a map padded as a whole."""
    extents, shape, shift = grid
    image = torch.arange(1.0, np.prod(extents) + 1).reshape(1, 1, *extents)
    padded = torch.nn.functional.pad(image, [halo] * 2 * len(extents), value=-1.0)
    for region in blocks(extents, shape, shift):
        needed = tuple((start - halo, stop + halo) for start, stop in region)
        given_ = clip(needed, extents)
        values = pad(crop(image, whole(extents), given_), given_, needed, -1.0)
        expected = padded[(slice(None), slice(None), *slices(needed, [-halo] * len(extents)))]
        assert torch.equal(values, expected)
        assert hull(region, needed) == hull(needed, region) == needed
