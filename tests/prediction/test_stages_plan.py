"""Prediction stage by stage: one pass over the whole image, whatever the network, the image, mirroring, folds and scratch."""

import copy
import os
import subprocess
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import (
    INSTANCE_NORM,
    NO_NORM,
    noise,
    predictor,
    randomized,
    unet,
    whole,
    without_the_voxel_before,
)

from nnunet_norm.errors import OutputError, TilingError
from nnunet_norm.layers import convert_norm
from nnunet_norm.prediction import ways
from nnunet_norm.prediction.execution import Folds, Result
from nnunet_norm.prediction.passes import mirrored, read_mirrored
from nnunet_norm.prediction.stages_plan import with_blocks_elsewhere
from nnunet_norm.receptive_field import trace
from nnunet_norm.stages import Scratch, ScratchOnDisk, make_schedule
from nnunet_norm.stages.moments import ChannelMoments
from nnunet_norm.stages.scratch import FOLDER
from nnunet_norm.stages.windows import Convolution

EXACT = {"stored": 1e-12, "image": 1e-9}
"""Of the largest logit, in double precision."""

PLAIN_2D, PLAIN_3D = [(1, 1), (2, 2), (2, 2)], [(1, 1, 1), (2, 2, 2)]
NETWORKS = {
    "2d": unet(PLAIN_2D),
    "2d InstanceNorm": unet(PLAIN_2D, norm=INSTANCE_NORM),
    "2d residual InstanceNorm": unet([(1, 1), (2, 2)], norm=INSTANCE_NORM, residual=True),
    "2d anisotropic GroupNorm": randomized(convert_norm(unet([(1, 1), (1, 2), (2, 2)], channels=2), "group_norm")),
    "2d without norm": unet(PLAIN_2D, norm=NO_NORM),
    "3d BatchRenorm": randomized(convert_norm(unet(PLAIN_3D), "batch_renorm")),
    "3d anisotropic": unet([(1, 1, 1), (1, 2, 1), (2, 2, 2)], channels=2, classes=3),
    "3d residual": unet(PLAIN_3D, residual=True),
    "3d InstanceNorm": unet(PLAIN_3D, norm=INSTANCE_NORM),
    "3d anisotropic InstanceNorm": unet([(1, 1, 1), (1, 2, 2)], norm=INSTANCE_NORM, classes=3),
}
FIELDS = {name: trace(network) for name, network in NETWORKS.items()}
CHANNELS = {"2d anisotropic GroupNorm": 2, "3d anisotropic": 2}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """No file of scratch outlives a test."""
    yield
    assert list(tmp_path.rglob("*")) == []


@st.composite
def images(draw, ndim):
    """A network and the shape of an image for it, also below the stride, with the axes that are mirrored."""
    name = draw(st.sampled_from([name for name, field in FIELDS.items() if len(field.stride) == ndim]))
    long = draw(st.integers(0, ndim - 1))
    edges = [draw(st.integers(9, 40) if axis == long else st.integers(1, 14)) for axis in range(ndim)]
    slices = [draw(st.integers(1, 3))] if ndim == 2 else []
    mirrored = draw(st.lists(st.sampled_from(range(ndim)), unique=True, max_size=ndim))
    return name, (CHANNELS.get(name, 1), *slices, *edges), tuple(mirrored)


def relative(result, expected):
    """Largest difference over the largest logit."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


def with_folds(name, folds, mirrored=(), **options):
    """A predictor with several sets of weights for one network, and the networks that have them."""
    network = NETWORKS[name]
    made = predictor(copy.deepcopy(network), (8,) * len(FIELDS[name].stride), mirror_axes=mirrored, **options)
    networks = []
    for fold in range(folds):
        torch.manual_seed(fold)
        networks.append(randomized(copy.deepcopy(network)))
    made.list_of_parameters = [fold.state_dict() for fold in networks]
    return made, networks


def mean_of_whole(networks, image, mirrored=()):
    return sum(whole(network, image, mirrored) for network in networks) / len(networks)


def compare_with_the_whole_image(case, seed, folds):
    name, shape, mirrored = case
    image = noise(*shape, seed=seed)
    made, networks = with_folds(name, folds, mirrored)
    result = made.predict_logits_from_preprocessed_data(image)
    record, expected = made.record(), mean_of_whole(networks, image, mirrored)
    assert (record["plan"], record["exact"], record["mirrored_passes"]) == ("stages", True, 2 ** len(mirrored))
    assert (result.shape, result.dtype) == (expected.shape, torch.float64)
    assert relative(result, expected) < EXACT[record["population"]]


@given(images(2), st.integers(0, 2**31), st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_result_is_that_of_the_whole_image_in_2d(case, seed, folds):
    """Slice by slice, whatever the network, the image's shape, mirrored axes and folds."""
    compare_with_the_whole_image(case, seed, folds)


