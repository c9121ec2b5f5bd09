"""Which plan predicts an image and with whose statistics; what memory and disk allow; what is refused."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from tiny_networks import INSTANCE_NORM, NO_NORM, UnknownToStages, noise, predictor, randomized, unet, whole
from torch import nn

from nnunet_norm.errors import TilingError
from nnunet_norm.layers import convert_norm
from nnunet_norm.prediction import StagesPlan, choice, planning_predictor, tiling_predictor, ways
from nnunet_norm.prediction.choice import Task, stages_or_reason
from nnunet_norm.prediction.memory import size
from nnunet_norm.prediction.ways import Wishes
from nnunet_norm.stages import read_network, read_verified

STRIDES = [(1, 1), (2, 2), (2, 2)]
PATCH = (16, 16)
IMAGE = noise(1, 2, 41, 30)


def converted(norm):
    return randomized(convert_norm(unet(STRIDES), norm))


NETWORKS = {
    "stored": unet(STRIDES),
    "BatchRenorm": converted("batch_renorm"),
    "tracked": converted("instance_norm_tracked"),
    "no norm": unet(STRIDES, norm=NO_NORM),
    "InstanceNorm": unet(STRIDES, norm=INSTANCE_NORM),
    "GroupNorm": converted("group_norm"),
    "unknown, stored": randomized(UnknownToStages()),
    "unknown, InstanceNorm": randomized(UnknownToStages(nn.InstanceNorm2d)),
    "global pooling, stored": randomized(UnknownToStages(pooled=True)),
    "global pooling, InstanceNorm": randomized(UnknownToStages(nn.InstanceNorm2d, pooled=True)),
}

ADDITION = r"this network cannot be run stage by stage: add.* has no rule for blocks: addition of a constant"
POOLING = r"this network cannot be run stage by stage: pool \(AdaptiveAvgPool2d: mean\) sees the whole image"
NO_USE = r"population '{}' is of no use: this network has no norm that takes statistics; leave --population out$"
NOT_STORED = (
    r"population 'stored' does not exist for this network: .*norm has no stored statistics; choose --population "
)
NO_TILES = r"execution 'stages' has no tiles, so --population tile needs --execution tiles \(or auto\)$"
NOT_POSSIBLE = r"execution 'stages' is not possible: {}; else choose --execution tiles{}$"
CHOOSE_TILE = "choose --population tile, as nnU-Net does with InstanceNorm$"
NOT_IN_TILES = r"tiles cannot use the whole image's statistics, and {}: leave that out, or " + CHOOSE_TILE
NOT_HAD = r"the whole image's statistics cannot be had: {}; else " + CHOOSE_TILE


def of_stored(reason, *, has_norms=True):
    """What comes of a network without norms of its own image; with a reason if it cannot be run stage by stage.

    Where other statistics are asked for, it is as if it had none stored.
    """
    stages = ("tiles", "stored") if reason else ("stages", "stored")
    asked = NOT_POSSIBLE.format(reason, "") if reason else stages
    default = {"auto": stages, "stages": asked, "tiles": ("tiles", "stored")}
    others = {word: of_image(reason)[word] for word in ("image", "tile")}
    no_use = {word: dict.fromkeys(default, NO_USE.format(word)) for word in others}
    return {None: default, "stored": default, **(others if has_norms else no_use)}


def of_image(reason):
    """What comes of a network that normalizes with the statistics of what it sees."""
    stages = ("stages", "image")
    default = {
        "auto": NOT_HAD.format(reason) if reason else stages,
        "stages": NOT_POSSIBLE.format(reason, " --population tile") if reason else stages,
        "tiles": NOT_IN_TILES.format("--execution tiles was chosen"),
    }
    tile = {"auto": ("tiles", "tile"), "stages": NO_TILES, "tiles": ("tiles", "tile")}
    not_stored = dict.fromkeys(default, NOT_STORED + "image, tile or batch$")
    return {None: default, "image": default, "stored": not_stored, "tile": tile}


OUTCOMES = {
    **{name: of_stored(None) for name in ("stored", "BatchRenorm", "tracked")},
    "no norm": of_stored(None, has_norms=False),
    **{name: of_image(None) for name in ("InstanceNorm", "GroupNorm")},
    "unknown, stored": of_stored(ADDITION),
    "unknown, InstanceNorm": of_image(ADDITION),
    "global pooling, stored": of_stored(POOLING),
    "global pooling, InstanceNorm": of_image(POOLING),
}

EVERY_COMBINATION = [
    pytest.param(name, population, execution, outcome, id=f"{name}-{population}-{execution}")
    for name, populations in OUTCOMES.items()
    for population, executions in populations.items()
    for execution, outcome in executions.items()
]


def test_every_network_kind_and_word_is_in_the_table():
    """The table below misses no combination."""
    assert set(OUTCOMES) == set(NETWORKS)
    single = set(choice.POPULATIONS) - {"batch"}  # which is not that of an image: tests/prediction/test_populations.py
    assert {frozenset(table) for table in OUTCOMES.values()} == {frozenset({None, *single})}
    assert {frozenset(row) for table in OUTCOMES.values() for row in table.values()} == {frozenset(choice.EXECUTIONS)}


@pytest.mark.parametrize(("name", "population", "execution", "outcome"), EVERY_COMBINATION)
def test_every_combination_is_honoured_and_recorded_or_refused(name, population, execution, outcome):
    """What was asked for is what the record says; else one line names what cannot be, and the option that can."""
    made = predictor(NETWORKS[name], PATCH, execution=execution, population=population)
    if isinstance(outcome, str):
        with pytest.raises(TilingError, match=outcome) as refused:
            made.predict_logits_from_preprocessed_data(IMAGE)
        assert "\n" not in str(refused.value)
        assert made.last_plan is None
        return
    made.predict_logits_from_preprocessed_data(IMAGE)
    record = json.loads(json.dumps(made.record()))
    assert (record["plan"], record["population"]) == outcome
    assert record["image_shape"] == [41, 30]


@pytest.mark.parametrize("name", ["stored", "InstanceNorm", "unknown, stored"])
def test_both_ways_to_predict_take_the_same_plan(name):
    """nnU-Net calls one of them in its validation, and the other in prediction."""
    one, other = (predictor(NETWORKS[name], PATCH) for _ in range(2))
    one.predict_logits_from_preprocessed_data(IMAGE)
    other.predict_sliding_window_return_logits(IMAGE)
    assert one.record() == other.record() == one.plan(IMAGE).as_dict()


@pytest.mark.parametrize("given", [{"tile_size": (16,)}, {"halo": 4}, {"halo": "exact"}, {"halo": "erf"}])
def test_tile_options_are_for_tiles(given):
    """Tile size and halo mean tiles: with stored statistics they are taken, with the image's refused."""
    tiled = predictor(NETWORKS["stored"], PATCH, **given)
    tiled.predict_sliding_window_return_logits(IMAGE)
    assert tiled.last_plan.as_dict()["plan"] == "tiles"
    assert tiled.last_plan.as_dict()["why_tiles"] == "--tile-size or --halo was given, which are for tiles"
    with pytest.raises(TilingError, match=r"--tile-size and --halo are for tiles: .*, or choose --execution tiles$"):
        predictor(NETWORKS["stored"], PATCH, execution="stages", **given).plan(IMAGE)
    with pytest.raises(TilingError, match=NOT_IN_TILES.format("--tile-size or --halo was given")):
        predictor(NETWORKS["InstanceNorm"], PATCH, **given).plan(IMAGE)
    if given != {"halo": "exact"}:
        own = predictor(NETWORKS["InstanceNorm"], PATCH, population="tile", **given).plan(IMAGE).as_dict()
        assert (own["plan"], own["population"]) == ("tiles", "tile")


