"""Which files of two folders are compared."""

import os

import pytest

from nnunet_norm.errors import EvaluationError
from nnunet_norm.evaluation import Pair, pairs_of_folders


@pytest.fixture
def folders(tmp_path):
    """Two folders with the cases a, b, c, and other files among the predictions."""
    for name in ("gt", "pred"):
        (tmp_path / name).mkdir()
        for case in "cab":
            (tmp_path / name / f"{case}.nii.gz").touch()
    for other in ("plans.json", "a.npz", ".12-d.nii.gz"):
        (tmp_path / "pred" / other).touch()
    return tmp_path / "gt", tmp_path / "pred"


def test_files_of_one_name_are_a_pair(folders):
    """In the order of their names; what is being written, or is no segmentation, is left out."""
    pairs = pairs_of_folders(*folders, ".nii.gz")
    assert [pair.case for pair in pairs] == ["a", "b", "c"]
    assert pairs[0] == Pair("a", os.path.join(folders[0], "a.nii.gz"), os.path.join(folders[1], "a.nii.gz"))


def test_cases_that_are_named_are_compared_alone(folders):
    (folders[1] / "a.nii.gz").unlink()
    assert [pair.case for pair in pairs_of_folders(*folders, ".nii.gz", cases=["c", "b"])] == ["b", "c"]
    with pytest.raises(EvaluationError, match=r"no prediction in '.*pred' of a: add them$"):
        pairs_of_folders(*folders, ".nii.gz", cases=["a", "b"])
    with pytest.raises(EvaluationError, match="no case to compare"):
        pairs_of_folders(*folders, ".nii.gz", cases=[])


def test_references_without_prediction_are_refused_unless_chill(folders):
    for case in "ab":
        (folders[1] / f"{case}.nii.gz").unlink()
    with pytest.raises(EvaluationError, match=r"no prediction in '.*pred' of a, b: .*--chill"):
        pairs_of_folders(*folders, ".nii.gz")
    assert [pair.case for pair in pairs_of_folders(*folders, ".nii.gz", chill=True)] == ["c"]


@pytest.mark.parametrize("chill", [False, True])
def test_predictions_without_reference_are_always_refused(folders, chill):
    (folders[0] / "b.nii.gz").unlink()
    with pytest.raises(EvaluationError, match=r"no reference in '.*gt' of b: "):
        pairs_of_folders(*folders, ".nii.gz", chill=chill)


def test_folders_without_segmentations_are_refused(folders):
    with pytest.raises(EvaluationError, match=r"folder of the references '.*gt' has no segmentation ending in '.png'"):
        pairs_of_folders(*folders, ".png")
    with pytest.raises(EvaluationError, match=r"folder of the predictions '.*none' does not exist"):
        pairs_of_folders(folders[0], folders[1] / "none", ".nii.gz")
