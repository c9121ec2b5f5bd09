"""Populations: which cases they have, whose statistics come of them in either way, and what is predicted with those."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from tiny_models import segmentation, visible, write_image
from tiny_networks import INSTANCE_NORM, NO_NORM, UnknownToStages, noise, predictor, randomized, unet, whole
from torch import nn
from trained_models import write_trained

from nnunet_norm.errors import ExperimentalBatchesError, InputImageError, StatisticsError, TilingError
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.layers import convert_norm, find_norms, tracks_statistics
from nnunet_norm.prediction import HaloPredictor, ways
from nnunet_norm.prediction.population_estimate import PopulationEstimator, preprocessed_images
from nnunet_norm.prediction.population_tiles import divided
from nnunet_norm.prediction.populations import each_batch, each_case, network_for, the_folder
from nnunet_norm.prediction.ways import Wishes

STRIDES = [(1, 1), (2, 2), (2, 2)]
PATCH = (16, 16)
IMAGES = [noise(1, z, 16, 16, seed=z) * z + 1 for z in (1, 3, 2)]
IMAGE = noise(1, 2, 41, 30)
CASES = {f"case_{i}": (f"case_{i}_0000.nii.gz",) for i in range(4)}
BATCHES = ExperimentalBatches(
    {"case_0": "b", "case_1": "a", "case_2": "b", "case_3": "a", "other": "c"}, frozenset({"case_2", "case_3"})
)


def without_statistics(network):
    """The network with the statistics of what it gets: the reference for everything that is estimated."""
    return network_for(network, "image", in_place=False)


def statistics_of_one_batch(network, batch):
    """Mean and biased variance before every norm, when all images go through a network in train mode as one batch."""
    network = without_statistics(network)
    found, hooks = {}, []
    for name, norm in find_norms(network).items():

        def keep(_, inputs, name=name):
            x = inputs[0].transpose(0, 1).flatten(1)
            found[name] = {"running_mean": x.mean(1), "running_var": x.var(1, unbiased=False)}

        hooks.append(norm.register_forward_pre_hook(keep))
    with torch.no_grad():
        network(batch)
    for hook in hooks:
        hook.remove()
    return {f"{name}.{key}": value for name, both in found.items() for key, value in both.items()}


def estimator(network, *, folds=1, patch_size=PATCH, **wishes):
    """An estimator with random weights per fold, on the CPU."""
    weights = [randomized(network).state_dict() for _ in range(folds)]
    weights = [{key: value.clone() for key, value in w.items()} for w in weights]
    wanted = {"execution": "auto", "population": "batch", "scratch": None, "max_memory": None, "tiles_are_given": False}
    return PopulationEstimator(
        network,
        weights,
        patch_size=patch_size,
        wishes=Wishes(**wanted | wishes),
        device=torch.device("cpu"),
        on_device=False,
        progress=False,
    )


def load(folder, folds=(0,), **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(folder), folds)
    return made


def predict(made, images, output, **options):
    return made.predict_from_files_sequential(str(images), None if output is None else str(output), **options)


def record_of(output):
    return json.loads((output / "halo_prediction.json").read_text())


@pytest.fixture
def images(tmp_path):
    """Four images whose intensities differ, of two shapes."""
    for number in range(4):
        write_image(tmp_path / "images", f"case_{number}_0000", seed=number, shape=(16, 16 + 2 * (number % 2), 18))
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    return write_trained(tmp_path / "model", "nnUNetTrainerBRN", folds=(0, 1))


def test_populations_of_cases():
    """The folder, every case, every experimental batch; images are all of a batch's, or its controls."""
    (folder,) = the_folder(CASES)
    assert (folder.cases, folder.images, str(folder)) == (CASES, CASES, "folder, 4 images")
    assert [str(population) for population in each_case(CASES)] == [f"case '{name}', 1 image" for name in CASES]
    a, b = each_batch(CASES, BATCHES)
    assert (list(a.cases), list(b.cases)) == (["case_1", "case_3"], ["case_0", "case_2"])
    assert a.images == a.cases
    assert str(a) == "experimental batch 'a', 2 images"
    a, b = each_batch(CASES, BATCHES, controls=True)
    assert (list(a.images), list(b.images)) == (["case_3"], ["case_2"])
    assert (list(a.cases), str(b)) == (["case_1", "case_3"], "experimental batch 'b', 1 control")


