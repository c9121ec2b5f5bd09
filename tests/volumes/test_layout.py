"""Cutting a volume into chunks, shards and parts."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_norm.errors import TilingError
from nnunet_norm.stages.regions import extent_of
from nnunet_norm.volumes import layout, parts, shard_and_chunk, shard_counts, shards

SHAPES = st.tuples(*[st.integers(1, 3000)] * 3)


@settings(deadline=None, max_examples=200)
@given(shape=SHAPES, itemsize=st.sampled_from([1, 2, 4]), num_parts=st.integers(1, 64))
def test_shards_are_whole_chunks_and_small_enough(shape, itemsize, num_parts):
    """Enforces that a shard is a whole multiple of a chunk, and that neither is larger than said."""
    shard, chunk = shard_and_chunk(shape, itemsize, num_parts)
    assert all(s % c == 0 for s, c in zip(shard, chunk, strict=True))
    assert math.prod(chunk) <= layout.CHUNK_VOXELS
    assert math.prod(shard) <= layout.SHARD_VOXELS
    assert math.prod(shard) * itemsize <= layout.SHARD_BYTES
    if num_parts > 1 and shard != chunk:
        assert math.prod(shard_counts(shape, shard)) >= layout.SHARDS_PER_PART * num_parts


@pytest.mark.parametrize(
    ("shape", "shard", "chunk"),
    [
        ((1024, 512, 512), (256, 256, 256), (64, 64, 64)),
        ((1, 8192, 8192), (1, 4096, 4096), (1, 512, 512)),
        ((40, 2000, 2000), (40, 512, 512), (40, 64, 64)),
        ((5, 7, 9), (5, 7, 9), (5, 7, 9)),
    ],
)
def test_flat_volumes_have_flat_chunks(shape, shard, chunk):
    """Enforces few files and chunks of about 64 cubed voxels, also where an axis is short."""
    assert shard_and_chunk(shape, 1) == (shard, chunk)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), shard=st.tuples(*[st.integers(1, 9)] * 3), counts=st.tuples(*[st.integers(1, 6)] * 3))
def test_parts_cover_every_voxel_once_with_whole_shards(data, shard, counts):
    """Enforces that parts are disjoint, aligned to shards, cover the volume, and are as many as asked for."""
    shape = tuple(c * s - data.draw(st.integers(0, s - 1)) for c, s in zip(counts, shard, strict=True))
    number = data.draw(st.integers(1, math.prod(counts)))
    found = parts(shape, shard, number)
    assert len(found) == number
    assert sum(math.prod(extent_of(part)) for part in found) == math.prod(shape)
    for part in found:
        for (start, stop), edge, n in zip(part, shard, shape, strict=True):
            assert 0 <= start < stop <= n
            assert start % edge == 0
            assert stop % edge == 0 or stop == n
    for a, b in itertools.combinations(found, 2):
        assert any(p[1] <= q[0] or q[1] <= p[0] for p, q in zip(a, b, strict=True))


@settings(deadline=None, max_examples=50)
@given(number=st.integers(2, 24), shape=st.tuples(*[st.integers(500, 2000)] * 3))
def test_parts_are_about_equally_large(number, shape):
    """Enforces that the largest part has at most twice the mean size when shards were chosen for the parts."""
    shard, _ = shard_and_chunk(shape, 1, number)
    sizes = [math.prod(extent_of(part)) for part in parts(shape, shard, number)]
    assert max(sizes) <= 2 * math.prod(shape) / number


@pytest.mark.parametrize(("number", "edge"), [(8, 540), (27, 360), (64, 270)])
def test_parts_of_a_cube_are_cubes(number, edge):
    """Enforces compact parts, not slabs, since each is predicted with a margin around it."""
    found = parts((1080, 1080, 1080), (10, 10, 10), number)
    assert {extent_of(part) for part in found} == {(edge, edge, edge)}


def test_parts_do_not_depend_on_the_process():
    """Enforces that processes which are told the same numbers find the same parts in the same order."""
    assert parts((100, 90, 80), (16, 16, 16), 7) == sorted(parts((100, 90, 80), (16, 16, 16), 7))


def test_shards_of_a_region_are_clipped_at_its_end():
    """Enforces the order of the last axis first, and shards that end with the volume."""
    assert list(shards(((0, 1), (8, 20)), (1, 8))) == [((0, 1), (8, 16)), ((0, 1), (16, 20))]


@pytest.mark.parametrize("number", [0, 9])
def test_more_parts_than_shards_are_refused(number):
    """Enforces the refusal that names the largest number of parts."""
    with pytest.raises(TilingError, match=rf"num_parts {number}: .* has 8 shards of \(5, 5, 5\).*1 to 8"):
        parts((10, 10, 10), (5, 5, 5), number)


def test_an_empty_volume_is_refused():
    """Enforces the refusal of extents of 0."""
    with pytest.raises(TilingError, match=r"\(0, 4, 4\)"):
        shard_and_chunk((0, 4, 4), 1)
