"""Classes as nnU-Net evaluates them, and the tolerance of each."""

import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from label_files import dataset

from nnunet_norm.errors import EvaluationError
from nnunet_norm.evaluation import DEFAULT_TOLERANCE, Classes

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}


def test_labels_are_classes_under_their_names():
    """In nnU-Net's order, without background and ignore label; [2] is the label 2."""
    classes = Classes.of(dataset({"background": 0, "b": [2], "a": 1, "ignore": 3}))
    assert dict(classes.names) == {1: "a", 2: "b"}
    assert (classes.known, classes.ignored) == ((0, 1, 2), 3)


def test_regions_are_classes_where_there_are_any():
    classes = Classes.of(dataset(REGIONS, regions_class_order=[1, 2, 3]))
    assert dict(classes.names) == {(1, 2, 3): "whole", (2, 3): "core", 3: "enhancing"}
    assert (classes.known, classes.ignored) == ((0, 1, 2, 3), 4)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (2, [2, 2, 2]),
        ({}, [DEFAULT_TOLERANCE] * 3),
        ({"core": 3}, [DEFAULT_TOLERANCE, 3, DEFAULT_TOLERANCE]),
        ({"(2, 3)": 3, "*": 0.5}, [0.5, 3, 0.5]),
        ({"3": 0, "whole": 4, "core": 2}, [4, 2, 0]),
    ],
)
def test_every_class_has_a_tolerance(asked, expected):
    """One for all; or per class by name or by nnU-Net's key, with one for the others."""
    classes = Classes.of(dataset(REGIONS, regions_class_order=[1, 2, 3]))
    assert list(classes.tolerances(asked).values()) == expected


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"liver": 1}, r"'liver'.* choose from whole, core, enhancing"),
        ({"core": -1}, r"tolerance -1 mm of 'core'"),
        (math.nan, "tolerance nan mm"),
        (math.inf, "tolerance inf mm"),
    ],
)
def test_a_tolerance_that_is_none_is_refused(asked, told):
    classes = Classes.of(dataset(REGIONS, regions_class_order=[1, 2, 3]))
    with pytest.raises(EvaluationError, match=told):
        classes.tolerances(asked)


@pytest.mark.parametrize(
    ("description", "told"),
    [
        ({}, "labels"),
        (dataset({"a": 1}), "Background"),
        (dataset({"background": 0}), "no label but the background"),
        (dataset({"background": 0, "a": 1, "ignore": 7}), "highest"),
        (dataset({"background": 0, "a": [1, 2]}), "regions_class_order"),
        (dataset([0, 1]), "labels of dataset.json"),
    ],
)
def test_labels_that_nnunet_does_not_take_are_refused(description, told):
    with pytest.raises(EvaluationError, match=told):
        Classes.of(description)
