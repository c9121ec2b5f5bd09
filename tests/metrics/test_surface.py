"""Surface Dice and Hausdorff distance against closed forms, and slow implementations that share no code with MONAI."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from nnunet_norm.metrics import hausdorff_distance_95, normalized_surface_dice, surface

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5)]


def box(shape, low, high):
    """A mask that is true from corner ``low`` to corner ``high``."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(map(slice, low, high))] = True
    return mask


def box_surface(low, high, spacing):
    """Places (mm) and sizes (mm2) of the surface elements of a box, by hand.

    They lie at the corners of voxels: on a face, a rectangle of one voxel's face; on an edge, the quadrilateral that cuts the
    edge off half a voxel from it; at a corner, the triangle that cuts it off.
    """
    places, sizes = [], []
    for corner in itertools.product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))):
        outer = [axis for axis in range(3) if corner[axis] in (low[axis], high[axis])]
        if not outer:
            continue
        half = [step / 2 for step in spacing]
        if len(outer) == 1:
            size = math.prod(spacing[axis] for axis in range(3) if axis not in outer)
        elif len(outer) == 2:
            (along,) = set(range(3)) - set(outer)
            size = spacing[along] * math.hypot(*(half[axis] for axis in outer))
        else:
            size = 0.5 * math.hypot(half[0] * half[1], half[1] * half[2], half[0] * half[2])
        places.append([place * step for place, step in zip(corner, spacing, strict=True)])
        sizes.append(size)
    return np.array(places), np.array(sizes)


def nsd_of(surfaces, tolerance):
    """The definition, with all distances between all elements."""
    (a, size_a), (b, size_b) = surfaces
    distances = cdist(a, b)
    tolerance += 1e-6  # steps of 0.7 add up to a little more than 2.1
    within = size_a[distances.min(1) <= tolerance].sum() + size_b[distances.min(0) <= tolerance].sum()
    return within / (size_a.sum() + size_b.sum())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("second", "tolerance"),
    [
        (((2, 2, 3), (7, 8, 10)), 0.0),  # one face moved outwards by 3 voxels
        (((2, 2, 3), (7, 8, 10)), 1.0),
        (((2, 2, 3), (7, 8, 10)), 1.5),  # by exactly so much with a spacing of 0.5
        (((4, 4, 1), (8, 9, 5)), 0.9),  # moved in all directions
        (((4, 4, 1), (8, 9, 5)), 2.0),
        (((3, 4, 4), (4, 5, 5)), 1.4),  # a single voxel within
    ],
)
def test_boxes_have_the_surface_dice_that_can_be_counted(spacing, second, tolerance):
    """Places and areas of all surface elements of two boxes by arithmetic, anisotropic ones too."""
    first, shape = ((2, 2, 3), (7, 8, 7)), (10, 11, 12)
    expected = nsd_of([box_surface(*one, spacing) for one in (first, second)], tolerance)
    found = normalized_surface_dice(box(shape, *first), box(shape, *second), spacing, tolerance)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found > 0


def ball(radius, spacing, shift=0.0):
    """A mask of a ball in the middle of a field of view of 26 mm, shifted along the last axis, in mm."""
    axes = [(np.arange(round(26 / step)) + 0.5) * step - 13 for step in spacing]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return z**2 + y**2 + (x - shift) ** 2 <= radius**2


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (1.0, 0.4, 0.5)])
def test_concentric_spheres_agree_from_the_difference_of_their_radii_on(spacing):
    """Every point of one sphere is as far from the other as the radii differ, but for voxels."""
    small, large = ball(8, spacing), ball(10.5, spacing)
    voxel = math.hypot(*spacing)
    assert normalized_surface_dice(small, large, spacing, 2.5 - voxel) == 0
    assert normalized_surface_dice(small, large, spacing, 2.5 + voxel) == 1
    assert hausdorff_distance_95(small, large, spacing) == pytest.approx(2.5, abs=voxel / 2)


@pytest.mark.parametrize("tolerance", [0.6, 1.2, 1.8])
def test_shifted_spheres_agree_on_the_zone_that_geometry_gives(tolerance):
    """The points of a sphere within a tolerance of its copy lie between two planes; the area is linear in their distance."""
    radius, shift, spacing = 9.0, 2.4, (0.3, 0.15, 0.2)
    # A point at the angle t from the shift is at |sqrt(r^2 + d^2 - 2 r d cos t) - r| from the other sphere.
    ends = [(shift**2 + sign * 2 * radius * tolerance - tolerance**2) / (2 * radius * shift) for sign in (-1, 1)]
    expected = np.ptp(np.clip(ends, -1, 1)) / 2
    found = normalized_surface_dice(ball(radius, spacing), ball(radius, spacing, shift), spacing, tolerance)
    assert found == pytest.approx(expected, abs=0.06)  # the surface is a staircase: half a voxel


