"""``--tile-size auto`` and ``--max-memory`` with tiles, by predictions with real networks."""

import itertools
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_networks import INSTANCE_NORM, UnknownToStages, noise, predictor, randomized, unet, whole
from torch import nn

from nnunet_norm.errors import TilingError
from nnunet_norm.layers import convert_norm
from nnunet_norm.prediction.memory import anonymous_memory
from nnunet_norm.prediction.stages_plan import StagesPlan

DEEP = [(1, 1), (2, 2), (2, 2)]

WITHIN = """
import sys, threading, time
sys.path.insert(0, {tests!r})
import torch
from torch import nn
from tiny_networks import predictor
from nnunet_norm.prediction.memory import anonymous_memory

torch.set_num_threads(1)
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 2, 1)
).eval()
image = torch.randn(1, 80, 80, 80)
network(torch.zeros(1, 1, 16, 16, 16))
limit = anonymous_memory() + {more} * 2**20
made = predictor(network, (32, 32, 32), tile_size="auto", execution="tiles", max_memory=limit)
peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_memory())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
made.predict_sliding_window_return_logits(image)
done = True
watcher.join()
decision = made.last_plan.decision
print((peak - limit) // 2**20, decision.tiles, *decision.tile_size)
"""


class Attention(nn.Module):
    """A gate that multiplies maps, which stages have no rule for."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 4), (4, 2)))

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x * torch.sigmoid(self.gate(x)))


class Places(nn.Module):
    """An embedding of fixed size: every tile must be 24 x 24."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.places = nn.Parameter(torch.zeros(1, 1, 24, 24))

    def forward(self, x):
        if x.shape[2:] != self.places.shape[2:] and x.shape[2] < 1000:
            raise ValueError("the embedding has 24 x 24 places")
        return self.first(x)


def seen(network, made, image):
    """Voxels that went through the network, and the logits."""
    shapes = []
    handle = network.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    made.field, made.graph  # noqa: B018  both run the network without data
    made.tiles_plan(image)
    shapes.clear()
    logits = made.predict_sliding_window_return_logits(image)
    handle.remove()
    return sum(math.prod(shape) for shape in shapes), logits


@pytest.mark.parametrize("mirror_axes", [None, (0, 1)])
def test_auto_costs_less_than_the_patch_and_gives_the_same(mirror_axes):
    """Far fewer voxels go through a network whose halo takes half of the patch; the result is that of one pass."""
    network, image = randomized(Attention()), noise(1, 90, 70)
    results = {}
    for tile_size in (None, "auto"):
        made = predictor(network, (16, 16), mirror_axes=mirror_axes, tile_size=tile_size, execution="tiles")
        results[tile_size] = seen(network, made, image)
        assert made.last_plan.decision.exact
    assert results["auto"][0] < 0.7 * results[None][0]
    expected = whole(network, image, mirror_axes or ())
    for _, logits in results.values():
        assert torch.allclose(logits, expected, rtol=0, atol=1e-10)


def test_auto_chooses_tiles_and_not_that_there_are_tiles():
    """A network that can be run stage by stage is; a tile that was named is for tiles."""
    image = noise(1, 40, 36)
    assert isinstance(predictor(unet(DEEP), (16, 16), tile_size="auto").plan(image), StagesPlan)
    assert not isinstance(predictor(unet(DEEP), (16, 16), tile_size=(16, 16)).plan(image), StagesPlan)
    with pytest.raises(TilingError, match=r"tile_size 'large' is unknown: choose auto"):
        predictor(unet(DEEP), (16, 16), tile_size="large")


def test_auto_takes_the_exact_halo_while_memory_holds_it_and_the_effective_one_then(monkeypatch):
    """By the count of memory: all, a part, so little that only the effective halo leaves half of a tile."""
    network, image = unet([*DEEP, (2, 2)]), noise(1, 200, 200)
    made = predictor(network, (32, 32), tile_size="auto", execution="tiles")
    for voxels, source in ((10**6, "none needed"), (96 * 96, "theoretical"), (56 * 56, "effective")):
        monkeypatch.setattr("nnunet_norm.prediction.tiling_predictor.ALLOCATOR_BYTES", 0)
        limit_to(monkeypatch, made, image, voxels)
        decision = made.tiles_plan(image).decision
        assert set(decision.source) == {source}
        assert math.prod(decision.tile_size) <= voxels * 1.01
        assert decision.exact == (source != "effective")


def limit_to(monkeypatch, made, image, voxels):
    """State the memory in which tiles of so many voxels, and no larger ones, have room."""
    edge = math.isqrt(voxels) // made.field.stride[0] * made.field.stride[0]
    made.max_memory = None
    monkeypatch.setattr("nnunet_norm.prediction.tiling_predictor.anonymous_memory", lambda: 0)
    made.max_memory = made._budget(image, streamed=False).need((edge, edge))


