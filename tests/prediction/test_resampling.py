"""Logits that are resampled box by box are what nnU-Net's function makes of all of them, to the last bit."""

import itertools
import math

import numpy as np
import pytest
import torch
from export_cases import export_case, random_partition, with_overlap
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.resampling import BoxResampler, _Axis, box_resampler, sub_boxes


def resampler_of(case):
    return box_resampler(case.plans_manager, case.configuration_manager, case.properties, tuple(case.logits.shape))


def nnunet(case):
    """nnU-Net's function on all logits, as its export calls it."""
    target = [case.properties["spacing"][axis] for axis in case.plans_manager.transpose_forward]
    current = case.configuration_manager.spacing
    current = current if len(current) == len(target) else [target[0], *current]
    shape = case.properties["shape_after_cropping_and_before_resampling"]
    return np.asarray(case.configuration_manager.resampling_fn_probabilities(case.logits, shape, current, target))


def box_by_box(case, resampler, generator, dtype=torch.float32):
    result = np.full((len(case.logits), *resampler.out_shape), np.nan, dtype=np.float32)
    for core in random_partition(resampler.in_shape, generator):
        region = with_overlap(core, resampler.overlap, resampler.in_shape)
        for out in sub_boxes(resampler.out_box(core), len(case.logits), 4 * len(case.logits) * 200):
            result[(slice(None), *out)] = resampler(case.logits[(slice(None), *region)].to(dtype), region, out)
    return result


SEPARATE = [
    pytest.param({"shape": shape, "cropped": cropped, "spacing": spacing, "target": target}, id=name)
    for name, shape, cropped, spacing, target in (
        ("axis 0", (7, 20, 19), (11, 27, 16), (5, 1, 1), (3.2, 0.7, 1.2)),
        ("axis 0, as long", (7, 20, 19), (7, 27, 16), (5, 1, 1), (5, 0.7, 1.2)),
        ("axis 0, shorter", (12, 20, 19), (5, 20, 22), (1.5, 1, 1), (3.6, 1, 0.9)),
        ("axis 1", (20, 7, 19), (27, 11, 16), (1, 5, 1), (0.7, 3.2, 1.2)),
        ("axis 1, as long", (20, 7, 19), (27, 7, 16), (1, 5, 1), (0.7, 5, 1.2)),
        ("axis 2", (20, 19, 7), (27, 16, 11), (1, 1, 5), (0.7, 1.2, 3.2)),
        ("axis 2, as long", (20, 19, 7), (27, 16, 7), (1, 1, 5), (0.7, 1.2, 5)),
        ("axis 2, alone", (20, 19, 7), (20, 19, 12), (1, 1, 5), (1, 1, 2.9)),
    )
]
JOINTLY = [
    pytest.param({"shape": shape, "cropped": cropped}, id=name)
    for name, shape, cropped in (
        ("up", (16, 17, 18), (20, 25, 19)),
        ("down", (16, 17, 18), (11, 8, 17)),
        ("mixed", (16, 17, 18), (21, 17, 9)),
        ("halves", (16, 10, 12), (8, 20, 24)),
        ("one voxel", (1, 17, 18), (3, 12, 1)),
        ("to one voxel", (6, 5, 4), (1, 1, 1)),
    )
]
SLICES = pytest.param(
    {"shape": (6, 19, 20), "cropped": (6, 25, 17), "spacing": (1, 1), "target": (4, 0.76, 1.18)}, id="2d configuration"
)
NEAREST = pytest.param(
    {"shape": (16, 17, 18), "cropped": (21, 8, 18), "resampling_options": {"order": 0}}, id="order 0"
)
TOGETHER = pytest.param(
    {
        "shape": (7, 20, 19),
        "cropped": (11, 27, 16),
        "spacing": (5, 1, 1),
        "resampling_options": {"force_separate_z": False},
    },
    id="not separately",
)


@pytest.mark.parametrize("arguments", [*JOINTLY, *SEPARATE, SLICES, NEAREST, TOGETHER])
def test_equal_to_nnunet_bit_for_bit(arguments):
    """Every way in which the default function resamples, for boxes at random."""
    case = export_case(**arguments)
    resampler = resampler_of(case)
    expected = nnunet(case)
    for seed in range(3):
        result = box_by_box(case, resampler, np.random.default_rng(seed))
        assert result.dtype == expected.dtype
        assert np.array_equal(result, expected)


@pytest.mark.parametrize("arguments", SEPARATE)
def test_the_axis_of_thick_slices_needs_no_overlap(arguments):
    """It is resampled separately, to the nearest slice; the others that change are interpolated."""
    case = export_case(**arguments)
    shapes = zip(arguments["shape"], arguments["cropped"], strict=True)
    changed = [int(n != m) for n, m in shapes]
    changed[int(np.argmin(arguments["shape"]))] = 0
    assert resampler_of(case).overlap == tuple(changed)