def outline(mask, spacing):
    """Places and lengths (mm) of the outline: in every 2 x 2 window, segments between the middles of the sides cut."""
    padded = np.pad(mask, 1)
    places, lengths = [], []
    for y, x in np.ndindex(padded.shape[0] - 1, padded.shape[1] - 1):
        (a, b), (c, d) = padded[y : y + 2, x : x + 2]
        sides = [((0, 0.5), a != b), ((1, 0.5), c != d), ((0.5, 0), a != c), ((0.5, 1), b != d)]
        cut = [np.array(middle) * spacing for middle, differs in sides if differs]
        if len(cut) == 2:
            length = math.dist(*cut)
        elif len(cut) == 4:  # two diagonal neighbours: each is cut off
            length = 2 * math.hypot(*spacing) / 2
        else:
            continue
        places.append(np.array([y, x]) * spacing)
        lengths.append(length)
    return np.array(places), np.array(lengths)


def smooth_noise(seed, shape, share=0.4):
    """A mask of blobs that touch the border, and each other diagonally."""
    noise = np.random.default_rng(seed).normal(size=shape)
    noise += sum(np.roll(noise, 1, axis) for axis in range(len(shape)))
    return noise > np.quantile(noise, 1 - share)


@pytest.mark.parametrize("seed", range(3))
def test_outlines_in_the_plane_against_marching_squares(seed):
    """Any masks in 2d, with spacing that differs per axis: segments by geometry, distances between all of them."""
    spacing = np.array([1.5, 0.7])
    a, b = smooth_noise(seed, (14, 17)), smooth_noise(seed + 10, (14, 17))
    for tolerance in (0.0, 0.7, 1.5, 2.1):
        expected = nsd_of([outline(a, spacing), outline(b, spacing)], tolerance)
        assert normalized_surface_dice(a, b, spacing, tolerance) == pytest.approx(expected, rel=1e-6)


def surface_voxels(mask, spacing):
    """Places (mm) of the voxels with a neighbour outside, one after another."""
    padded = np.pad(mask, 1)
    steps = [step for axis in range(mask.ndim) for step in (np.eye(mask.ndim, dtype=int)[axis] * s for s in (-1, 1))]
    found = [at for at in np.argwhere(padded) if not all(padded[tuple(at + step)] for step in steps)]
    return np.array(found) * spacing


@pytest.mark.parametrize("spacing", [(1.5, 0.7), *SPACINGS])
def test_hausdorff_distance_against_all_pairs_of_voxels(spacing):
    """The 95th percentile of the distances, in both directions, whichever is larger."""
    shape = (9, 10, 11)[: len(spacing)]
    a, b = smooth_noise(1, shape), smooth_noise(2, shape, share=0.1)
    distances = cdist(surface_voxels(a, spacing), surface_voxels(b, spacing))
    expected = max(np.percentile(distances.min(axis), 95) for axis in (0, 1))
    assert hausdorff_distance_95(a, b, spacing) == pytest.approx(expected, rel=1e-6)
    assert hausdorff_distance_95(b, a, spacing) == pytest.approx(expected, rel=1e-6)


def test_the_order_of_the_axes_does_not_matter():
    """Masks and spacing transposed alike give the same: no axis is taken for another one."""
    spacing, a, b = (3.0, 1.0, 0.5), smooth_noise(3, (7, 8, 9)), smooth_noise(4, (7, 8, 9))
    expected = normalized_surface_dice(a, b, spacing, 1.0), hausdorff_distance_95(a, b, spacing)
    for order in itertools.permutations(range(3)):
        turned = a.transpose(order), b.transpose(order), [spacing[axis] for axis in order]
        found = normalized_surface_dice(*turned, 1.0), hausdorff_distance_95(*turned)
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((4, 5, 6), dtype=bool), box((4, 5, 6), (1, 1, 1), (3, 4, 5))),  # one is the whole image
        (box((4, 5, 6), (0, 0, 0), (2, 5, 3)), box((4, 5, 6), (2, 0, 3), (4, 5, 6))),  # at opposite corners
    ],
)
def test_masks_are_closed_at_the_border_of_the_image(a, b):
    """An image with more background around it gives the same numbers."""
    spacing = (2.0, 1.0, 0.5)
    for metric in (lambda *m: normalized_surface_dice(*m, spacing, 1.0), lambda *m: hausdorff_distance_95(*m, spacing)):
        assert metric(a, b) == metric(np.pad(a, 3), np.pad(b, 3))


def test_a_slice_is_measured_in_the_plane():
    """An axis of one voxel, whose spacing nnU-Net makes up, has no part in it: an outline, and no faces above and below."""
    spacing, a, b = (999, 1.5, 0.7), smooth_noise(5, (12, 13)), smooth_noise(6, (12, 13))
    for metric in (lambda *m: normalized_surface_dice(*m, 1.0), hausdorff_distance_95):
        assert metric(a[None], b[None], spacing) == metric(a, b, spacing[1:])
        assert metric(a[:, None], b[:, None], (1.5, 999, 0.7)) == metric(a, b, spacing[1:])


