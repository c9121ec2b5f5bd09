import inspect
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_networks import BATCH_NORM, INSTANCE_NORM, Chain, predictor, randomized, unet, whole
from torch import nn
from torch.nn import functional

from nnunet_norm.errors import ArchitectureError, InputImageError, TilingError
from nnunet_norm.layers import convert_norm
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.execution import Folds, Result
from nnunet_norm.prediction.tiles_plan import TilesPlan
from nnunet_norm.receptive_field import trace
from nnunet_norm.tiling import smallest_tile

TOLERANCE = 1e-12

in_both_ways = pytest.mark.parametrize("execution", ["stages", "tiles"])

NETWORKS = {
    "2d": unet([(1, 1), (2, 2), (2, 2)]),
    "2d anisotropic": unet([(1, 1), (1, 2), (2, 2)], channels=2),
    "2d residual": unet([(1, 1), (2, 2)], residual=True),
    "2d BatchRenorm": randomized(convert_norm(unet([(1, 1), (2, 2)]), "batch_renorm")),
    "2d no change of resolution": randomized(Chain()),
    "3d": unet([(1, 1, 1), (2, 2, 2)]),
    "3d anisotropic": unet([(1, 1, 1), (1, 2, 1)], channels=2, classes=3),
}
FIELDS = {name: trace(network) for name, network in NETWORKS.items()}
CHANNELS = {"2d anisotropic": 2, "3d anisotropic": 2}


