import logging
import math

import pytest
import torch
from tiny_networks import noise, predictor, unet, whole

from nnunet_norm.prediction import halo_error
from nnunet_norm.prediction.halo_error import HaloError, measure_halo_error
from nnunet_norm.prediction.tiles_plan import TilesPlan

IMAGES = {2: (1, 70, 66), 3: (1, 40, 24, 24)}
STRIDES = {2: [(1, 1), (2, 2), (2, 2)], 3: [(1, 1, 1), (2, 2, 2)]}


def measured(made, image):
    """The record's entry after a prediction, with the logits."""
    logits = made.predict_sliding_window_return_logits(image)
    return made.record()["measured_error"], logits


def sampled(plan, field, count):
    """The tiles whose core comes nearest to a side within the image; of these those in the middle."""
    end = [-(-n // s) * s for n, s in zip(plan.shape, field.stride, strict=True)]

    def nearest(tile):
        sides = zip(tile.core, field.any_voxel, tile.read, end, strict=True)
        spare = [0]
        for core, (before, after), read, n in sides:
            spare += [core.start - before] if read.start else []
            spare += [read.stop - read.start - core.stop - after] if read.stop < n else []
        return min(spare)

    def to_the_middle(tile):
        return math.dist([(side.start + side.stop) / 2 for side in tile.read], [n / 2 for n in plan.shape])

    return sorted(plan.tiles, key=lambda tile: (nearest(tile), to_the_middle(tile)))[:count]


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_error_is_the_difference_to_one_pass_over_the_image(monkeypatch, ndim):
    """In double precision, on the same tiles: largest logit difference and share of labels; nothing is mirrored."""
    monkeypatch.setattr(halo_error, "SHARE", 10)
    monkeypatch.setattr(halo_error, "LARGEST_REFERENCE", 100)
    network, image = unet(STRIDES[ndim], classes=3), noise(*IMAGES[ndim])
    made = predictor(network, (16,) * ndim, tile_size=(16,) * ndim, halo=2, execution="tiles")
    found, logits = measured(made, image)
    truth = whole(network, image)
    assert isinstance(made.last_plan, TilesPlan)
    difference, changed, voxels = 0.0, 0, 0
    for tile in sampled(made.last_plan, made.field, found["tiles"]):
        ours, exact = (values[(slice(None), *tile.write)] for values in (logits, truth))
        difference = max(difference, float((ours - exact).abs().max()))
        changed += int((ours.argmax(0) != exact.argmax(0)).sum())
        voxels += exact[0].numel()
    assert found["tiles"] == halo_error.TILES
    assert found["exact"]
    assert difference > 1e-3
    assert found["logits"] == pytest.approx(difference, rel=1e-9)
    assert (found["labels"], found["voxels"]) == (changed / voxels, voxels)
    mirrored = predictor(network, (16,) * ndim, mirror_axes=(0,), tile_size=(16,) * ndim, halo=2, execution="tiles")
    assert measured(mirrored, image)[0]["logits"] == pytest.approx(difference, rel=1e-9)


def test_where_the_exact_halo_cannot_be_afforded_the_largest_is_taken_and_told(monkeypatch, caplog):
    """With the halo that it is, in the line and in the record; nothing where no larger one can be had."""
    network, image = unet(STRIDES[2]), noise(*IMAGES[2])
    monkeypatch.setattr(halo_error, "LARGEST_REFERENCE", 2.5)
    caplog.set_level(logging.INFO)
    made = predictor(network, (16, 16), tile_size=(16, 16), halo=2, execution="tiles")
    found, _ = measured(made, image)
    assert not found["exact"]
    assert all(2 <= side < made.field.any_voxel[0][0] for pair in found["against"] for side in pair)
    (line,) = [line for line in caplog.messages if "logits differ by at most" in line]
    halo = ", ".join(f"{before}/{after}" for before, after in found["against"])
    assert f"compared with a halo of {halo}, the largest that could be afforded" in line
    monkeypatch.setattr(halo_error, "LARGEST_REFERENCE", 0.5)
    other = predictor(network, (16, 16), tile_size=(16, 16), halo=2, execution="tiles")
    assert measured(other, image)[0] is None
    assert "no larger halo fits" in caplog.text


def test_it_is_measured_once_per_shape_and_weights(monkeypatch):
    """A second image of that shape costs nothing; other weights or another shape are measured anew."""
    network = unet(STRIDES[2])
    made = predictor(network, (32, 32), tile_size=(32, 32), halo=2, execution="tiles")
    calls = []
    monkeypatch.setattr(
        "nnunet_norm.prediction.tiling_predictor.measure_halo_error",
        lambda *args, **kwargs: calls.append(args[1].image_shape) or HaloError(1.0, 0.5, 1, 4, ((3, 3), (3, 3)), True),
    )
    for _ in range(2):
        assert measured(made, noise(*IMAGES[2]))[0]["labels"] == 0.5
    measured(made, noise(1, 60, 60))
    with torch.no_grad():
        next(network.parameters()).mul_(2)
    measured(made, noise(*IMAGES[2]))
    assert calls == [IMAGES[2][1:], (60, 60), IMAGES[2][1:]]


@pytest.mark.parametrize("options", [{"halo": "exact", "tile_size": (64, 64)}, {"tile_size": (72, 72)}])
def test_nothing_is_measured_where_the_halo_suffices(options):
    """An exact halo, and an image that is one tile."""
    made = predictor(unet(STRIDES[2]), (32, 32), execution="tiles", **options)
    assert measured(made, noise(*IMAGES[2]))[0] is None


def test_of_a_stack_the_slice_in_the_middle_is_measured(monkeypatch):
    """A 2d network that takes a volume slice by slice: only that slice is read."""
    monkeypatch.setattr(halo_error, "TILES", 1)
    network = unet(STRIDES[2])
    image = torch.zeros(1, 5, 70, 66, dtype=torch.float64)
    image[:, 2] = noise(*IMAGES[2])
    options = {"tile_size": (32, 32), "halo": 2, "execution": "tiles"}
    stack, _ = measured(predictor(network, (32, 32), **options), image)
    alone, _ = measured(predictor(network, (32, 32), **options), noise(*IMAGES[2]))
    assert stack["logits"] == alone["logits"] > 0


def test_labels_of_regions_are_compared_region_by_region():
    """Logits above zero, each for itself; for classes the largest."""
    network, image = unet(STRIDES[2]), noise(*IMAGES[2])
    made = predictor(network, (32, 32), tile_size=(32, 32), halo=2, execution="tiles")
    decision = made.tiles_plan(image).decision

    def labels(regions):
        values = iter([(1.0, -1.0), (2.0, 1.0)] * halo_error.TILES)

        def constant(batch):
            return torch.tensor(next(values)).reshape(1, 2, 1, 1).expand(1, 2, *batch.shape[2:])

        def plane(box):
            return torch.zeros(1, 1, *(side.stop - side.start for side in box))

        return measure_halo_error(plane, decision, made.field, constant, lambda tile: True, regions=regions)

    assert (labels(False).labels, labels(True).labels) == (0.0, 1.0)
    assert labels(True).logits == 2.0