def test_a_norm_that_is_stored_beside_one_that_is_not():
    """One InstanceNorm among stored norms decides: it has no stored statistics, which is said with its name."""
    mixed = randomized(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.BatchNorm2d(2), nn.ReLU()))
    made = predictor(mixed, PATCH)
    result = made.predict_sliding_window_return_logits(IMAGE)
    assert made.record()["population"] == "image"
    assert (result - whole(mixed, IMAGE)).abs().max() < 1e-9
    with pytest.raises(TilingError, match="'stored' does not exist for this network: 1 has no stored statistics"):
        predictor(mixed, PATCH, population="stored").plan(IMAGE)


# --- what is said before it starts ---


@pytest.mark.parametrize(
    ("name", "exactness"), [("stored", "halo is that of every stage"), ("InstanceNorm", "norms see")]
)
def test_stages_are_announced_in_one_line_with_what_they_take(name, exactness, caplog, tmp_path):
    """Scratch and where it lies, the result, memory, cost and reason: the numbers of the record, before anything runs."""
    caplog.set_level(logging.INFO, "nnunet_norm")
    for scratch, where in ((None, "in memory"), (tmp_path, "on the disk")):
        made = predictor(NETWORKS[name], PATCH, mirror_axes=(0, 1), scratch=scratch)
        caplog.clear()
        made.predict_logits_from_preprocessed_data(IMAGE)
        (line,) = caplog.messages
        record = made.record()
        assert f"image of 41 x 30 voxels x 2 slices: stage by stage, {record['pieces']} pieces" in line
        assert (
            f"statistics: {record['population']}; scratch at most {size(record['scratch_bytes'])} {where} and " in line
        )
        assert f"{size(record['result_bytes'])} for the result, in all about {size(record['memory_bytes'])} of" in line
        assert (
            f"first level {record['first_level']}; cost {record['passes']:.2f} passes over the image x 4 mirr" in line
        )
        assert f"exact: {exactness}" in line or f"exact: the {exactness}" in line