@st.composite
def predictions(draw, ndim):
    """A network with fixed statistics, an image, mirrored axes, and a tile and halo that fulfil the condition."""
    name = draw(st.sampled_from([name for name, field in FIELDS.items() if len(field.stride) == ndim]))
    field = FIELDS[name]
    mirrored = draw(st.lists(st.sampled_from(range(ndim)), unique=True, max_size=2))
    if draw(st.booleans()):
        halo = "exact"
        needed = [
            tuple(-(-side // s) * s for side in pair) for pair, s in zip(field.aligned, field.stride, strict=True)
        ]
        needed = [(max(pair),) * 2 if axis in mirrored else pair for axis, pair in enumerate(needed)]
    else:
        halo = [max(pair) + draw(st.integers(0, 3)) for pair in field.any_voxel]
        needed = halo
    smallest = smallest_tile(needed, field.stride)
    tile = [t + s * draw(st.integers(0, 2)) for t, s in zip(smallest, field.stride, strict=True)]
    long = draw(st.integers(0, ndim - 1))  # one axis of several tiles, the others of up to two
    shape = [draw(st.integers(1, 3 * t if axis == long else t + 3)) for axis, t in enumerate(tile)]
    slices = [draw(st.integers(1, 2))] if ndim == 2 else []
    return name, [CHANNELS.get(name, 1), *slices, *shape], mirrored, tile, halo


def compare_with_the_whole_image(prediction, seed):
    """Predict noise in tiles and in one pass."""
    name, shape, mirrored, tile, halo = prediction
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tiled = predictor(NETWORKS[name], tile, mirror_axes=tuple(mirrored), tile_size=tile, halo=halo)
    result = tiled.predict_sliding_window_return_logits(image)
    assert tiled.last_plan.decision.exact
    assert result.dtype == torch.float64
    assert (result - whole(NETWORKS[name], image, mirrored)).abs().max() < TOLERANCE


@given(predictions(2), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_tiled_result_is_that_of_the_whole_image_in_2d(prediction, seed):
    """Fixed statistics, aligned tiles and a sufficient halo give the whole-image result, whatever the shapes."""
    compare_with_the_whole_image(prediction, seed)


@given(predictions(3), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_tiled_result_is_that_of_the_whole_image_in_3d(prediction, seed):
    """The same in three dimensions."""
    compare_with_the_whole_image(prediction, seed)


@pytest.mark.parametrize("less", [(0, 0), (1, 0), (0, 1)])
def test_a_halo_one_voxel_too_small_shows(less):
    """The comparison can fail: one voxel less than the reach, before or after, changes the result; none less does not."""
    network, field = NETWORKS["2d no change of resolution"], FIELDS["2d no change of resolution"]
    image = torch.randn(1, 1, 1, 60, dtype=torch.float64)
    before, after = field.aligned[1]
    exact = predictor(network, (1, 1), tile_size=(8, before + after + 5), halo="exact").plan(image)
    assert exact.decision.halo == ((0, 0), (before, after))
    cut = TilesPlan(replace(exact.decision, halo=((0, 0), (before - less[0], after - less[1]))), exact.shape)
    result = Result(image.shape[1:])
    with torch.no_grad():
        cut.run(Folds(network), image, result)
    difference = (result.logits - whole(network, image, ())).abs().max()
    assert difference < TOLERANCE if less == (0, 0) else difference > 1e-6


def test_a_halo_one_stride_too_small_shows():
    """The same for a U-Net: the aligned reach rounded up, less one stride, is not enough, and it is said."""
    network, field = NETWORKS["2d"], FIELDS["2d"]
    enough = -(-max(field.aligned[1]) // 4) * 4
    image = torch.randn(1, 1, 16, 120, dtype=torch.float64)
    small = predictor(network, (16, 16), tile_size=(16, 2 * enough), halo=(0, enough - 4))
    difference = (small.predict_sliding_window_return_logits(image) - whole(network, image, ())).abs().max()
    assert not small.last_plan.decision.exact
    assert difference > 1e-6


def test_tiles_of_their_own_statistics_are_said_not_to_be_seamless(caplog):
    """InstanceNorm: the line names the layer and the reason, once per image shape."""
    caplog.set_level(logging.INFO, "nnunet_norm")
    tiled = predictor(unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), (16, 16), population="tile")
    for _ in range(2):
        tiled.predict_sliding_window_return_logits(torch.randn(1, 1, 40, 16, dtype=torch.float64))
    (line,) = caplog.messages
    assert "not exact: no halo can make it seamless, because the statistics of encoder.stages.0.0.convs.0.norm" in line
    assert "image of 40 x 16 voxels: 4 tiles of at most 16 x 16" in line


@pytest.mark.parametrize("error", [ArchitectureError("the gradient vanishes"), torch.OutOfMemoryError("2 GiB missing")])
def test_without_an_effective_halo_half_of_the_tile_is_cut_away(error, monkeypatch, caplog):
    """A finished training is validated whatever the gradients are; who asks for that halo by name is refused."""
    caplog.set_level(logging.INFO, "nnunet_norm")
    monkeypatch.setattr("nnunet_norm.prediction.measured_halo.effective", lambda *_: raise_(error))
    network, image = unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), torch.randn(1, 1, 40, 16, dtype=torch.float64)
    tiled = predictor(network, (16, 16), population="tile")
    tiled.predict_sliding_window_return_logits(image)
    assert tiled.last_plan.decision.source == ("half of the tile", "none needed")
    assert tiled.last_plan.decision.halo == ((4, 4), (0, 0))
    assert f"no effective halo ({error}): half of the tile is cut away instead" in caplog.messages
    with pytest.raises(TilingError, match=f"no effective halo: {error}; choose --halo in voxels"):
        predictor(network, (16, 16), halo="erf", population="tile").predict_sliding_window_return_logits(image)


def test_the_effective_halo_is_measured_once_for_the_same_weights(monkeypatch):
    """It costs a dozen tiles; the weights of another fold have one of their own."""
    measured = []
    monkeypatch.setattr(
        "nnunet_norm.prediction.measured_halo.effective", lambda *_: measured.append(1) or ((3, 3), (3, 3))
    )
    network, image = unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), torch.randn(1, 1, 40, 16, dtype=torch.float64)
    tiled = predictor(network, (16, 16), population="tile")
    for _ in range(2):
        tiled.predict_sliding_window_return_logits(image)
    assert len(measured) == 1
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    tiled.predict_sliding_window_return_logits(image)
    assert len(measured) == 2


@in_both_ways
def test_images_are_taken_in_the_precision_of_the_network(execution):
    """Arrays of NumPy are float64 where nobody says otherwise."""
    made = predictor(unet([(1, 1), (2, 2)]).float(), (8, 8), execution=execution)
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    expected = made.predict_sliding_window_return_logits(image.float())
    assert torch.equal(made.predict_sliding_window_return_logits(image), expected)


@in_both_ways
def test_an_empty_image_is_refused(execution):
    """Not left to an assertion."""
    with pytest.raises(InputImageError, match=r"image of shape \(1, 0, 8, 8\) is empty"):
        predictor(unet([(1, 1), (2, 2)]), (8, 8), execution=execution).predict_sliding_window_return_logits(
            torch.zeros(1, 0, 8, 8)
        )


@pytest.mark.parametrize("edge", [8, 40])
@in_both_ways
def test_the_precision_of_the_network_is_told_apart_from_that_of_the_result(execution, edge):
    """Under autocast logits are half, whatever they are converted to for averaging."""
    made = predictor(unet([(1, 1), (2, 2)]).float(), (8, 8), execution=execution)
    image = torch.randn(1, 1, edge, edge)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made.predict_sliding_window_return_logits(image).dtype == torch.float32
    assert made.network_dtype == torch.bfloat16
    made.predict_sliding_window_return_logits(image)
    assert made.network_dtype == torch.float32


def test_small_image_with_tile_statistics_is_padded_to_the_tile():
    """One voxel through InstanceNorm gives what the patch with zeros around gives, as in training."""
    network = unet([(1, 1), (2, 2)], norm=INSTANCE_NORM)
    image = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    result = predictor(network, (8, 8), population="tile").predict_sliding_window_return_logits(image)
    with torch.no_grad():
        expected = network(functional.pad(image[:, 0], (0, 7, 0, 7))[None])[0, :, None, :1, :1]
    assert torch.equal(result, expected)


def test_tile_of_one_stride_with_tile_statistics_has_a_variance():
    """A tile that would leave one element at the bottom, which InstanceNorm refuses, is enlarged."""
    tiled = predictor(unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), (8, 8), tile_size=(1,), halo=0, population="tile")
    tiled.predict_sliding_window_return_logits(torch.randn(1, 1, 4, 4, dtype=torch.float64))
    assert tiled.last_plan.decision.tile_size == (2, 4)


@pytest.mark.parametrize("population", ["image", "tile"])
def test_one_patch_is_what_nnunet_predicts(population):
    """An image of one patch, mirrored: nnU-Net's result, which it keeps in half precision (11 significant bits)."""
    network = unet([(1, 1), (2, 2)], norm=INSTANCE_NORM).float()
    image = torch.randn(1, 2, 16, 16)
    ours = predictor(network, (16, 16), mirror_axes=(0, 1), population=population)
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.__dict__.update({name: value for name, value in ours.__dict__.items() if name in vars(theirs)})
    theirs.label_manager = SimpleNamespace(num_segmentation_heads=2)
    theirs.use_gaussian = False  # its weights underflow in the corners: there logits are off by percents
    expected = theirs.predict_sliding_window_return_logits(image).float()
    result = ours.predict_sliding_window_return_logits(image)
    assert result.dtype == torch.float32
    assert torch.allclose(result, expected, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize(("norm", "population"), [(BATCH_NORM, "stored"), (INSTANCE_NORM, "tile")])
def test_folds_are_averaged_in_tiles(norm, population):
    """Two sets of weights give the mean of their results, also where the effective halo is measured in between."""
    options = {"execution": "tiles", "population": population}
    networks = [unet([(1, 1), (2, 2)], seed=seed, norm=norm) for seed in (1, 2)]
    image = torch.randn(1, 1, 40, 10, dtype=torch.float64)
    singles = [
        predictor(network, (16, 16), **options).predict_sliding_window_return_logits(image) for network in networks
    ]
    ensemble = predictor(unet([(1, 1), (2, 2)], norm=norm), (16, 16), **options)
    ensemble.list_of_parameters = [network.state_dict() for network in networks]
    result = ensemble.predict_logits_from_preprocessed_data(image)
    assert (result - (singles[0] + singles[1]) / 2).abs().max() < TOLERANCE


@in_both_ways
def test_sums_are_not_half_precision(execution):
    """A network that computes in bfloat16 gives a float32 result whose mirrored mean was taken in float32."""
    network = unet([(1, 1), (2, 2)]).to(torch.bfloat16)
    image = torch.randn(1, 1, 8, 8).to(torch.bfloat16)
    made = predictor(network, (8, 8), mirror_axes=(0,), execution=execution)
    result = made.predict_sliding_window_return_logits(image)
    with torch.no_grad():
        passes = [network(image[:, 0][None].flip(axes)).flip(axes).float() for axes in ([], [2])]
    assert torch.equal(result[:, 0], ((passes[0] + passes[1]) / 2)[0])


@in_both_ways
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, torch.compile])
def test_wrapped_networks_are_unwrapped(wrap, execution):
    """The network inside DDP and torch.compile is called, without their own forward."""
    network = unet([(1, 1), (2, 2)])
    if wrap is nn.parallel.DistributedDataParallel:
        wrapped = wrap.__new__(wrap)
        nn.Module.__init__(wrapped)
        wrapped.module = network
    else:
        wrapped = wrap(network)
    image = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    result = predictor(wrapped, (8, 8), execution=execution).predict_sliding_window_return_logits(image)
    assert (result - whole(network, image)).abs().max() < TOLERANCE