@given(images(3), st.integers(0, 2**31), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_result_is_that_of_the_whole_image_in_3d(case, seed, folds):
    """The same in three dimensions."""
    compare_with_the_whole_image(case, seed, folds)


SHAPES = {2: (3, 37, 26), 3: (18, 11, 21)}


def image_for(name, dtype=torch.float64):
    return noise(CHANNELS.get(name, 1), *SHAPES[len(FIELDS[name].stride)], dtype=dtype)


def flips_of(name):
    return (0,) if len(FIELDS[name].stride) == 3 else (0, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_scratch_on_disk_is_as_announced_and_changes_nothing(name, tmp_path, monkeypatch):
    """The same bits; what lies in the folder comes to what was said, never to more; with folds, mirrored, and in a stack."""
    image, lies = image_for(name), []
    real, zeros = ScratchOnDisk.allocate, ScratchOnDisk.zeros

    def allocate(scratch, shape, dtype):
        data = real(scratch, shape, dtype)
        lies.append(sum(file.stat().st_size for file in scratch.folder.iterdir()))
        return data

    def result(scratch, shape, dtype):
        data = zeros(scratch, shape, dtype)
        assert data.numel() * data.itemsize == made.last_plan.result_bytes
        lies.clear()
        return data

    monkeypatch.setattr(ScratchOnDisk, "allocate", allocate)
    monkeypatch.setattr(ScratchOnDisk, "zeros", result)
    made, networks = with_folds(name, 2, flips_of(name), scratch=tmp_path / "made if need be")
    in_file = made.predict_logits_from_preprocessed_data(image)
    found = in_file.clone()
    del in_file  # and its file with it
    assert list((tmp_path / "made if need be").iterdir()) == []
    (tmp_path / "made if need be").rmdir()
    assert made.record()["scratch"] == "disk"
    assert max(lies) == made.record()["scratch_bytes"]
    assert relative(found, mean_of_whole(networks, image, flips_of(name))) < EXACT[made.record()["population"]]
    in_memory, _ = with_folds(name, 2, flips_of(name))
    assert torch.equal(found, in_memory.predict_logits_from_preprocessed_data(image))


@pytest.mark.parametrize("name", NETWORKS)
def test_scratch_in_memory_is_as_announced(name, monkeypatch):
    """The same for maps in memory: the most that is there at a time is what was said."""
    there, most = {}, [0]
    real_allocate, real_free = Scratch.allocate, Scratch.free

    def allocate(scratch, shape, dtype):
        data = real_allocate(scratch, shape, dtype)
        there[data.data_ptr()] = data.numel() * data.itemsize
        most[0] = max(most[0], sum(there.values()))
        return data

    def free(scratch, data):
        del there[data.data_ptr()]
        real_free(scratch, data)

    monkeypatch.setattr(Scratch, "allocate", allocate)
    monkeypatch.setattr(Scratch, "free", free)
    made, _ = with_folds(name, 2, flips_of(name))
    made.predict_logits_from_preprocessed_data(image_for(name))
    assert most[0] == made.record()["scratch_bytes"]
    assert there == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_level_computed_again_gives_the_same(name):
    """With less scratch, and more work."""
    network, image = NETWORKS[name], image_for(name)
    made = predictor(network, (8,) * len(FIELDS[name].stride), mirror_axes=flips_of(name))
    stored = made.plan(image)
    schedule = stored.schedule
    again = make_schedule(
        schedule.graph, schedule.extents[0], itemsize=8, store_first_level=False, block_bytes=ways.BLOCK_BYTES
    )
    assert again.scratch_bytes < schedule.scratch_bytes
    assert again.passes > schedule.passes
    result = made.predict_with(replace(stored, schedule=again), image)
    assert relative(result, whole(network, image, flips_of(name))) < EXACT[stored.population]


@pytest.mark.parametrize("name", NETWORKS)
def test_in_single_precision_the_difference_is_rounding(name, record_property):
    """The same network in float32, against its own pass over the whole image."""
    network, image = copy.deepcopy(NETWORKS[name]).float(), image_for(name, torch.float32)
    made = predictor(network, (8,) * len(FIELDS[name].stride), mirror_axes=flips_of(name))
    result = made.predict_sliding_window_return_logits(image)
    assert result.dtype == torch.float32
    difference = relative(result, whole(network, image, flips_of(name)))
    record_property("relative difference", difference)
    assert difference < 100 * torch.finfo(torch.float32).eps


def test_a_halo_that_is_too_small_shows(monkeypatch):
    """The comparisons above can fail: without the voxel before each block the result is another."""
    monkeypatch.setattr(Convolution, "apply", without_the_voxel_before(Convolution.apply))
    network, image = NETWORKS["2d"], image_for("2d")
    result = predictor(network, (8, 8)).predict_sliding_window_return_logits(image)
    assert relative(result, whole(network, image)) > 1e-3


def test_a_norm_that_sees_a_block_shows(monkeypatch):
    """The same for statistics: those of the last block in place of all."""

    def add(moments, values):
        ChannelMoments.__init__(moments)
        real(moments, values)

    real = ChannelMoments.add
    network, image = NETWORKS["2d InstanceNorm"], image_for("2d InstanceNorm")
    made = predictor(network, (8, 8))
    plan = made.plan(image)
    monkeypatch.setattr(ChannelMoments, "add", add)
    result = made.predict_with(plan, image)
    with pytest.raises(TilingError, match="run stage by stage it gives another result"):
        predictor(network, (8, 8)).plan(image)
    assert relative(result, whole(network, image)) > 1e-3


@pytest.mark.parametrize("name", ["2d", "2d InstanceNorm"])
@pytest.mark.parametrize("folds", [1, 2])
def test_progress_is_told_as_often_as_was_said(name, folds):
    """One step per block, slice, mirrored pass and fold, and the weights of a fold are asked for before its passes."""
    made = predictor(NETWORKS[name], (8, 8), mirror_axes=(0, 1))
    image, calls, used = image_for(name), [], []
    plan = made.plan(image)
    result = Result(image.shape[1:])
    with torch.inference_mode():
        plan.run(Folds(NETWORKS[name], folds, used.append), image, result, lambda: calls.append(1))
    assert len(calls) == plan.steps(folds)
    assert plan.steps(folds) == 3 * 4 * folds * plan.schedule.steps > 12 * folds * len(plan.schedule.pieces)
    assert used == [fold for _ in range(3) for fold in range(folds) for _ in range(4)]


@pytest.mark.parametrize("folds", [1, 2])
def test_progress_of_one_pass_is_one_step_per_slice(folds, monkeypatch):
    """Whatever is averaged there."""
    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**30)
    made, image, calls = predictor(NETWORKS["2d"], (8, 8), mirror_axes=(0, 1)), image_for("2d"), []
    plan = made.plan(image)
    with torch.inference_mode():
        plan.run(Folds(NETWORKS["2d"], folds), image, Result(image.shape[1:]), lambda: calls.append(1))
    assert len(calls) == plan.steps(folds) == 3


@pytest.mark.parametrize("name", ["2d", "3d InstanceNorm"])
def test_an_image_of_one_block_goes_through_the_network_as_it_is(name, tmp_path, monkeypatch):
    """To the last bit what one pass gives; no scratch is made, and the record says so."""
    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**30)
    network, image = NETWORKS[name], image_for(name)
    made = predictor(network, (8,) * len(FIELDS[name].stride), scratch=tmp_path / "none")
    result = made.predict_sliding_window_return_logits(image)
    assert torch.equal(result, whole(network, image))
    assert (made.record()["plan"], made.record()["one_pass"], made.record()["scratch"]) == ("stages", True, "memory")