def test_tiles_are_announced_in_one_line_with_the_reason(caplog):
    """Which operator is not known, and the record has it too."""
    caplog.set_level(logging.INFO, "nnunet_norm")
    made = predictor(NETWORKS["unknown, stored"], PATCH)
    made.predict_logits_from_preprocessed_data(IMAGE)
    (line,) = caplog.messages
    assert "; in tiles because this network cannot be run stage by stage: add" in line
    assert made.record()["why_tiles"] in line


def test_a_network_is_read_once(monkeypatch):
    """Also where it is not known: the answer is kept."""
    calls = []
    monkeypatch.setattr(planning_predictor, "read_verified", lambda *a: calls.append(1) or read_verified(*a))
    for name in ("stored", "unknown, stored"):
        calls.clear()
        made = predictor(NETWORKS[name], PATCH)
        for _ in range(2):
            made.plan(IMAGE)
        assert len(calls) == 1


# --- memory and disk ---


@pytest.fixture
def exact_limits(monkeypatch):
    """This process has taken nothing yet, so that limits are what is written; blocks are as for larger images."""
    for module in (ways, tiling_predictor):
        monkeypatch.setattr(module, "anonymous_memory", lambda: 0)
        monkeypatch.setattr(module, "ALLOCATOR_BYTES", 0)
    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**18)
    monkeypatch.setattr(ways, "SMALLEST_BLOCK_BYTES", 2**16)


WIDE = noise(1, 1, 400, 300)
LIMITS = [2**19 * n for n in range(20, 0, -1)]


def plans_under_limits(name, **options):
    """Per limit the plan, or the line that refuses it; largest limit first."""
    found, made = [], predictor(NETWORKS[name], PATCH, **options)
    for limit in LIMITS:
        made.max_memory = limit
        try:
            found.append(made.plan(WIDE).as_dict())
        except TilingError as error:
            found.append(str(error))
    return found