@pytest.mark.parametrize(("norm", "population"), [(BATCH_NORM, "stored"), (INSTANCE_NORM, "tile")])
def test_the_tiles_of_all_folds_are_one_plan(norm, population, monkeypatch):
    """That of the first fold's weights, and every tile goes through all folds before the next one is read."""
    measured, used = [], []
    monkeypatch.setattr(
        "nnunet_norm.prediction.measured_halo.effective",
        lambda network, _: measured.append(next(network.parameters()).clone()) or ((3, 3), (3, 3)),
    )
    networks = [unet([(1, 1), (2, 2)], seed=seed, norm=norm) for seed in (1, 2, 3)]
    image = torch.randn(1, 1, 40, 10, dtype=torch.float64)
    made = predictor(unet([(1, 1), (2, 2)], norm=norm), (16, 16), execution="tiles", population=population)
    made.list_of_parameters = [network.state_dict() for network in networks]
    real, numbers = made.bare_network.load_state_dict, [id(weights) for weights in made.list_of_parameters]
    monkeypatch.setattr(
        made.bare_network, "load_state_dict", lambda weights: used.append(numbers.index(id(weights))) or real(weights)
    )
    made.predict_logits_from_preprocessed_data(image)
    assert made.last_plan.decision.tiles > 1
    assert used == [0, 1, 2] * made.last_plan.decision.tiles
    assert len(measured) == (1 if population == "tile" else 0)
    assert all(torch.equal(weights, next(networks[0].parameters())) for weights in measured)