@pytest.mark.parametrize("at_once", [1, 200, 400])
def test_large_masks_are_taken_slab_by_slab(monkeypatch, at_once):
    """Nothing is lost or counted twice between slabs, with ignored voxels too."""
    a, b, ignored = (smooth_noise(seed, (9, 10, 11), share=0.1 + 0.2 * seed) for seed in range(3))
    expected = [normalized_surface_dice(a, b, (3, 1, 0.5), 1, known) for known in (None, ignored & ~a & ~b)]
    monkeypatch.setattr(surface, "_VOXELS_AT_ONCE", at_once)
    found = [normalized_surface_dice(a, b, (3, 1, 0.5), 1, known) for known in (None, ignored & ~a & ~b)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert expected[0] != expected[1]


def test_an_image_of_one_voxel_can_be_measured():
    """Two axes are left of any image."""
    voxel = np.ones((1, 1, 1), dtype=bool)
    assert normalized_surface_dice(voxel, voxel, (1, 1, 1), 0) == 1
    assert hausdorff_distance_95(voxel, voxel, (1, 1, 1)) == 0


def test_equal_masks_agree_without_tolerance():
    a = smooth_noise(7, (6, 7, 8))
    assert normalized_surface_dice(a, a, (3, 1, 0.5), 0) == 1
    assert hausdorff_distance_95(a, a, (3, 1, 0.5)) == 0


def test_what_is_not_there_has_no_surface():
    """Neither: NaN. One alone: the surface Dice is 0, and there is no distance; a number would be made up."""
    nothing, something = np.zeros((5, 6, 7), dtype=bool), box((5, 6, 7), (1, 1, 1), (3, 3, 3))
    assert math.isnan(normalized_surface_dice(nothing, nothing, (1, 1, 1), 1))
    assert math.isnan(hausdorff_distance_95(nothing, nothing, (1, 1, 1)))
    for one, other in ((nothing, something), (something, nothing)):
        assert normalized_surface_dice(one, other, (1, 1, 1), 100) == 0
        assert math.isnan(hausdorff_distance_95(one, other, (1, 1, 1)))


def test_a_distance_equal_to_the_tolerance_is_within():
    """3 x 0.1 is more than 0.3 in floating point, and not for people."""
    a, b = box((3, 3, 20), (1, 1, 4), (2, 2, 10)), box((3, 3, 20), (1, 1, 7), (2, 2, 13))
    assert normalized_surface_dice(a, b, (1, 1, 0.1), 0.3) == 1
    assert normalized_surface_dice(a, b, (1, 1, 0.1), 0.29) < 1


def test_what_lies_under_ignored_voxels_does_not_count():
    """Masks that differ there and nowhere near agree; the outline of what is ignored is no surface of its own."""
    shape, spacing = (10, 12, 14), (2, 1, 1)
    a = box(shape, (2, 2, 2), (8, 9, 6))
    ignored = box(shape, (0, 0, 7), (10, 12, 14))
    b = a | box(shape, (3, 3, 8), (9, 9, 13))
    assert normalized_surface_dice(a, b, spacing, 0) < 1
    assert normalized_surface_dice(a, b, spacing, 0, ignored) == 1
    assert hausdorff_distance_95(a, b, spacing, ignored) == 0
    # Both masks end where the ignored voxels begin, which says nothing: without tolerance only what is elsewhere agrees.
    cut, apart = box(shape, (2, 2, 2), (8, 9, 7)), box(shape, (5, 5, 2), (8, 12, 7))
    touching = normalized_surface_dice(cut, apart, spacing, 0, ignored)
    assert touching < normalized_surface_dice(cut, apart, spacing, 0)


def test_nothing_is_measured_where_everything_is_ignored():
    """Scribbles among ignored voxels have no surface that is known: NaN, and not full agreement."""
    a = box((6, 6, 6), (2, 2, 2), (4, 4, 4))
    assert math.isnan(normalized_surface_dice(a, a, (1, 1, 1), 1, ~a))
    assert math.isnan(hausdorff_distance_95(a, a, (1, 1, 1), ~a))


def test_ignored_voxels_far_away_change_nothing():
    """Also where the image is cropped to the masks, and the ignored voxels lie just outside."""
    a, b = box((12, 12), (3, 3), (7, 7)), box((12, 12), (3, 4), (7, 8))
    far, near = box((12, 12), (10, 0), (12, 12)), box((12, 12), (7, 0), (12, 12))
    assert normalized_surface_dice(a, b, (1, 1), 0, far) == normalized_surface_dice(a, b, (1, 1), 0)
    lower = [outline(mask, np.ones(2)) for mask in (a, b)]
    above = [(places[places[:, 0] < 7], lengths[places[:, 0] < 7]) for places, lengths in lower]
    assert normalized_surface_dice(a, b, (1, 1), 0, near) == pytest.approx(nsd_of(above, 0))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 5)])
def test_masks_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(4, 4, 4\), \(4, 4(, 5)?\), .*spacing of 3 axes"):
        normalized_surface_dice(np.ones((4, 4, 4)), np.ones(shape), (1, 1, 1), 1)
