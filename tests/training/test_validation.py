"""The final validation: how it predicts, and what it says about seams."""

import json
from pathlib import Path

import pytest

from nnunet_norm.errors import ArchitectureError, TilingError
from nnunet_norm.prediction import planning_predictor, ways
from nnunet_norm.stages.windows import Convolution

INSTANCE, BRN = "nnUNetTrainerInstanceNorm_1epochs", "nnUNetTrainerBRN_1epochs"


def validated(dataset, name, fold="all", **changes):
    """A trainer that has validated after a step or two: its report and its log."""
    # With a seed: a map that is almost constant, as chance may make one, has its rounding enlarged by InstanceNorm.
    dataset.plans(name="short", iterations_per_epoch=1, seed=0, **changes)
    trainer = dataset.trainer(name, plans="short", fold=fold)
    trainer.run_training()
    trainer.perform_actual_validation()
    report = json.loads(Path(trainer.output_folder, "validation", "norm_report.json").read_text())
    return report, Path(trainer.log_file).read_text()


def refuse(*_):
    raise ArchitectureError("attention has no rule for blocks")


@pytest.mark.parametrize("name", ["nnUNetTrainerGN_1epochs", INSTANCE])
def test_image_statistics_are_taken_and_compared_with_those_of_tiles(dataset, name):
    """Prediction is that of the whole image, with no mismatch; what tiles of their own statistics would do is told beside."""
    report, log = validated(dataset, name)
    (plan,) = report["predictor"]["plans"]
    assert (plan["plan"], plan["population"], plan["exact"]) == ("stages", "image", True)
    assert report["predictor"]["exact"]
    exact, tiles = report["tile_mismatch"], report["tile_mismatch_with_tile_statistics"]
    assert exact["num_pairs"] > 0
    assert exact["verdict"].startswith("no")
    assert tiles["num_pairs"] > 0
    assert not tiles["verdict"].startswith("no")
    assert tiles["max_dist"] > 100 * exact["max_dist"]
    assert "In tiles with statistics of their own it would be 1: " in log
    assert f", max dist: {tiles['verdict']} " in log
    assert "Halo predictor: image of 18 x 26 x 22 voxels: " in log


def test_stored_statistics_have_no_second_mismatch(dataset):
    """There are no tiles with statistics of their own to compare with."""
    report, log = validated(dataset, BRN)
    assert report["predictor"]["plans"][0]["population"] == "stored"
    assert report["tile_mismatch"]["verdict"].startswith("no")
    assert "tile_mismatch_with_tile_statistics" not in report
    assert "statistics of their own" not in log


def test_a_mismatch_would_be_seen(dataset, monkeypatch):
    """Not one that can say nothing but "no": with a halo of blocks that is too small it says how far they are apart."""
    real = Convolution.apply

    def spoiled(self, inputs, place):
        (x,) = inputs
        if place.given[0][-1][0] > 0 and self.kernel[-1] > 1:
            x = x.clone()
            x[..., 0] = 0
        return real(self, [x], place)

    monkeypatch.setattr(Convolution, "apply", spoiled)
    monkeypatch.setattr("nnunet_norm.stages.verify.TOLERANCE", float("inf"))
    report, _ = validated(dataset, BRN)
    assert not report["tile_mismatch"]["verdict"].startswith("no")


@pytest.mark.parametrize("name", [INSTANCE, BRN])
def test_a_network_that_is_not_known_is_validated_in_tiles(dataset, name, monkeypatch):
    """A finished training is validated whatever the network is; the log says why in tiles and with whose statistics."""
    monkeypatch.setattr(planning_predictor, "read_verified", refuse)
    report, log = validated(dataset, name)
    (plan,) = report["predictor"]["plans"]
    why = "this network cannot be run stage by stage: attention has no rule for blocks"
    if name == INSTANCE:
        assert (plan["plan"], plan["population"], plan["exact"]) == ("tiles", "tile", False)
        assert log.count(f"Halo predictor: statistics of tiles, since {why}") == 1
        assert "-o OUTPUT_FOLDER --population tile" in log
        assert not report["tile_mismatch"]["verdict"].startswith("no")
    else:
        assert (plan["plan"], plan["population"], plan["why_tiles"]) == ("tiles", "stored", why)
        assert f"; in tiles because {why}" in log
        assert "statistics of tiles" not in log
        assert "--population tile" not in log
    assert report["num_cases"] == 5
    assert "tile_mismatch_with_tile_statistics" not in report


@pytest.mark.parametrize("name", [INSTANCE, BRN])
def test_where_memory_is_short_the_scratch_goes_to_the_disk(dataset, name, monkeypatch, tmp_path):
    """The same statistics for every case, and the same exactness; no option of nnUNetv2_train could mend it."""
    monkeypatch.setattr(ways, "default_max_memory", lambda: 2**20)
    monkeypatch.setattr(ways, "BLOCK_BYTES", 2**12)  # else these images are one block, which needs no scratch
    report, log = validated(dataset, name)
    plans = report["predictor"]["plans"]
    assert {(plan["plan"], plan["scratch"]) for plan in plans} == {("stages", "disk")}
    assert {plan["population"] for plan in plans} == {"image" if name == INSTANCE else "stored"}
    assert "Halo predictor: scratch goes to the output folder, because " in log
    assert "and the 1 MiB that are available do not suffice" in log
    assert not list(tmp_path.rglob("nnunet_norm_scratch*"))


def test_other_refusals_are_not_swallowed(dataset, monkeypatch):
    """With stored statistics there is nothing else to fall to."""

    def fails(*_, **__):
        raise TilingError("no way")

    monkeypatch.setattr(planning_predictor, "stages_or_reason", fails)
    with pytest.raises(TilingError, match="no way"):
        validated(dataset, BRN)
