import json

import pytest

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.halo import decide, tile_shape
from nnunet_norm.receptive_field import ReceptiveField


def field(*reach, stride=32, any_voxel=None, tile_statistics=(), unbounded=None):
    """A receptive field with one (before, after) per axis."""
    return ReceptiveField((stride,) * len(reach), reach, any_voxel or reach, tile_statistics, unbounded)


def never():
    raise AssertionError("the effective field was measured without need")


def choose(shape, receptive, tile, effective=never, **options):
    return decide(shape, receptive, tile, effective=effective, **options)


def test_exact_halo_is_taken_where_it_fits():
    """The aligned reach, rounded up to the stride per side, if the core is still half of the tile."""
    decision = choose((1000,), field((44, 37), stride=8), (256,))
    assert (decision.tile_size, decision.halo, decision.source) == ((256,), ((48, 40),), ("theoretical",))
    assert decision.exact
    assert decision.reason == "statistics are fixed and the halo covers the theoretical receptive field"


def test_tile_that_the_user_did_not_choose_grows_up_to_twice():
    """With fixed statistics the tile does not matter, so it becomes 2 (before + after); a chosen one stays."""
    small = field((44, 37), stride=8)
    assert choose((1000,), small, (96,)).tile_size == (176,)
    assert choose((1000,), small, (96,), tile_is_given=True).tile_size == (96,)
    assert choose((1000,), small, (96,), tile_is_given=True).exact  # one stride of core is enough then


def test_image_that_fits_the_enlarged_tile_needs_no_halo():
    """An axis that one tile can hold is one tile, even where the halo would not fit."""
    decision = choose((180, 1000), field((159, 128), (5, 4), stride=32), (96, 128))
    assert (decision.tile_size, decision.halo) == ((192, 128), ((0, 0), (32, 32)))
    assert decision.source == ("none needed", "theoretical")
    assert decision.exact


def test_effective_halo_where_the_exact_one_does_not_fit():
    """Six stages and a patch of 128: the effective halo, capped at half a tile, and what exactness would need."""
    decision = choose((1000,), field((159, 128)), (128,), lambda: ((20, 25),))
    assert (decision.halo, decision.source, decision.exact) == (((20, 25),), ("effective",), False)
    assert decision.reason == "the exact halo before/after per axis is 160/128 (--tile-size at least 320)"
    assert choose((1000,), field((159, 128)), (128,), lambda: ((90, 30),)).halo == ((48, 16),)


def test_effective_halo_is_never_larger_than_the_exact_one():
    """Where the Gaussian reaches beyond the theoretical reach, that is enough, and exact."""
    decision = choose((1000,), field((5, 4), stride=8), (64,), lambda: ((30, 30),), halo="erf")
    assert decision.halo == ((8, 8),)
    assert decision.exact


def test_mirrored_axes_have_the_larger_halo_on_both_sides():
    """Per axis, for the theoretical and the effective halo."""
    uneven = field((44, 37), (44, 37), stride=4)
    assert choose((1000, 1000), uneven, (256, 256), mirror_axes=(1,)).halo == ((44, 40), (44, 44))
    effective = choose((1000, 1000), uneven, (256, 256), lambda: ((3, 7), (3, 7)), halo="erf", mirror_axes=(0,))
    assert effective.halo == ((7, 7), (3, 7))


def test_tile_statistics_are_never_exact_and_never_enlarge_the_tile():
    """Only an image that is one tile is: then there is no seam. The reason names the first layer."""
    instance = field((5, 4), stride=8, tile_statistics=("a.norm", "b.norm"))
    decision = choose((1000,), instance, (16,), lambda: ((2, 2),))
    assert (decision.tile_size, decision.exact, decision.statistics) == ((16,), False, "tile")
    assert decision.reason.startswith(
        "no halo can make it seamless, because the statistics of a.norm and 1 more depend"
    )
    assert choose((9,), instance, (16,)).exact


def test_unbounded_networks_are_not_exact():
    """Global pooling: the effective halo, and the layer's name."""
    decision = choose((1000,), field((0, 0), unbounded="head.pool"), (128,), lambda: ((9, 9),))
    assert decision.halo == ((9, 9),)
    assert decision.reason == "no halo can make it exact, because head.pool sees the whole tile"


@pytest.mark.parametrize(
    ("halo", "exact"),
    [
        pytest.param(160, True, id="aligned, on the grid"),
        pytest.param(170, True, id="aligned, after rounding down to the grid"),
        pytest.param(159, False, id="aligned, off the grid"),
        pytest.param(188, True, id="any voxel"),
    ],
)
def test_given_halo_is_judged(halo, exact):
    """A halo off the grid must be the reach of any voxel, unless it covers the aligned reach after rounding down."""
    decision = choose((2000,), field((159, 128), any_voxel=((188, 157),)), (512,), halo=halo)
    assert (decision.exact, decision.source) == (exact, ("given",))


@pytest.mark.parametrize("image", [(50,), (1000,)])
def test_halo_larger_than_the_tile_is_refused(image):
    """Whatever the image, in one line with both remedies."""
    with pytest.raises(
        TilingError, match=r"halo 60 leaves no core of a tile of 128 on axis 0 .* at most 48 .* least 160"
    ):
        choose(image, field((5, 4)), (128,), halo=60, tile_is_given=True)


