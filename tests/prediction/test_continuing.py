"""Predictions that are stopped anywhere and continued by another process give the same bits as those that are not."""

import json
import random

import numpy as np
import pytest
import torch
from tiny_networks import INSTANCE_NORM, noise, predictor, randomized, unet

from nnunet_norm.errors import OutputError
from nnunet_norm.layers import convert_norm
from nnunet_norm.prediction import journal as journal_module
from nnunet_norm.prediction.journal import Position
from nnunet_norm.prediction.work_folder import MANIFEST, Work, WorkFolder
from nnunet_norm.stages.journal import Progress

PLAIN_2D, PLAIN_3D = [(1, 1), (2, 2), (2, 2)], [(1, 1, 1), (2, 2, 2)]
NETWORKS = {
    "2d": unet(PLAIN_2D),
    "2d InstanceNorm": unet(PLAIN_2D, norm=INSTANCE_NORM),
    "3d": randomized(convert_norm(unet(PLAIN_3D), "batch_renorm")),
    "3d residual": unet(PLAIN_3D, residual=True),
    "3d InstanceNorm": unet(PLAIN_3D, norm=INSTANCE_NORM),
}
SHAPES = {"2d": (1, 3, 37, 26), "3d": (1, 18, 11, 21)}
STAGES = {"scratch": "disk"}
TILES = {"execution": "tiles", "halo": 2}


class StoppedError(Exception):
    """The process is no more."""


class Kept:
    """Logits in memory, as if it were a file; whatever is added again must be the same."""

    adds_up = False

    def __init__(self, shape, overlap=(0, 0, 0)):
        self.overlap = overlap
        self.logits = torch.full((2, *shape), torch.nan, dtype=torch.float64)

    def add(self, place, logits, weight=1.0, core=None):
        assert weight == 1.0
        core = core or place
        mine = tuple(
            slice(None) if isinstance(p, int) else slice(c.start - p.start, c.stop - p.start)
            for p, c in zip(place, core, strict=True)
            if not isinstance(p, int)
        )
        target = self.logits[(slice(None), *core)]
        values = logits[(slice(None), *mine)].double()
        assert (target.isnan() | (target == values)).all()
        self.logits[(slice(None), *core)] = values


@pytest.fixture(autouse=True)
def noted_always(monkeypatch):
    """Every block and tile is a point from which a run can be continued."""
    monkeypatch.setattr(journal_module, "NOTE_EVERY", 0.0)


def made(name, folder, *, folds, mirrored, options):
    options = dict(options)
    if "scratch" in options:
        options["scratch"] = folder
    if options.get("execution") == "tiles" and "InstanceNorm" in name:
        options["population"] = "tile"
    predicts = predictor(NETWORKS[name], (8,) * (2 if name.startswith("2d") else 3), mirror_axes=mirrored, **options)
    states = []
    for fold in range(folds):
        torch.manual_seed(fold)
        states.append({k: v.clone() for k, v in randomized(NETWORKS[name]).state_dict().items()})
    predicts.list_of_parameters = states
    return predicts


def stopped_after(predicts, count):
    """Let the predictor stop after so many steps."""
    left = [count]

    def check():
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    predicts.check = check


ONCE, AVERAGED = (1, (), (0, 1, 1)), (2, (0,), (0, 1, 1))
"""Folds, mirrored axes, and what the sink wants beyond a box."""


@pytest.mark.parametrize(
    ("name", "options", "folds", "mirrored", "overlap"),
    [
        *((name, STAGES, *ONCE) for name in NETWORKS),
        *((name, STAGES, *AVERAGED) for name in ("2d", "3d InstanceNorm")),
        *((name, TILES, *ONCE) for name in ("2d InstanceNorm", "3d")),
        *((name, TILES, *AVERAGED) for name in ("2d", "3d")),
        ("3d", TILES, 2, (), (0, 0, 0)),
    ],
)
def test_a_stopped_prediction_is_continued_to_the_same_bits(tmp_path, name, options, folds, mirrored, overlap):
    """StoppedError again and again at random steps, by processes that know only the folder and the output."""
    image = noise(*SHAPES[name[:2]])
    folder = tmp_path / "work"
    folder.mkdir()
    how = {"folds": folds, "mirrored": mirrored, "options": options}
    whole = Kept(image.shape[1:], overlap)
    straight = made(name, tmp_path, **how)
    steps = []
    straight.check = lambda: steps.append(None)
    straight.predict_to(whole, image, Work(folder, {"image": "a"}))
    assert not whole.logits.isnan().any()
    again, drawn, stops, reached = Kept(image.shape[1:], overlap), random.Random(0), 0, 0
    folder = tmp_path / "again"
    folder.mkdir()
    while True:
        other = made(name, tmp_path, **how)
        reached += drawn.randint(1, len(steps) // 3)  # steps that were finished before are told, too
        stopped_after(other, reached)
        try:
            other.predict_to(again, image, Work(folder, {"image": "a"}))
            break
        except StoppedError:
            stops += 1
    assert stops > 1
    assert torch.equal(again.logits, whole.logits)
    assert [path.name for path in folder.glob("map_*")] == []


def begun(tmp_path, name="3d"):
    """A work folder with a point in it."""
    image, folder = noise(*SHAPES[name[:2]]), tmp_path / "work"
    folder.mkdir()
    first = made(name, tmp_path, folds=1, mirrored=(), options=STAGES)
    stopped_after(first, 5)
    with pytest.raises(StoppedError):
        first.predict_to(Kept(image.shape[1:]), image, Work(folder, {"image": "a"}))
    assert (folder / "manifest.json").exists()
    return image, folder


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ({"image": "b"}, r"'.*/work' holds what another prediction left \(other image\): predict as before, or leave"),
        ({"options": {"population": "tile"}}, r"holds what another prediction left \(other options\)"),
    ],
)
def test_what_another_prediction_left_is_refused(tmp_path, what, expected):
    """Another image, other options: never continued."""
    image, folder = begun(tmp_path)
    other = made("3d", tmp_path, folds=1, mirrored=(), options=STAGES)
    with pytest.raises(OutputError, match=expected):
        other.predict_to(Kept(image.shape[1:]), image, Work(folder, {"image": "a"} | what))