TILE_REFUSED = r"a tile of .* takes [0-9.]+ .iB of memory in all, and --max-memory {} does not suffice: "


def way_of(plan):
    """How an image is predicted, in a word."""
    return "refused" if isinstance(plan, str) else plan.get("first_level", plan["plan"])


@pytest.mark.usefixtures("exact_limits")
def test_with_less_memory_the_first_level_is_computed_again_and_then_the_image_is_cut_and_then_it_is_refused():
    """Never more than the limit; each way in its turn; the reason for tiles, and the refusal, say what does not suffice."""
    found = plans_under_limits("stored")
    taken, order = [way_of(plan) for plan in found], ["stored", "computed again", "tiles", "refused"]
    assert list(dict.fromkeys(taken)) == order
    assert taken == sorted(taken, key=order.index)
    staged = [(plan, limit) for plan, limit in zip(found, LIMITS, strict=True) if way_of(plan) in order[:2]]
    assert all(plan["memory_bytes"] <= limit for plan, limit in staged)
    for plan, limit in zip(found, LIMITS, strict=True):
        if way_of(plan) == "tiles":
            given = f"--max-memory {size(limit)} do not suffice: give --max-memory more or give --scratch a folder"
            assert plan["why_tiles"].startswith("it takes ")
            assert given in plan["why_tiles"]
        elif way_of(plan) == "refused":
            assert re.match(TILE_REFUSED.format(size(limit)), plan)
            assert "\n" not in plan
    assert re.search(r"give at least [0-9.]+ .iB, with --tile-size \d+ \d+; in tiles because it takes", found[-1])


@pytest.mark.usefixtures("exact_limits")
def test_with_too_little_memory_the_image_s_statistics_are_refused():
    """They are never replaced by those of tiles, nor stages that were asked for by tiles."""
    found = plans_under_limits("InstanceNorm")
    refused = [line for line in found if isinstance(line, str)]
    assert refused
    assert found[-len(refused) :] == refused
    assert all(line.startswith("the whole image's statistics cannot be had: it takes ") for line in refused)
    assert all(
        re.search("with [0-9.]+ .iB; else choose --population tile, as nnU-Net does with InstanceNorm$", line)
        for line in refused
    )
    asked = plans_under_limits("stored", execution="stages")
    assert asked[-1].startswith("execution 'stages' is not possible: it takes ")
    assert re.search("give --scratch a folder with [0-9.]+ .iB; else choose --execution tiles$", asked[-1])


@pytest.mark.usefixtures("exact_limits")
@pytest.mark.parametrize("name", ["stored", "InstanceNorm"])
def test_with_scratch_on_disk_memory_is_that_of_blocks(name, tmp_path):
    """What was refused, or predicted in tiles, is run stage by stage where scratch lies on a disk."""
    without, found = plans_under_limits(name), plans_under_limits(name, scratch=tmp_path)
    on_disk = [plan for plan in found if way_of(plan) == "stored"]
    assert found[: len(on_disk)] == on_disk
    assert len(on_disk) > len([plan for plan in without if way_of(plan) in ("stored", "computed again")])
    assert {plan["scratch"] for plan in on_disk} == {"disk"}
    assert all(plan["memory_bytes"] <= limit for plan, limit in zip(on_disk, LIMITS, strict=False))
    assert {way_of(plan) for plan in found[len(on_disk) :]} == {"refused"}
    if name == "InstanceNorm":
        assert "give --max-memory more; else" in found[-1]
    else:
        assert re.match(TILE_REFUSED.format(size(LIMITS[-1])), found[-1])
    assert "give --scratch" not in found[-1]