def test_a_tile_that_memory_does_not_hold_is_refused_with_one_that_it_holds(monkeypatch):
    """The patch, and a tile that was named; what the refusal names is taken."""
    network, image = randomized(Attention()), noise(1, 300, 300)
    made = predictor(network, (256, 256), execution="tiles")
    limit_to(monkeypatch, made, image, 100 * 100)
    with pytest.raises(
        TilingError, match=r"a tile of 256 x 256 takes .* --max-memory .* choose --tile-size \d+ \d+ or"
    ) as refused:
        made.plan(image)
    made.tile_size = tuple(int(word) for word in str(refused.value).split("--tile-size ")[1].split()[:2])
    assert made.plan(image).decision.tile_size == made.tile_size
    made.tile_size = (200, 200)
    with pytest.raises(TilingError, match="a tile of 200 x 200 takes"):
        made.plan(image)
    made.tile_size, made.max_memory = "auto", 1000
    with pytest.raises(
        TilingError, match=r"no tile of this network .* fits into --max-memory 1000 bytes: give at least"
    ):
        made.plan(image)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (unet([(1, 1), (2, 2)], norm=INSTANCE_NORM), "the statistics of .* depend on the tile"),
        (randomized(UnknownToStages(pooled=True)), "pool .*sees the whole tile"),
    ],
)
def test_auto_keeps_the_patch_where_the_tile_changes_the_result(caplog, network, reason):
    """With statistics of the tile, and with global pooling; it is said, and the cut is that of before."""
    caplog.set_level(logging.INFO)
    image = noise(1, 60, 60)
    population = {"population": "tile"} if network.training is False and "Instance" in str(network) else {}
    plans = [
        predictor(network, (16, 16), tile_size=tile_size, execution="tiles", **population).tiles_plan(image)
        for tile_size in (None, "auto")
    ]
    assert plans[0].decision == plans[1].decision
    (line,) = [line for line in caplog.messages if "--tile-size auto keeps the patch of 16 x 16" in line]
    assert re.search(reason, line)


def test_extents_that_the_network_cannot_take_are_left_out():
    """An embedding of fixed size leaves one tile of all."""
    network, image = randomized(Places()), noise(1, 90, 80)
    made = predictor(network, (24, 24), tile_size="auto", execution="tiles")
    assert made.plan(image).decision.tile_size == (24, 24)
    made.predict_sliding_window_return_logits(image)


def test_on_a_gpu_tiles_are_tried_until_one_does_not_run_out_of_memory(monkeypatch):
    """Simulated: free memory is plenty by the count, and passes of more than 50 x 50 voxels fail as torch's do."""
    network, image = randomized(Attention()), noise(1, 300, 300)
    made = predictor(network, (64, 64), mirror_axes=(0, 1), tile_size="auto", execution="tiles")
    tried = []

    def tile_logits(batch, mirror_axes=()):
        tried.append((math.prod(batch.shape[2:]), tuple(mirror_axes)))
        if tried[-1][0] > 50 * 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return network(batch.double())

    made.device = torch.device("cuda")
    monkeypatch.setattr(made, "tile_logits", tile_logits)
    monkeypatch.setattr("nnunet_norm.prediction.tiling_predictor.free_on", lambda device: 2**40)
    decision = made.tiles_plan(image).decision
    assert decision.exact
    assert decision.tiles > 1
    assert tried[0] == (300 * 300, (0,))  # a pass and a mirrored one, as in the prediction
    assert all(after[0] <= before[0] / 2 for before, after in itertools.pairwise(tried))
    assert tried[-1][0] == math.prod(decision.tile_size) <= 50 * 50


class Looks(nn.Module):
    """A network that decides by the values of its input, which there are none of without data."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.first(x if x.shape[2] > 1000 or float(x.abs().max()) > 0 else x + 1)


def test_a_network_that_cannot_be_counted_keeps_the_patch(caplog):
    """It is said why, and the result is that of one pass; a stated memory refuses nothing then."""
    caplog.set_level(logging.INFO)
    network, image = randomized(Looks()), noise(1, 60, 60)
    made = predictor(network, (16, 16), tile_size="auto", execution="tiles", max_memory=1)
    assert torch.allclose(made.predict_sliding_window_return_logits(image), whole(network, image), rtol=0, atol=1e-10)
    assert "--tile-size auto keeps the patch of 16 x 16: what a tile takes cannot be counted (" in caplog.text


def test_attention_unet_of_monai_is_predicted_exactly_in_tiles_of_its_own_choice(monkeypatch):
    """Its gates multiply maps, which stages do not know: equal to one pass, with a budget that forces several tiles."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    network = randomized(convert_norm(nets.AttentionUnet(2, 1, 2, (4, 8, 8), (2, 2)), "batch_norm"))
    image = noise(1, 120, 130)
    made = predictor(network, (32, 32), tile_size="auto")
    assert "mul" in str(made.graph)
    limit_to(monkeypatch, made, image, 90 * 90)
    logits = made.predict_sliding_window_return_logits(image)
    assert made.last_plan.decision.tiles > 1
    assert made.last_plan.decision.exact
    assert torch.allclose(logits, whole(network, image), rtol=0, atol=1e-10)


@pytest.mark.skipif(anonymous_memory() == 0, reason="anonymous memory is read from /proc")
def test_memory_that_was_stated_is_kept():
    """Anonymous memory of a process at its peak: below the limit, with a tile that is a part of the image."""
    code = WITHIN.format(tests=str(Path(__file__).parent), more=192 + 64)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    beyond, tiles, *edges = map(int, done.stdout.splitlines()[-1].split())
    assert beyond < 0
    assert tiles > 1
    assert max(edges) > 32