def test_an_image_of_one_voxel_at_the_bottom_is_predicted_in_blocks_and_in_one(monkeypatch):
    """InstanceNorm of torch refuses it where a training could have one; its deviation from itself is zero."""
    network, image = NETWORKS["2d InstanceNorm"], noise(1, 2, 3, 4)
    results = []
    for block_bytes in (2**6, 2**30):
        monkeypatch.setattr(ways, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(ways, "SMALLEST_BLOCK_BYTES", block_bytes)
        results.append(predictor(network, (8, 8)).predict_sliding_window_return_logits(image))
    assert relative(*results) < EXACT["image"]


def test_one_pass_that_the_device_cannot_hold_is_made_in_blocks(monkeypatch):
    """The device's memory may hold less than was thought."""
    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**30)
    network, image, passes = copy.deepcopy(NETWORKS["2d"]), image_for("2d"), []
    expected = whole(network, image)

    def too_large(module, inputs):
        passes.append(inputs[0].shape)
        raise torch.OutOfMemoryError

    made = predictor(network, (8, 8))
    plan = made.plan(image)
    network.register_forward_pre_hook(too_large)
    assert relative(made.predict_with(plan, image), expected) < EXACT["stored"]
    assert passes == [(1, 1, 40, 28)] * 3


# --- what goes wrong leaves nothing behind ---


