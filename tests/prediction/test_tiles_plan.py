"""Tiles for a sink that wants what comes after each box, and what the points of such a prediction name."""

import pytest
import torch
from tiny_networks import noise, predictor, unet

from nnunet_norm.prediction.execution import Folds
from nnunet_norm.prediction.journal import RunJournal
from nnunet_norm.prediction.work_folder import Work

NETWORK = unet([(1, 1), (2, 2)])
IMAGE = noise(1, 2, 41, 30)


class Boxes:
    """Takes boxes with what comes after them, and checks that all of it is there."""

    adds_up = False

    def __init__(self, overlap):
        self.overlap = overlap
        self.logits = torch.full((2, *IMAGE.shape[1:]), torch.nan, dtype=torch.float64)

    def add(self, place, logits, weight=1.0, core=None):
        core = place if core is None else core
        assert (weight, core[0]) == (1.0, place[0])
        for p, c, more, n in zip(place[1:], core[1:], self.overlap[1:], IMAGE.shape[2:], strict=True):
            assert (p.start, p.stop) == (c.start, min(c.stop + more, n))
        there = self.logits[(slice(None), *place)]
        assert (there.isnan() | (there == logits)).all()
        self.logits[(slice(None), *place)] = logits


def tiled():
    return predictor(NETWORK, (16, 16), execution="tiles", halo=2)


@pytest.mark.parametrize("overlap", [(0, 0, 0), (0, 1, 0), (0, 3, 7)])
def test_boxes_come_with_what_is_after_them(overlap):
    """The logits are those that a result in memory gets, whatever is wanted beside each box."""
    made, boxes = tiled(), Boxes(overlap)
    made.predict_to(boxes, IMAGE)
    assert torch.equal(boxes.logits, made.predict_sliding_window_return_logits(IMAGE))


@pytest.mark.parametrize("point", range(1, 12, 2))
@pytest.mark.parametrize("overlap", [(0, 0, 0), (0, 1, 1)])
def test_a_process_that_ends_after_all_tiles_is_continued(tmp_path, monkeypatch, overlap, point):
    """While labels are written, say: the last point that was noted, whichever it is, names no file that is gone."""
    calls = []
    monkeypatch.setattr(RunJournal, "is_due", lambda journal: calls.append(None) or len(calls) == point)
    boxes = Boxes(overlap)
    for _ in range(2):
        tiled().predict_to(boxes, IMAGE, Work(tmp_path, {"image": "a"}))
        assert not boxes.logits.isnan().any()
        assert list(tmp_path.glob("map_*")) == []
    assert len(calls) > point


def test_every_tile_goes_through_all_folds_once():
    """And is averaged before it is handed on."""
    weights, seen, used = [1.0, 2.0, 6.0], [], []

    def forward(batch):
        seen.append(batch.shape[2:])
        return batch.repeat(1, 2, 1, 1) * weights[used[-1]]

    made, boxes = tiled(), Boxes((0, 0, 0))
    plan = made.tiles_plan(IMAGE)
    plan.run(Folds(forward, 3, used.append), IMAGE, boxes)
    assert len(seen) == 3 * plan.decision.tiles
    assert used == [0, 1, 2] * plan.decision.tiles
    assert torch.allclose(boxes.logits, IMAGE.repeat(2, 1, 1, 1) * 3, rtol=1e-12, atol=0)
