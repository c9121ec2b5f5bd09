import os

from nnunet_norm.validations import is_of_training


def test_what_is_older_than_the_final_checkpoint_is_of_an_earlier_training(tmp_path):
    """What was written at the same time or later is of this one; without a checkpoint nothing tells."""
    file, final = tmp_path / "validation" / "a.npz", tmp_path / "checkpoint_final.pth"
    file.parent.mkdir()
    file.touch()
    assert is_of_training(file, tmp_path)
    final.touch()
    for moved, expected in ((-1, False), (0, True), (1, True)):
        os.utime(file, ns=(0, final.stat().st_mtime_ns + moved))
        assert is_of_training(file, tmp_path) is expected
