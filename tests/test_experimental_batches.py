"""``experimental_batches.json``: what it says, and one telling line for whatever is wrong with it."""

import json

import pytest

from nnunet_norm.errors import ExperimentalBatchesError
from nnunet_norm.experimental_batches import (
    FILE_NAME,
    ExperimentalBatches,
    find_experimental_batches,
    load_experimental_batches,
    missing_cases,
    small_batches,
    untrained_batches,
)

CONTENT = {"batches": {"c3": "plate_2", "c1": "plate_1", "c2": "plate_1", "t9": "plate_3"}, "controls": ["c2"]}


@pytest.fixture
def batches(tmp_path):
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(CONTENT))
    return load_experimental_batches(path)


def test_cases_controls_and_names_are_read_and_sorted(batches):
    assert batches.names == ("plate_1", "plate_2", "plate_3")
    assert batches.cases_of("plate_1") == ["c1", "c2"]
    assert batches.cases_of("plate_1", controls_only=True) == ["c2"]
    assert batches.grouped(["c3", "c2", "c1"]) == {"plate_1": ["c1", "c2"], "plate_2": ["c3"]}
    assert batches.batches["t9"] == "plate_3"
    assert batches.controls == {"c2"}


def test_controls_are_optional():
    assert ExperimentalBatches.from_json({"batches": {"a": "x"}}).controls == frozenset()


def test_what_is_asked_for_and_not_there_is_refused(batches):
    with pytest.raises(ExperimentalBatchesError, match="no experimental batch 'plate_4'; there are plate_1, plate_2"):
        batches.cases_of("plate_4")
    with pytest.raises(ExperimentalBatchesError, match="'plate_2' has no controls; name them"):
        batches.cases_of("plate_2", controls_only=True)


def test_missing_cases_are_named_with_what_might_be_meant(batches):
    """The first few, how many more, and names of the file that are no cases: a misspelling shows in both."""
    batches.require(["c1", "c2", "c3"])
    with pytest.raises(
        ExperimentalBatchesError,
        match=r"json: 7 of 8 cases have no experimental batch: k0, k1, k2, k3, k4 and 2 more "
        r"\(c1, c2 and 1 more in it are no cases of the dataset\); name one for each",
    ):
        batches.require([*[f"k{n}" for n in range(7)], "c3"])
    assert missing_cases(batches, ["c1"]) == ""
    assert missing_cases(ExperimentalBatches({"a": "x"}), ["a", "b"]) == (
        "1 of 2 cases have no experimental batch: b; name one for each"
    )


def test_small_batches_are_those_with_one_case_of_the_dataset(batches):
    assert small_batches(batches, ["c1", "c2", "c3", "unknown"]) == (
        "experimental batches of one case: plate_2 (c3); give them more cases, or the name of another batch"
    )
    assert small_batches(batches, ["c1", "c2"]) == ""


def test_batches_that_a_fold_validates_on_without_having_trained_on_them_are_told_by_fold(batches):
    splits = [{"train": ["c1", "c2"], "val": ["c3"]}, {"train": ["c3", "c1"], "val": ["c2"]}]
    assert untrained_batches(batches, splits) == (
        "experimental batches that a fold validates on without a training case: plate_2 (fold 0)"
    )
    assert untrained_batches(batches, splits[1:]) == ""
    assert untrained_batches(batches, []) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", 'it must be an object with "batches", and if you like "controls"'),
        ('{"c1": "plate_1"}', 'it must be an object with "batches"'),
        ('{"batches": {}}', '"batches" must be an object of at least one "case"'),
        ('{"batches": ["c1"]}', '"batches" must be an object of at least one "case"'),
        ('{"batches": {"c1": 1}}', "the experimental batch of 'c1' is 1; it must be a name"),
        ('{"batches": {"c1": ""}}', "the experimental batch of 'c1' is ''; it must be a name"),
        ('{"batches": {"c1": "a"}, "control": []}', 'control is not known; there are "batches" and "controls"'),
        ('{"batches": {"c1": "a"}, "controls": "c1"}', "\"controls\" is 'c1'; it must be a list of cases"),
        ('{"batches": {"c1": "a"}, "controls": ["c2"]}', '"controls" names c2, which "batches" does not'),
        ('{"batches": {"c1": "a", "c1": "b"}}', "c1 stands in it more than once"),
        ('{"batches": {"c1": "a"', "is not JSON: Expecting"),
    ],
)
def test_a_malformed_file_gets_one_line(tmp_path, text, message):
    path = tmp_path / FILE_NAME
    path.write_text(text)
    with pytest.raises(ExperimentalBatchesError) as refusal:
        load_experimental_batches(path)
    assert str(refusal.value).startswith(str(path))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_gets_one_line(tmp_path):
    with pytest.raises(ExperimentalBatchesError, match=r"batches.json cannot be read: No such file"):
        load_experimental_batches(tmp_path / FILE_NAME)
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ExperimentalBatchesError, match=r"batches.json is not JSON .*; write it in UTF-8"):
        load_experimental_batches(tmp_path / FILE_NAME)


def test_the_file_is_found_beside_dataset_json_raw_first(tmp_path, monkeypatch):
    folders = {name: tmp_path / name / "Dataset990_X" for name in ("raw", "preprocessed")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    with pytest.raises(
        ExperimentalBatchesError, match=r"there is no experimental_batches.json in .*raw.* or .*preproc"
    ):
        find_experimental_batches("Dataset990_X")
    for name in ("preprocessed", "raw"):
        (folders[name] / FILE_NAME).write_text(json.dumps(CONTENT))
        assert find_experimental_batches("Dataset990_X") == folders[name] / FILE_NAME
    for name in folders:
        monkeypatch.delenv(f"nnUNet_{name}")
    with pytest.raises(ExperimentalBatchesError, match="nnUNet_raw and nnUNet_preprocessed, which are not set"):
        find_experimental_batches("Dataset990_X")