def test_exact_halo_that_does_not_fit_is_refused():
    """With the tile size that it needs; and where no halo is exact, with the reason."""
    with pytest.raises(
        TilingError, match=r"'exact' does not fit tiles of 128: .* 160/128 \(--tile-size at least 320\)"
    ):
        choose((1000,), field((159, 128)), (128,), halo="exact")
    with pytest.raises(TilingError, match=r"'exact' does not exist for this network: .* a.norm"):
        choose((1000,), field((5, 4), tile_statistics=("a.norm",)), (128,), halo="exact")


def test_tiles_are_counted_over_slices():
    """A stack of 7 slices, 3 tiles each."""
    decision = choose((100, 250), field((5, 4), (5, 4), stride=8), (128, 128), slices=7)
    assert decision.tiles == 7 * 3


def test_tile_size_is_corrected_upwards_and_said():
    """To a multiple of the total stride; the patch silently, the user's choice with a line."""
    assert tile_shape(None, (60, 70), field((5, 4), (5, 4), stride=8)) == ((64, 72), None)
    tile, line = tile_shape([60], (1, 1), field((5, 4), (5, 4), stride=8))
    assert tile == (64, 64)
    assert line == "tile size 60 x 60 is corrected upwards to 64 x 64: the total stride is 8 x 8"


@pytest.mark.parametrize("wrong", [(1, 2, 3), (0,), (-5, 8)])
def test_tile_size_must_suit_the_axes(wrong):
    """A number of axes that the network does not have, or no extent."""
    with pytest.raises(TilingError, match=r"tile size .* does not suit a network with 2 spatial axes"):
        tile_shape(wrong, (8, 8), field((5, 4), (5, 4)))


def test_decision_goes_into_json():
    """The record has the plan's name and everything that was decided."""
    decision = choose((1000,), field((44, 37), stride=8), (256,))
    assert json.loads(json.dumps(decision.as_dict())) == {
        "plan": "tiles",
        "image_shape": [1000],
        "stride": [8],
        "tile_size": [256],
        "halo": [[48, 40]],
        "source": ["theoretical"],
        "exact": True,
        "reason": decision.reason,
        "statistics": "fixed",
        "tiles": 6,
        "measured_error": None,
    }


def test_a_tile_that_was_chosen_for_the_image_stays():
    """It neither grows nor is refused for a halo that an axis in one piece does not need; the words of halos stay."""
    reach = field((44, 37), (44, 37), stride=8)
    decision = choose((1000, 60), reach, (176, 64), automatic=True, halo=60)
    assert (decision.tile_size, decision.halo) == ((176, 64), ((60, 60), (0, 0)))
    assert choose((1000, 60), reach, (96, 64), lambda: ((5, 5),) * 2, automatic=True).halo == ((5, 5), (0, 0))
    assert choose((1000, 60), reach, (96, 64), automatic=True, halo="exact").halo == ((48, 40), (0, 0))


@pytest.mark.parametrize(
    ("tile", "halo", "source"),
    [
        ((128,), 32, "two tokens"),
        ((96,), 32, "two tokens"),
        ((80,), 16, "two tokens, or half of the tile"),
        ((64,), 16, "two tokens, or half of the tile"),
        ((48,), 8, "two tokens, or half of the tile"),
        ((32,), 8, "two tokens, or half of the tile"),
    ],
)
def test_a_transformer_has_a_halo_of_two_tokens_where_a_third_of_the_tile_is_left(tile, halo, source):
    """32 voxels for UNETR's tokens of 16; in smaller tiles half of them; never exact, and the tile never grows."""
    transformer = one_extent(tile)
    decision = choose((1000,), transformer, tile)
    assert (decision.tile_size, decision.halo, decision.source) == (tile, ((halo, halo),), (source,))
    assert not decision.exact
    assert decision.reason == "no halo can make it exact, because attention sees the whole tile"


def test_a_network_of_one_extent_takes_no_other_tile():
    """Also a small image is one tile of that extent, and an explicit halo must fit it."""
    transformer = one_extent((64, 64))
    with pytest.raises(TilingError) as refusal:
        tile_shape((32, 32), (64, 64), transformer)
    assert str(refusal.value) == (
        "tile size 32 x 32 does not suit this network, which takes tiles of 64 x 64 alone, the patch that it was trained "
        "with: leave --tile-size out"
    )
    assert tile_shape((64,), (64, 64), transformer) == ((64, 64), None)
    small = choose((20, 40), transformer, (64, 64))
    assert (small.tile_size, small.tiles, small.exact) == ((64, 64), 1, True)
    given = choose((200, 200), transformer, (64, 64), halo=(4, 20))
    assert given.halo == ((4, 4), (20, 20))
    with pytest.raises(
        TilingError, match=r"halo 28 leaves no core of a tile of 64 on axis 0 .*choose --halo at most 24$"
    ):
        choose((200, 200), transformer, (64, 64), halo=28)
    with pytest.raises(TilingError, match=r"halo 'exact' does not exist for this network: .* sees the whole tile"):
        choose((200, 200), transformer, (64, 64), halo="exact")
    assert choose((200, 200), transformer, (64, 64), lambda: ((5, 9), (1, 2)), halo="erf").halo == ((5, 9), (1, 2))


def one_extent(tile):
    """The field of a transformer with a position embedding."""
    sides = ((0, 0),) * len(tile)
    return ReceptiveField((16,) * len(tile), sides, sides, (), "attention", tile)