@in_both_ways
def test_progress_is_told_and_the_result_stays_where_it_was_asked_for(execution):
    """One step per tile whatever is averaged there, or per block and fold; the logits are in the memory of the CPU."""
    network, image, calls = unet([(1, 1), (2, 2)]), torch.randn(1, 2, 40, 36, dtype=torch.float64), []
    made = predictor(network, (16, 16), mirror_axes=(0, 1), execution=execution)
    plan, result = made.plan(image), Result(image.shape[1:])
    with torch.inference_mode():
        plan.run(Folds(network, 3), image, result, lambda: calls.append(1))
    assert len(calls) == plan.steps(3)
    assert plan.steps(3) == (plan.decision.tiles if execution == "tiles" else 2 * 4 * 3 * plan.schedule.steps)
    assert result.logits.device == torch.device("cpu")


@pytest.mark.parametrize("on_device", [True, False])
def test_a_tile_that_does_not_fit_into_memory_is_refused(on_device):
    """OutOfMemoryError is one line with the remedy, at any tile and wherever scratch may lie; others are left as they are."""
    network, image = unet([(1, 1), (2, 2)]), torch.randn(1, 1, 40, 8, dtype=torch.float64)
    tiled = predictor(network, (8, 8), execution="tiles", tile_size=(16, 8), halo=(4, 0))
    tiled.perform_everything_on_device = on_device
    tiled.predict_sliding_window_return_logits(image)  # reads the network, and measures what the halo does
    tiles = tiled.last_plan.decision.tiles
    assert tiles > 2
    for number in range(tiles):
        errors = [None] * number + [torch.OutOfMemoryError("CUDA out of memory")]
        hook = network.register_forward_pre_hook(lambda *_, left=errors: raise_(left.pop(0)))
        with pytest.raises(
            TilingError, match=rf"memory is too small \(image of 40 x 8 voxels: {tiles} tiles .*choose a smaller --tile"
        ) as refused:
            tiled.predict_sliding_window_return_logits(image)
        hook.remove()
        assert "\n" not in str(refused.value)
        assert isinstance(refused.value.__cause__, torch.OutOfMemoryError)
        assert errors == []
    hook = network.register_forward_pre_hook(lambda *_: raise_(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        tiled.predict_sliding_window_return_logits(image)
    hook.remove()


def raise_(error):
    if error is not None:
        raise error


@in_both_ways
def test_values_that_are_not_finite_are_refused(execution):
    """NaN in the image, and infinity from the network, are errors and no labels."""
    network = unet([(1, 1), (2, 2)])
    image = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    image[0, 0, 0, 0] = torch.nan
    made = predictor(network, (8, 8), execution=execution)
    with pytest.raises(InputImageError, match="the preprocessed image has 1 values that are not finite"):
        made.predict_sliding_window_return_logits(image)
    with pytest.raises(InputImageError, match="the preprocessed image has 1 values that are not finite"):
        made.predict_logits_from_preprocessed_data(image)
    network.decoder.seg_layers[-1].bias.data.fill_(torch.inf)
    with pytest.raises(InputImageError, match=r"the network's output .* has 128 values that are not finite"):
        made.predict_sliding_window_return_logits(torch.ones_like(image))


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ({"halo": "large"}, "halo 'large' is unknown: choose auto, exact, erf or a number of voxels$"),
        ({"execution": "blocks"}, "execution 'blocks' is unknown: choose auto, stages, tiles$"),
        ({"population": "plate"}, "population 'plate' is unknown: choose stored, image, tile, batch$"),
    ],
)
def test_an_unknown_word_is_refused(option, choices):
    """The choices are named."""
    with pytest.raises(TilingError, match=choices):
        HaloPredictor(device=torch.device("cpu"), **option)


def test_constructor_is_nnunets():
    """nnU-Net's parameters come first, in its order and with its defaults; ours are keyword-only."""
    theirs = [(p.name, p.default) for p in inspect.signature(nnUNetPredictor).parameters.values()]
    ours = list(inspect.signature(HaloPredictor).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == theirs
    assert [(p.name, p.kind.name) for p in ours[len(theirs) :]] == [
        ("tile_size", "KEYWORD_ONLY"),
        ("halo", "KEYWORD_ONLY"),
        ("execution", "KEYWORD_ONLY"),
        ("population", "KEYWORD_ONLY"),
        ("batches", "KEYWORD_ONLY"),
        ("controls", "KEYWORD_ONLY"),
        ("scratch", "KEYWORD_ONLY"),
        ("max_memory", "KEYWORD_ONLY"),
        ("fold_norms", "KEYWORD_ONLY"),
        ("trust_checkpoint", "KEYWORD_ONLY"),
    ]