def test_cases_without_a_batch_and_batches_without_a_control_are_refused():
    """By name."""
    with pytest.raises(ExperimentalBatchesError, match="1 of 2 cases have no experimental batch: case_9"):
        each_batch({"case_0": ("f",), "case_9": ("g",)}, BATCHES)
    with pytest.raises(ExperimentalBatchesError, match="experimental batch 'b' has no control among its 1 images here"):
        each_batch({"case_0": ("f",)}, BATCHES, controls=True)


@pytest.mark.parametrize(
    ("extents", "tile", "stride"),
    [
        ((41, 30), (16, 16), (4, 4)),
        ((8, 8), (16, 16), (4, 4)),
        ((7, 100, 33), (8, 20, 12), (1, 4, 8)),
        ((5,), (1,), (4,)),
    ],
)
def test_tiles_of_a_population_have_every_voxel_once(extents, tile, stride):
    """On the grid of the stride, no larger than asked for, and of nearly equal size."""
    boxes = divided(extents, tile, stride)
    padded = [math.ceil(n / s) * s for n, s in zip(extents, stride, strict=True)]
    count = np.zeros(padded, int)
    for box in boxes:
        count[box] += 1
    assert (count == 1).all()
    for axis, (most, step) in enumerate(zip(tile, stride, strict=True)):
        edges = {box[axis].stop - box[axis].start for box in boxes}
        assert max(edges) <= max(most, step)
        assert max(edges) - min(edges) <= step
        assert all(box[axis].start % step == box[axis].stop % step == 0 for box in boxes)


@pytest.mark.parametrize("norm", ["batch_norm", "batch_renorm", "instance_norm_tracked", "instance_norm"])
@pytest.mark.parametrize("way", ["staged", "passes"])
def test_statistics_are_those_of_all_images_in_one_batch(norm, way):
    """Of every fold's own weights; in either way, where tiles are whole images; InstanceNorm becomes BatchNorm."""
    network = network_for(convert_norm(unet(STRIDES), norm), "batch", in_place=True)
    made = estimator(network, folds=2, max_memory=1 if way == "passes" else None)
    estimate = made.estimate(IMAGES, "the test")
    assert ("stage by stage" in estimate.way) == (way == "staged")
    assert (estimate.num_images, estimate.num_voxels, len(estimate.statistics)) == (3, 6 * 256, 2)
    slices = torch.cat([image.transpose(0, 1) for image in IMAGES])
    for weights, found in zip(made.weights, estimate.statistics, strict=True):
        network.load_state_dict(weights)
        for key, value in statistics_of_one_batch(network, slices).items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-10)
        assert found.keys() == {key for key in weights if key.endswith(("running_mean", "running_var"))}


def test_both_ways_are_announced_before_they_start(caplog):
    """With what it takes; and in tiles with the reason."""
    caplog.set_level(logging.INFO, "nnunet_norm")
    estimator(unet(STRIDES)).estimate(IMAGES, "folder, 3 images")
    estimator(randomized(UnknownToStages())).estimate(IMAGES[:1], "that")
    staged, tiled = caplog.messages
    assert staged.startswith(
        "statistics of folder, 3 images: 1.54e+03 voxels; stage by stage, all norms in one pass over "
    )
    assert "; scratch at most " in staged
    assert "in memory, in all about " in staged
    assert "in 1 tiles of at most 16 x 16, one pass per norm (1); what is padded at borders of tiles counts; " in tiled
    assert "; because this network cannot be run stage by stage: " in tiled