def test_other_weights_are_refused(tmp_path):
    """The digest of the model is part of what was begun."""
    image, folder = begun(tmp_path)
    other = made("3d", tmp_path, folds=2, mirrored=(), options=STAGES)
    with pytest.raises(OutputError, match=r"another prediction left \(other model\)"):
        other.predict_to(Kept(image.shape[1:]), image, Work(folder, {"image": "a"}))


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"version": 0}', '{"version": 1, "pins": {}, "identity": {}, "position": 3}']
)
def test_a_corrupt_manifest_is_one_line_with_the_remedy(tmp_path, content):
    """Nothing is guessed, and nothing is removed."""
    image, folder = begun(tmp_path)
    (folder / "manifest.json").write_text(content)
    files = sorted(folder.iterdir())
    other = made("3d", tmp_path, folds=1, mirrored=(), options=STAGES)
    with pytest.raises(
        OutputError, match=r"manifest '.*' cannot be read \(.*\): remove its folder, or leave --continue"
    ) as caught:
        other.predict_to(Kept(image.shape[1:]), image, Work(folder, {"image": "a"}))
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == files


def test_a_map_that_is_gone_or_torn_is_refused(tmp_path):
    """The manifest names it, and it is not whole."""
    image, folder = begun(tmp_path)
    for path in folder.glob("map_*"):
        path.write_bytes(path.read_bytes()[:-8])
    other = made("3d", tmp_path, folds=1, mirrored=(), options=STAGES)
    with pytest.raises(OutputError, match=r"scratch '.*map_.*' .* is not whole: start it again"):
        other.predict_to(Kept(image.shape[1:]), image, Work(folder, {"image": "a"}))


def test_points_survive_json():
    """Every float of the statistics to the last bit."""
    progress = Progress(
        3, (((0, 2), (1, 3)),), (7.0, [0.1, 1 / 3], [2e-300, 1.0]), {4: "map_1.float32"}, {2: ([0.1], [1 / 7])}, 1
    )
    position = Position(1, 2, ("", "map_9.float64"), progress)
    assert Position.from_dict(json.loads(json.dumps(position.as_dict()))) == position
    assert position.files == {"map_1.float32", "map_9.float64"}


def test_one_folder_has_one_process(tmp_path):
    """A second one is refused while the first is at work, and not afterwards."""
    first = WorkFolder(tmp_path, "/out/case_1", resume=True)
    with pytest.raises(
        OutputError, match=r"another process is writing '/out/case_1' .*: wait for it, or choose another"
    ):
        WorkFolder(tmp_path, "/out/case_1", resume=True)
    WorkFolder(tmp_path, "/other/case_1", resume=True).close(remove=True)
    first.close(remove=False)
    WorkFolder(tmp_path, "/out/case_1", resume=True).close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_found_again_only_with_a_manifest(tmp_path):
    """What a process left that had not noted anything is of no use."""
    for resume, expected in ((True, 0), (True, 0), (False, 0)):
        work = WorkFolder(tmp_path, "case", resume=resume)
        array = work.allocate("segmentation", (3, 4), np.uint8)
        assert array[1, 2] == expected
        array[1, 2] = 5
        work.close(remove=False)
    (work.path / MANIFEST).write_text("{}")
    work = WorkFolder(tmp_path, "case", resume=True)
    assert work.allocate("segmentation", (3, 4), np.uint8)[1, 2] == 5
    with pytest.raises(OutputError, match=r"segmentation' of the prediction that is to be continued is not whole"):
        work.allocate("segmentation", (3, 5), np.uint8)
    assert work.allocate("segmentation", (3, 4), np.uint8)[1, 2] == 5  # and nothing was changed
    work.close(remove=True)