@pytest.mark.parametrize("scratch", [True, False])
@pytest.mark.parametrize("name", ["2d", "3d residual", "3d InstanceNorm"])
def test_an_interrupted_prediction_leaves_nothing(name, scratch, tmp_path):
    """Ctrl-C after any block: it is handed on, and the folder is empty."""
    image = image_for(name)
    made = predictor(NETWORKS[name], (8,) * len(FIELDS[name].stride), scratch=tmp_path if scratch else None)
    plan = made.plan(image)
    total = plan.steps(2)
    for stop in range(0, total, max(total // 10, 1)):
        calls = iter(range(total))

        def progress(stop=stop, calls=calls):
            if next(calls) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), torch.inference_mode():
            plan.run(Folds(NETWORKS[name], 2), image, Result(image.shape[1:], plan.result_memory), progress)
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    """Folders of scratch that nobody holds; other files are not touched."""
    dead = tmp_path / f"{FOLDER}dead"
    dead.mkdir()
    (dead / "map_1").write_bytes(b"0" * 100)
    (tmp_path / "mine").touch()
    predictor(NETWORKS["2d"], (8, 8), scratch=tmp_path).predict_sliding_window_return_logits(image_for("2d"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "mine").unlink()


def test_a_scratch_folder_that_cannot_be_made_is_refused(tmp_path):
    """In one line with its name."""
    (tmp_path / "file").touch()
    made = predictor(NETWORKS["2d"], (8, 8), scratch=tmp_path / "file" / "scratch")
    with pytest.raises(
        OutputError, match=r"scratch folder '.*/file/scratch' cannot be used \(Not a directory\): choose"
    ):
        made.predict_sliding_window_return_logits(image_for("2d"))
    (tmp_path / "file").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch):
    """Somebody else takes the room after it was found: no crash of the process, and nothing is left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        disk.rmdir()
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        made = predictor(NETWORKS["2d"], (8, 8), scratch=disk)
        image = noise(1, 1, 100, 100)
        too_small = "and --scratch has 64 KiB free: choose a folder with more"
        assert made.plan(image).as_dict()["why_tiles"].endswith(too_small)
        with pytest.raises(TilingError, match=too_small):
            predictor(NETWORKS["2d"], (8, 8), scratch=disk, execution="stages").plan(image)
        monkeypatch.setattr(ways, "free_disk", lambda folder: 2**40)
        with pytest.raises(
            OutputError, match=r"scratch of \d+ bytes cannot be made in .*: choose a --scratch folder with"
        ):
            made.predict_sliding_window_return_logits(image)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


# --- mirrored regions, and grids of blocks ---


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.data())
def test_a_mirrored_region_is_that_of_the_flipped_image(extents, data):
    """Reading a region of the mirror image is reading there and flipping; zeros are beyond the far end."""
    flip = data.draw(st.lists(st.sampled_from(range(len(extents))), unique=True))
    padded = [n + data.draw(st.integers(0, 4)) for n in extents]
    region = []
    for n in padded:
        start = data.draw(st.integers(0, n - 1))
        region.append((start, data.draw(st.integers(start + 1, n))))
    image = noise(2, *extents)
    whole_image = torch.zeros(1, 2, *padded, dtype=torch.float64)
    whole_image[(0, slice(None), *(slice(n) for n in extents))] = image
    expected = whole_image.flip([axis + 2 for axis in flip])
    expected = expected[(slice(None), slice(None), *(slice(*interval) for interval in region))]
    place = mirrored(tuple(region), padded, flip)
    assert torch.equal(read_mirrored(image, place, flip), expected)
    assert mirrored(place, padded, flip) == tuple(region)


@pytest.mark.parametrize("name", ["2d", "3d residual", "2d InstanceNorm"])
def test_two_grids_of_blocks_share_no_border(name, monkeypatch):
    """So that what one computes in the middle of a block, the other computes at borders; also where all fits one block."""
    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**30)
    plan = predictor(NETWORKS[name], (8,) * len(FIELDS[name].stride), mirror_axes=(0,)).plan(image_for(name))
    assert plan.schedule.steps == len(plan.schedule.pieces)
    first, second = with_blocks_elsewhere(plan)
    assert first.mirror_axes == second.mirror_axes == ()
    for piece in range(len(plan.schedule.pieces)):
        extents = plan.schedule.extents[plan.schedule.pieces[piece].target]
        for axis, n in enumerate(extents):
            cuts = [
                {edge for block in made.schedule.blocks_of(piece) for edge in block[axis]} for made in (first, second)
            ]
            assert cuts[0] & cuts[1] == {0, n}
            assert n < 4 or all(len(edges) > 2 for edges in cuts)