def test_images_that_are_no_multiple_of_the_stride_are_padded_as_in_prediction():
    """A population of one image has the statistics with which --population image predicts it."""
    network, image = unet(STRIDES), IMAGE[:, :1]
    made = estimator(network)
    (found,) = made.estimate([image], "one").statistics
    network.load_state_dict({**made.weights[0], **found})
    expected = predictor(network, PATCH, population="image").predict_sliding_window_return_logits(image)
    assert (whole(network, image) - expected).abs().max() < 1e-9


def test_scratch_of_the_estimate_lies_on_the_disk_and_is_gone_afterwards(tmp_path, monkeypatch):
    """All images together do not fit into memory: with --scratch they are run stage by stage nevertheless."""
    monkeypatch.setattr(ways, "ALLOCATOR_BYTES", 0)
    monkeypatch.setattr(ways, "anonymous_memory", lambda: 0)
    in_memory = estimator(unet(STRIDES)).estimate(IMAGES, "x").statistics
    made = estimator(unet(STRIDES), max_memory=2**18, scratch=tmp_path)
    estimate = made.estimate(IMAGES, "x")
    assert "stage by stage" in estimate.way
    assert visible(tmp_path) == []
    for weights in made.weights:
        assert all(torch.equal(weights[key], made.weights[0][key]) for key in weights)
    assert in_memory[0].keys() == estimate.statistics[0].keys()
    made.wishes = Wishes("auto", "batch", None, 2**14, False)
    assert "tiles" in made.estimate(IMAGES, "x").way


def test_an_estimate_that_is_not_finite_is_refused():
    """With the population's name; the model's weights are as they were."""
    made = estimator(unet(STRIDES))
    before = {key: value.clone() for key, value in made.weights[0].items()}
    for limit in (None, 1):
        made.wishes = Wishes("auto", "batch", None, limit, False)
        with pytest.raises(StatisticsError, match=r"^plate 7: the mean of . channels before norm .* is not finite"):
            made.estimate([*IMAGES, torch.full_like(IMAGES[0], float("inf"))], "plate 7")
    assert all(torch.equal(before[key], value) for key, value in made.weights[0].items())


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (unet(STRIDES, norm=NO_NORM), "this network has no norm, so a population makes no difference"),
        (
            convert_norm(unet(STRIDES), "group_norm"),
            r"norm \(GroupNorm\) cannot have stored statistics.*--population image",
        ),
    ],
    ids=["no norm", "GroupNorm"],
)
def test_networks_that_cannot_have_stored_statistics_are_refused(network, expected):
    """When they are handed over."""
    with pytest.raises(StatisticsError, match=expected):
        predictor(network, PATCH, population="batch")


@pytest.mark.parametrize("population", ["image", "tile"])
def test_a_network_that_is_handed_over_keeps_its_statistics(population):
    """And what predicts shares its parameters, so that weights that are loaded later count."""
    network = unet(STRIDES)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    made = predictor(network, PATCH, population=population)
    made.predict_logits_from_preprocessed_data(IMAGE)
    assert made.bare_network is not network
    assert all(tracks_statistics(norm) for norm in find_norms(network).values())
    assert not any(tracks_statistics(norm) for norm in find_norms(made.bare_network).values())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    shared = dict(made.bare_network.named_parameters())
    assert all(shared[name] is parameter for name, parameter in network.named_parameters())


@pytest.mark.parametrize("norm", ["batch_norm", "batch_renorm", "instance_norm_tracked", "ghost_batch_norm"])
def test_population_image_is_a_batch_of_one_in_train_mode(norm):
    """Every slice by itself, mirrored or not, stage by stage: what BatchNorm in train mode makes of it."""
    network = randomized(convert_norm(unet(STRIDES), norm))
    made = predictor(network, PATCH, population="image", mirror_axes=(0,))
    found = made.predict_logits_from_preprocessed_data(IMAGE)
    assert (made.record()["plan"], made.record()["population"]) == ("stages", "image")
    train = convert_norm(network, "batch_norm").train()
    for norm_ in find_norms(train).values():
        norm_.momentum = 0.0
    assert (found - whole(train, IMAGE, (0,))).abs().max() < 1e-9