@pytest.mark.usefixtures("exact_limits")
def test_the_memory_that_is_asked_for_suffices():
    """A refusal says how much: with that much it is not refused."""
    made = predictor(NETWORKS["stored"], PATCH, execution="stages", max_memory=2**20)
    with pytest.raises(TilingError, match=r"it takes .* of memory, and --max-memory 1 MiB do not suffice") as refused:
        made.plan(WIDE)
    words = str(refused.value).split("it takes ")[1].split(" of memory")[0]
    made.max_memory = int(float(words.split()[0]) * 1.01 * 2**20)
    assert words.endswith("MiB")
    assert isinstance(made.plan(WIDE), StagesPlan)


def test_memory_that_is_taken_already_counts(monkeypatch):
    """The limit is that of the process."""
    made = predictor(NETWORKS["stored"], PATCH, execution="stages", max_memory=2**30)
    monkeypatch.setattr(ways, "anonymous_memory", lambda: 0)
    before = made.plan(WIDE)
    monkeypatch.setattr(ways, "anonymous_memory", lambda: 2**30 - before.memory_bytes // 4)
    with pytest.raises(TilingError, match="--max-memory 1 GiB do not suffice"):
        made.plan(WIDE)


def test_without_a_limit_the_memory_that_is_available_is_one(monkeypatch):
    """And it is named as such; where nothing is known, nothing is refused."""
    monkeypatch.setattr(ways, "default_max_memory", lambda: 2**20)
    made = predictor(NETWORKS["stored"], PATCH, execution="stages")
    with pytest.raises(TilingError, match=r"and the 1 MiB that are available do not suffice: give --scratch a f"):
        made.plan(WIDE)
    monkeypatch.setattr(ways, "default_max_memory", lambda: None)
    assert made.plan(WIDE).first_level == "stored"


def test_too_little_disk_is_refused_with_what_would_do(tmp_path, monkeypatch):
    """Scratch with the result; where the first level is computed again less is enough."""
    roomy = predictor(NETWORKS["stored"], PATCH, scratch=tmp_path).plan(WIDE)
    full = roomy.schedule.scratch_bytes + roomy.result_bytes

    def free(count):
        monkeypatch.setattr(ways, "free_disk", lambda folder: count)

    free(full)
    assert predictor(NETWORKS["stored"], PATCH, scratch=tmp_path).plan(WIDE).first_level == "stored"
    free(full - 1)
    less = predictor(NETWORKS["stored"], PATCH, scratch=tmp_path).plan(WIDE)
    assert (less.place, less.first_level) == ("disk", "computed again")
    least = less.schedule.scratch_bytes + less.result_bytes
    free(least - 1)
    expected = rf"its scratch takes {size(least)}, and --scratch has .* free: choose a folder with more"
    with pytest.raises(TilingError, match=NOT_POSSIBLE.format(expected, "")):
        predictor(NETWORKS["stored"], PATCH, scratch=tmp_path, execution="stages").plan(WIDE)
    with pytest.raises(TilingError, match=NOT_HAD.format("its scratch takes .* free: choose a folder with more")):
        predictor(NETWORKS["InstanceNorm"], PATCH, scratch=tmp_path).plan(WIDE)
    tiles = predictor(NETWORKS["stored"], PATCH, scratch=tmp_path).plan(WIDE).as_dict()
    assert tiles["plan"] == "tiles"
    assert re.fullmatch(expected, tiles["why_tiles"])


@pytest.mark.usefixtures("exact_limits")
def test_blocks_shrink_before_memory_runs_out(tmp_path):
    """A small limit costs halos and not the prediction; a large one does not make blocks larger than is good for them."""
    made = predictor(NETWORKS["stored"], PATCH, scratch=tmp_path)
    taken = []
    for limit in (2**40, 2**30, 2**22, 2**21):
        made.max_memory = limit
        taken.append(made.plan(WIDE).schedule.block_bytes)
    assert taken[0] == taken[1] > taken[2] > taken[3]


@pytest.mark.parametrize(
    ("free", "on_device", "place"),
    [(2**34, True, "device"), (2**20, True, "memory"), (2**34, False, "memory")],
)
def test_scratch_lies_on_the_device_where_it_fits(free, on_device, place, monkeypatch):
    """Half of what is free there, unless image and result are to stay on the CPU; in half precision."""
    monkeypatch.setattr(ways, "free_on", lambda device: free)
    task = Task(
        image_shape=(400, 300),
        slices=1,
        mirror_axes=(),
        device=torch.device("cuda"),
        dtype=torch.float32,
        on_device=on_device,
    )
    plan = stages_or_reason(Wishes("auto", None, None, None, False), "stored", read_network(NETWORKS["stored"]), task)
    assert plan.place == place
    assert plan.schedule.itemsize == 2


TILES = {
    "tiles": ("stored", {"execution": "tiles"}),
    "halo": ("stored", {"halo": 4}),
    "tile statistics": ("InstanceNorm", {"population": "tile"}),
    "unknown": ("unknown, stored", {}),
}


@pytest.mark.parametrize("asked", TILES)
def test_limits_are_kept_with_tiles(asked, tmp_path):
    """Memory is a promise of both ways; scratch is where it may lie, and tiles need none."""
    name, options = TILES[asked]
    plain = predictor(NETWORKS[name], PATCH, **options).plan(WIDE)
    assert plain.as_dict()["plan"] == "tiles"
    for given in ({"max_memory": 2**34}, {"scratch": tmp_path}):
        assert predictor(NETWORKS[name], PATCH, **options, **given).plan(WIDE).as_dict() == plain.as_dict()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TilingError, match=TILE_REFUSED.format("1 MiB")):
        predictor(NETWORKS[name], PATCH, **options, max_memory=2**20).plan(WIDE)