def test_several_threads_and_slabs(monkeypatch):
    """The same with many slabs and sums of few planes, in two threads; then in the caller's own."""
    from nnunet_norm.prediction import resampling

    monkeypatch.setattr(resampling, "SLAB_BYTES", 2**9)
    monkeypatch.setattr(resampling, "CHUNK", 50)
    case = export_case((8, 9, 10), (13, 8, 15))
    resampler = resampler_of(case)
    whole = [tuple(slice(0, n) for n in shape) for shape in (resampler.in_shape, resampler.out_shape)]
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert np.array_equal(resampler(case.logits, *whole), nnunet(case))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["float16", "bfloat16", "float64", "channels last", "reversed ndarray"])
def test_any_kind_of_logits_is_taken_as_float32(layout):
    """Precision and memory layout of what is given do not matter but for the values."""
    case = export_case((8, 9, 10), (13, 8, 15))
    logits = case.logits.bfloat16().float()
    if layout == "float16":
        logits = logits.half().float()
    given = {
        "float16": lambda: logits.half(),
        "bfloat16": lambda: logits.bfloat16(),
        "float64": lambda: logits.double(),
        "channels last": lambda: logits[None].to(memory_format=torch.channels_last_3d)[0],
        "reversed ndarray": lambda: np.asfortranarray(logits.numpy()),
    }[layout]()
    case.logits = logits
    resampler = resampler_of(case)
    whole = [tuple(slice(0, n) for n in shape) for shape in (resampler.in_shape, resampler.out_shape)]
    assert np.array_equal(resampler(given, *whole), nnunet(case))


@settings(deadline=None, max_examples=200)
@given(n_in=st.integers(1, 40), n_out=st.integers(1, 60), data=st.data())
def test_out_boxes_divide_the_output(n_in, n_out, data):
    """For any cuts of the input the output boxes follow each other, and read nothing beyond the core and its overlap."""
    kind = data.draw(st.sampled_from([_Axis.linear, _Axis.nearest]))
    resampler = BoxResampler((n_in,), (n_out,), (kind(n_in, n_out),))
    cuts = sorted({0, n_in, *data.draw(st.lists(st.integers(0, n_in), max_size=5))})
    end = 0
    for start, stop in itertools.pairwise(cuts):
        (out,) = resampler.out_box((slice(start, stop),))
        assert out.start == end <= out.stop
        end = out.stop
        if out.start < out.stop:
            (needed,) = resampler.in_box((out,))
            assert start <= needed.start < needed.stop <= min(stop + resampler.overlap[0], n_in)
    assert end == n_out


@settings(deadline=None, max_examples=200)
@given(
    starts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    extents=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    channels=st.integers(1, 5),
    most=st.integers(1, 2000),
)
def test_sub_boxes_divide_a_box_and_keep_the_bound(starts, extents, channels, most):
    """Every voxel once, none more than allowed; a single voxel is the least."""
    box = tuple(slice(a, a + n) for a, n in zip(starts, extents, strict=True))
    counted = np.zeros((20, 20, 20), dtype=int)
    for part in sub_boxes(box, channels, most):
        counted[part] += 1
        voxels = math.prod(s.stop - s.start for s in part)
        assert voxels == 1 or 4 * channels * voxels <= most
    assert counted[box].min(initial=1) == counted.max(initial=1) == 1 or not math.prod(extents)
    assert counted.sum() == math.prod(extents)


TORCH = {"resampling_fn_probabilities": "resample_torch_fornnunet", "resampling_fn_probabilities_kwargs": {}}
HACK = {"resampling_fn_probabilities": "no_resampling_hack", "resampling_fn_probabilities_kwargs": {}}


@pytest.mark.parametrize(
    ("configuration", "options"),
    [
        pytest.param({}, {"order": 3}, id="order 3"),
        pytest.param({}, {"is_seg": True}, id="is_seg"),
        pytest.param({}, {"order_z": 1, "force_separate_z": True}, id="order_z 1"),
        pytest.param(TORCH, {}, id="torch"),
        pytest.param(HACK, {}, id="none"),
    ],
)
def test_what_cannot_be_done_box_by_box_is_left_to_nnunet(configuration, options):
    """Splines read every voxel; torch's rounding depends on the processor; None says so."""
    case = export_case(
        (8, 9, 10), (13, 8, 15), spacing=(3, 1, 1), configuration=configuration, resampling_options=options
    )
    assert resampler_of(case) is None


@pytest.mark.parametrize("configuration", [pytest.param(TORCH, id="torch"), pytest.param(HACK, id="none"), {}])
def test_each_function_leaves_an_unchanged_shape_alone(configuration):
    """No function of nnU-Net changes values where the shape stays, whatever its order."""
    options = {} if configuration else {"order": 3}
    case = export_case((8, 9, 10), (8, 9, 10), configuration=configuration, resampling_options=options)
    resampler = resampler_of(case)
    assert resampler.overlap == (0, 0, 0)
    assert np.array_equal(box_by_box(case, resampler, np.random.default_rng(0)), nnunet(case))


def test_logits_that_do_not_reach_far_enough_are_refused():
    """A core without the voxel after it, and logits of another shape than said."""
    case = export_case((8, 9, 10), (13, 8, 15))
    resampler = resampler_of(case)
    core = (slice(0, 4), slice(0, 9), slice(0, 10))
    out = resampler.out_box(core)
    with pytest.raises(
        TilingError, match=r"depends on logits of \[0:5, 0:9, 0:10\], but those of \[0:4, .*overlap of \(1, 1, 1\)"
    ):
        resampler(case.logits[:, :4], core, out)
    with pytest.raises(TilingError, match=r"logits of shape \(4, 3, 9, 10\) do not cover a region of \(4, 9, 10\)"):
        resampler(case.logits[:, :3], core, out)