def test_population_tile_is_every_tile_in_train_mode():
    """The statistics of the mini-batch at inference; what the halo cuts away counts for them."""
    network = unet(STRIDES)
    made = predictor(network, PATCH, population="tile", halo=4)
    found = made.predict_logits_from_preprocessed_data(IMAGE[:, :1])
    assert (made.record()["plan"], made.record()["population"]) == ("tiles", "tile")
    train = without_statistics(network).train()
    padded = nn.functional.pad(IMAGE[:, 0], (0, 2, 0, 3))
    for tile in made.last_plan.tiles:
        logits = train(padded[(slice(None), *tile.read)][None])[0]
        place = tuple(slice(s.start, min(s.stop, n)) for s, n in zip(tile.write, (41, 30), strict=True))
        core = tuple(slice(c.start, c.start + p.stop - p.start) for c, p in zip(tile.core, place, strict=True))
        assert (found[(slice(None), 0, *place)] - logits[(slice(None), *core)]).abs().max() < 1e-9


def test_options_of_populations_that_do_not_go_together_are_refused(tmp_path):
    """One line each, with the option that is missing or too many."""
    for population in (None, "stored", "image"):
        with pytest.raises(TilingError, match="--batches is for --population batch, and --population"):
            HaloPredictor(device=torch.device("cpu"), population=population, batches=BATCHES)
    with pytest.raises(TilingError, match="--controls are those of --batches, which is not given"):
        HaloPredictor(device=torch.device("cpu"), population="batch", controls=True)
    with pytest.raises(ExperimentalBatchesError, match=r"none\.json cannot be read"):
        HaloPredictor(device=torch.device("cpu"), population="batch", batches=tmp_path / "none.json")


def test_a_batch_is_that_of_files():
    """Without files there is no population, and the statistics of the training are not taken for one."""
    made = predictor(unet(STRIDES), PATCH, population="batch")
    with pytest.raises(TilingError, match="population 'batch' is that of the files that predict_from_files is given"):
        made.predict_logits_from_preprocessed_data(IMAGE)
    made = predictor(unet(STRIDES, norm=INSTANCE_NORM), PATCH, population="batch")
    with pytest.raises(TilingError, match="population 'batch' is that of the files"):
        made.predict_sliding_window_return_logits(IMAGE)


def statistics_used(made):
    """First norm's statistics per fold; norms are not folded."""
    key = "encoder.stages.0.0.convs.0.norm.running_mean"
    return [weights[key].clone() for weights in made.list_of_parameters]


def test_the_folder_is_one_population_whatever_is_predicted(model, images, tmp_path):
    """In parts, and with cases that are there already; the record says so; a second call begins from the model's weights."""
    made = load(model, (0, 1), population="batch", fold_norms=False)
    predict(made, images, tmp_path / "out")
    used = statistics_used(made)
    record = record_of(tmp_path / "out")
    assert {case["population_of"] for case in record.values()} == {"folder, 4 images"}
    assert record["case_0"]["population_images"] == list(CASES)
    assert record["case_0"]["population"] == "batch"
    assert record["case_0"]["statistics"].startswith("stage by stage")
    (tmp_path / "out" / "case_1.nii.gz").unlink()
    predict(made, images, tmp_path / "out", overwrite=False)
    assert all(torch.equal(a, b) for a, b in zip(used, statistics_used(made), strict=True))
    for part in range(2):
        made.predict_from_files(str(images), str(tmp_path / "parts"), False, True, 0, 0, None, 2, part)
        assert all(torch.equal(a, b) for a, b in zip(used, statistics_used(made), strict=True))
    for name in CASES:
        both = [segmentation(tmp_path / where / f"{name}.nii.gz") for where in ("out", "parts")]
        assert np.array_equal(*both)


