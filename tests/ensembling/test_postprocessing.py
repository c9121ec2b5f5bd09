import pickle

import numpy as np
import pytest
from nnunetv2.postprocessing.remove_connected_components import remove_all_but_largest_component_from_segmentation
from predicted import properties

from nnunet_norm.ensembling.pickles import load_restricted
from nnunet_norm.ensembling.postprocessing import load_postprocessing, postprocessing_of_model
from nnunet_norm.errors import EnsembleError

KEEP_LARGEST = remove_all_but_largest_component_from_segmentation


class Harmful:
    """Makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def written(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [4, 5])
def test_properties_of_images_are_read_as_they_are(tmp_path, protocol):
    """Numpy's numbers and arrays included, which can be written again; by old and new pickles."""
    told = properties() | {"nibabel_stuff": {"original_affine": np.asfortranarray(np.arange(16.0).reshape(4, 4))}}
    found = load_restricted(written(tmp_path / "x.pkl", told, protocol))
    np.testing.assert_equal(found, told)
    assert type(found["class_locations"][1]) is np.ndarray
    assert type(found["nibabel_stuff"]["original_affine"]) is np.ndarray
    np.testing.assert_equal(pickle.loads(pickle.dumps(found)), told)


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: {"spacing": x}, lambda x: ([x], [{}])])
def test_a_pickle_that_would_call_something_calls_nothing(tmp_path, wrapped):
    """Neither as properties nor as postprocessing; the refusal names what would have been called."""
    path = written(tmp_path / "x.pkl", wrapped(Harmful(str(tmp_path / "made"))))
    for load in (load_restricted, load_postprocessing):
        with pytest.raises(EnsembleError, match=r"x\.pkl would call (_io|io)\.open"):
            load(path)
    assert not (tmp_path / "made").exists()


def test_arrays_of_objects_are_refused(tmp_path):
    """An array may hold numbers alone, since objects are pickles again."""
    with pytest.raises(EnsembleError, match=r"x\.pkl is not whole, or no pickle of plain values"):
        load_restricted(written(tmp_path / "x.pkl", {"spacing": np.array([{}, None], dtype=object)}))


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"PK\x03\x04", pickle.dumps({"a": [1, 2, 3]})[:-4]])
def test_a_file_that_is_no_whole_pickle_is_refused(tmp_path, content):
    """In one line that names it."""
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(EnsembleError, match=r"x\.pkl is not whole"):
        load_restricted(tmp_path / "x.pkl")


def test_postprocessing_is_nnunets(tmp_path):
    """Every step in order, labels and regions; the segmentation that is given stays as it is."""
    segmentation = np.random.default_rng(0).integers(0, 3, (9, 9, 9)) * (
        np.random.default_rng(1).random((9, 9, 9)) < 0.2
    )
    before, steps = segmentation.copy(), [[np.int64(1), 2], 1, (2,)]
    content = ([KEEP_LARGEST] * 3, [{"labels_or_regions": step} for step in steps])
    found = load_postprocessing(written(tmp_path / "postprocessing.pkl", content))
    expected = segmentation
    for step in steps:
        expected = KEEP_LARGEST(expected, step)
    np.testing.assert_array_equal(found(segmentation), expected)
    np.testing.assert_array_equal(segmentation, before)
    assert 0 < (expected != 0).sum() < (segmentation != 0).sum()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([KEEP_LARGEST], "is not what nnU-Net writes"),
        (([KEEP_LARGEST], []), "functions that are not nnU-Net's"),
        (([3], [{}]), "functions that are not nnU-Net's"),
        (([KEEP_LARGEST], [{"labels": 1}]), "arguments that are not nnU-Net's"),
        (([KEEP_LARGEST], [{"labels_or_regions": 1, "background_label": 2}]), "turns what it removes into label 2"),
    ],
)
def test_another_postprocessing_is_refused(tmp_path, content, what):
    """What is not known is not applied."""
    with pytest.raises(EnsembleError, match=what):
        load_postprocessing(written(tmp_path / "x.pkl", content))


def test_a_models_own_is_that_of_its_folds(tmp_path):
    """Found where nnU-Net keeps the cross-validation of these folds, and of no others."""
    (tmp_path / "crossval_results_folds_0_1").mkdir()
    written(tmp_path / "crossval_results_folds_0_1" / "postprocessing.pkl", ([], []))
    assert postprocessing_of_model(tmp_path, (0, 1)).arguments == ()
    with pytest.raises(EnsembleError, match="for fold 0: search once with nnunet-norm ensemble --find, then run"):
        postprocessing_of_model(tmp_path, (0,))
    (tmp_path / "crossval_results_folds_0").mkdir()
    with pytest.raises(
        EnsembleError, match=r"fold 0: run nnUNetv2_determine_postprocessing -i .*crossval_results_folds_0"
    ):
        postprocessing_of_model(tmp_path, (0,))