# --- what predicting to labels takes ---


@pytest.mark.parametrize("slices", [1, 3])
def test_the_bytes_of_the_result_are_those_of_what_is_held(slices):
    """All slices as an array; nothing where one pass is handed on; a plane where several are added up, two to resume."""
    task = Task(
        image_shape=(40, 30),
        slices=slices,
        mirror_axes=(),
        device=torch.device("cpu"),
        dtype=torch.float16,
        on_device=False,
    )
    plane = 5 * 40 * 30 * 4  # half precision is added up in single precision

    def bytes_of(on_disk, **changes):
        return replace(task, **changes).result_bytes(5, on_disk=on_disk)

    for on_disk in (False, True):
        assert bytes_of(on_disk) == bytes_of(on_disk, folds=2) == slices * plane
        assert bytes_of(on_disk, streamed=True, resumable=True) == 0
        for several in ({"folds": 2}, {"mirror_axes": (1,)}, {"folds": 3, "mirror_axes": (0, 1)}):
            assert bytes_of(on_disk, streamed=True, **several) == plane
            assert bytes_of(on_disk, streamed=True, resumable=True, **several) == (2 if on_disk else 1) * plane


@pytest.mark.usefixtures("exact_limits")
def test_scratch_goes_to_the_spare_folder_only_where_memory_is_short(tmp_path, monkeypatch, caplog):
    """That of the case's work; and where another folder was named, never."""
    caplog.set_level(logging.INFO, "nnunet_norm")
    made = predictor(NETWORKS["InstanceNorm"], PATCH)
    task = made.task(WIDE, streamed=True, resumable=True)
    assert made.stages_or_reason(task, tmp_path).place == "memory"
    assert caplog.messages == []
    monkeypatch.setattr(ways, "default_max_memory", lambda: 2**21)
    spare = made.stages_or_reason(task, tmp_path)
    assert (spare.place, spare.scratch_folder) == ("disk", tmp_path)
    (line,) = caplog.messages
    assert line.startswith(f"scratch goes to {tmp_path}: the whole image's statistics cannot be had: it takes ")
    made.scratch = tmp_path / "named"
    assert made.stages_or_reason(task, tmp_path).scratch_folder == tmp_path / "named"