def test_what_is_predicted_is_what_the_statistics_say(model, images, tmp_path):
    """Statistics of all images in one batch, by hand, put into the model: the same segmentations."""
    made = load(model, (0,), population="batch")
    predict(made, images, tmp_path / "out")
    by_hand = load(model, (0,), fold_norms=False)
    estimate = load(model, (0,), population="batch")
    with preprocessed_images(
        by_hand.preprocessing,
        {name: ([str(images / files[0])], None) for name, files in CASES.items()},
        scratch=tmp_path,
        workers=0,
        progress=False,
    ) as data:
        same = [image for image in data if image.shape[2] == 16]
        assert len(same) == 2
        (found,) = estimate.estimator.estimate(same, "x").statistics
        expected = statistics_of_one_batch(by_hand.bare_network, torch.stack(same))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
        (found,) = estimate.estimator.estimate(data, "x").statistics
    by_hand.list_of_parameters = [by_hand.list_of_parameters[0] | found]
    predict(by_hand, images, tmp_path / "by_hand")
    for name in CASES:
        mine, theirs = (segmentation(tmp_path / where / f"{name}.nii.gz") for where in ("out", "by_hand"))
        assert (mine != theirs).mean() < 1e-3  # one of them is folded


def test_experimental_batches_have_their_own_statistics(model, images, tmp_path):
    """Each as if its images were the folder; controls alone if wanted; results in the order of the cases."""
    made = load(model, population="batch", batches=BATCHES, fold_norms=True)
    predict(made, images, tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record["case_3"]["population_of"] == "experimental batch 'a', 2 images"
    assert record["case_2"]["population_images"] == ["case_0", "case_2"]
    assert record["case_0"]["folded_norms"] == 3
    for batch in ("a", "b"):
        members = [name for name in CASES if BATCHES.batches[name] == batch]
        alone = tmp_path / batch
        alone.mkdir()
        for name in members:
            (alone / f"{name}_0000.nii.gz").symlink_to(images / f"{name}_0000.nii.gz")
        predict(load(model, population="batch"), alone, tmp_path / f"out_{batch}")
        for name in members:
            both = [segmentation(tmp_path / where / f"{name}.nii.gz") for where in ("out", f"out_{batch}")]
            assert np.array_equal(*both)
    returned = predict(load(model, population="batch", batches=BATCHES), images, None)
    for name, result in zip(CASES, returned, strict=True):
        assert np.array_equal(result, segmentation(tmp_path / "out" / f"{name}.nii.gz"))
    controls = load(model, population="batch", batches=BATCHES, controls=True)
    predict(controls, images, tmp_path / "controls")
    assert record_of(tmp_path / "controls")["case_0"]["population_images"] == ["case_2"]


def test_statistics_of_a_batch_are_for_tiles_too(model, images, tmp_path):
    """They do not depend on the execution; limits of memory and disk are for the estimate, then."""
    options = {"population": "batch", "use_mirroring": False}
    tiles = {
        "execution": "tiles",
        "tile_size": 16,
        "halo": "exact",
        "scratch": tmp_path / "scratch",
        "max_memory": 2**40,
    }
    predict(load(model, **options), images, tmp_path / "stages")
    predict(load(model, **options, **tiles), images, tmp_path / "tiles")
    how = record_of(tmp_path / "tiles")["case_1"]
    assert (how["plan"], how["population"]) == ("tiles", "batch")
    for name in CASES:
        both = [segmentation(tmp_path / where / f"{name}.nii.gz") for where in ("stages", "tiles")]
        assert (both[0] != both[1]).mean() < 1e-3


def test_nothing_is_written_if_a_population_cannot_be_used(model, images, tmp_path):
    """A case that the file does not know, and one that is not finite: before any image is predicted."""
    known = ExperimentalBatches({"case_0": "b"})
    with pytest.raises(
        ExperimentalBatchesError, match="3 of 4 cases have no experimental batch: case_1, case_2, case_3"
    ):
        predict(load(model, population="batch", batches=known), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_image(images, "case_3_0000", value=float("nan"))
    with pytest.raises(InputImageError, match=r"1 of 2 images of the population cannot be used: .*case_3.*mend them"):
        predict(
            load(model, population="batch", batches=BATCHES, scratch=tmp_path / "scratch"), images, tmp_path / "out"
        )
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert visible(tmp_path / "scratch") == []


def test_an_empty_population_is_refused(model, tmp_path):
    """Before a folder for it is made."""
    empty = preprocessed_images(load(model).preprocessing, {}, scratch=tmp_path, workers=0, progress=False)
    with pytest.raises(StatisticsError, match="the population is empty: give at least one image"), empty:
        pass


def domains(plan):
    """Statistics per experimental batch in the plans: one more than was trained on."""
    plan["configurations"]["3d_fullres"]["nnunet_norm"] = {"domain_statistics": ["a", "new"]}


def test_a_model_with_statistics_per_domain_uses_those_that_it_has(tmp_path, images, caplog):
    """A batch that it was trained on has its own; one of which it has only the name, and one unknown to it, are estimated."""
    folder = write_trained(tmp_path / "model", "nnUNetTrainerBEN", folds=(0, 1), change=domains)
    for fold in (0, 1):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["network_weights"]["domain_statistics.num_batches"] = torch.tensor([7, 0])
        torch.save(checkpoint, path)
    batches = ExperimentalBatches({"case_0": "a", "case_1": "new", "case_2": "unknown", "case_3": "a"})
    caplog.set_level(logging.INFO, "nnunet_norm")
    made = load(folder, (0, 1), population="batch", batches=batches)
    predict(made, images, tmp_path / "out")
    record = record_of(tmp_path / "out")
    stored = "those of the training, which the model has stored"
    assert [record[name]["statistics"] == stored for name in CASES] == [True, False, False, True]
    assert record["case_0"]["population_images"] == []
    assert f"population batch: experimental batch 'a', 2 images; statistics: {stored}" in caplog.messages
    for weights, used in zip(made.estimator.weights, made.estimator.of_domain("a").statistics, strict=True):
        rows = weights["domain_statistics.mean"][0]
        first = used["encoder.stages.0.0.convs.0.norm.running_mean"]
        assert torch.equal(first, rows[: len(first)])
    assert made.estimator.of_domain("new") is None
    assert made.estimator.of_domain("unknown") is None


def test_the_statistics_of_the_training_are_not_those_of_controls(tmp_path, images):
    """They are of all images of a batch: where controls are asked for, the controls are estimated."""
    folder = write_trained(tmp_path / "model", "nnUNetTrainerBEN", change=domains)
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["network_weights"]["domain_statistics.num_batches"] = torch.tensor([7, 7])
    torch.save(checkpoint, path)
    batches = ExperimentalBatches(dict.fromkeys(CASES, "a"), frozenset(["case_1"]))
    predict(load(folder, population="batch", batches=batches, controls=True), images, tmp_path / "out")
    assert {tuple(one["population_images"]) for one in record_of(tmp_path / "out").values()} == {("case_1",)}


def test_instance_norm_gets_the_statistics_of_the_population(tmp_path, images):
    """Its affine parameters are kept; one image as population is that image's own statistics."""
    folder = write_trained(tmp_path / "model", "nnUNetTrainer")
    one = tmp_path / "one"
    one.mkdir()
    (one / "case_0_0000.nii.gz").symlink_to(images / "case_0_0000.nii.gz")
    not_mirrored = {"use_mirroring": False}  # a mirrored image has other statistics deep in a network with strides
    predict(load(folder, population="batch", **not_mirrored), one, tmp_path / "batch")
    predict(load(folder, **not_mirrored), one, tmp_path / "image")
    assert record_of(tmp_path / "image")["case_0"]["population"] == "image"
    assert record_of(tmp_path / "batch")["case_0"]["population"] == "batch"
    both = [segmentation(tmp_path / where / "case_0.nii.gz") for where in ("batch", "image")]
    assert (both[0] != both[1]).mean() < 1e-3
    predict(load(folder, population="batch", **not_mirrored), images, tmp_path / "four")
    assert (segmentation(tmp_path / "four" / "case_0.nii.gz") != both[0]).mean() > 1e-3
