import math
from pathlib import Path

import pytest

from nnunet_norm.sweep.progress import Epoch, read_epochs

HEADER = """
#######################################################################
Please cite the following paper when using nnU-Net:

2026-11-21 03:52:49.209104: do_dummy_2d_data_aug: False

This is the configuration used by this training:
Configuration name: 3d_fullres
 {'batch_size': 2, 'patch_size': [32, 32, 32]}

"""


def _stamped(*lines: str) -> str:
    return "".join(f"2026-11-21 03:53:09.746389: {line} \n" for line in lines)


def _epoch(number: int, loss: float, *, dice: str = "[np.float32(0.25), np.float32(0.75)]") -> str:
    """As nnU-Net writes an epoch, with a line of this package's trainers between."""
    return _stamped(
        "",
        f"Epoch {number}",
        "Current learning rate: 1e-05",
        "Train/eval disparity [np.float64(0.449), np.float64(nan)]",
        f"train_loss {loss}",
        f"val_loss {loss - 1}",
        f"Pseudo dice {dice}",
        "Epoch time: 20.17 s",
        "Yayy! New best EMA pseudo Dice: 0.042399998754262924",
    )


def _log(folder: Path, time: str, *parts: str) -> None:
    (folder / f"training_log_{time}.txt").write_text(HEADER + "".join(parts), encoding="utf-8")


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(epoch.number, epoch.train_loss) for epoch in read_epochs(folder)]


@pytest.mark.parametrize(
    ("dice", "mean"),
    [
        ("[np.float32(0.25), np.float32(0.75)]", 0.5),
        ("[0.25, nan, 0.75]", 0.5),
        ("[np.float64(nan), np.float32(0.25)]", 0.25),
        ("[np.float64(nan)]", math.nan),
        ("[]", math.nan),
    ],
)
def test_an_epoch_is_read_as_nnunet_wrote_it(tmp_path: Path, dice: str, mean: float) -> None:
    """Enforces every value of an epoch, and the mean pseudo Dice of the classes that occurred, of old and new NumPy."""
    _log(tmp_path, "2026_11_21_03_52_49", _epoch(0, -0.5, dice=dice))
    (found,) = read_epochs(tmp_path)
    expected = Epoch(number=0, seconds=20.17, train_loss=-0.5, val_loss=-1.5, dice=mean, learning_rate=1e-05)
    assert repr(found) == repr(expected)  # NaN is NaN


def test_losses_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    """Enforces that a diverged training is shown as one."""
    _log(tmp_path, "2026_11_21_03_52_49", _epoch(0, math.nan), _epoch(1, -math.inf))
    first, second = read_epochs(tmp_path)
    assert math.isnan(first.train_loss)
    assert second.train_loss == -math.inf


def test_an_epoch_without_its_last_line_is_not_there_yet(tmp_path: Path) -> None:
    """Enforces that what a killed or running training has half-written is no value: 0.80 may have been 0.8059."""
    unfinished = _epoch(1, 0.8).split("Epoch time")[0]
    _log(tmp_path, "2026_11_21_03_52_49", _epoch(0, 0.9), unfinished)
    assert _losses(tmp_path) == [(0, 0.9)]
    _log(tmp_path, "2026_11_21_03_52_49", _epoch(0, 0.9), unfinished, "Epoch time: 2")
    assert _losses(tmp_path) == [(0, 0.9)]


def test_a_continued_training_takes_the_place_of_what_its_checkpoint_did_not_have(tmp_path: Path) -> None:
    """Enforces that epochs after the checkpoint from which a training went on are replaced, also those not trained again yet.

    The names of nnU-Net's logs have no leading zeros, so that they do not sort as text: September comes before October.
    """
    _log(tmp_path, "2026_9_30_23_59_59", *(_epoch(n, n / 10) for n in range(5)))
    _log(tmp_path, "2026_10_1_00_00_30", _epoch(2, 7), _epoch(3, 8).split("train_loss")[0])
    assert _losses(tmp_path) == [(0, 0.0), (1, 0.1), (2, 7)]
    _log(tmp_path, "2026_10_2_00_00_30", "predicting case \n")  # a validation, or a start that failed
    assert _losses(tmp_path) == [(0, 0.0), (1, 0.1), (2, 7)]


def test_a_fresh_training_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    """Enforces that a folder in which somebody trained before shows the newest training, also if both share a log."""
    _log(tmp_path, "2026_1_1_00_00_00", *(_epoch(n, n) for n in range(9)), _epoch(0, 70))
    assert _losses(tmp_path) == [(0, 70)]
    _log(tmp_path, "2026_1_2_00_00_00", _epoch(0, 80), _epoch(1, 81))
    assert _losses(tmp_path) == [(0, 80), (1, 81)]


def test_no_training_has_no_epochs(tmp_path: Path) -> None:
    """Enforces an empty list where nothing was trained, where a log is empty, and where other files lie about."""
    assert read_epochs(tmp_path / "fold_0") == []
    (tmp_path / "training_log_copy.txt").write_text(_epoch(0, 1), encoding="utf-8")
    (tmp_path / "training_log_2026_1_1_00_00_00.txt").write_bytes(b"\xff\xfe")
    assert read_epochs(tmp_path) == []
