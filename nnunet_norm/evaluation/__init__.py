"""Comparing predictions with their references: what nnU-Net counts, and surface metrics in mm."""

from nnunet_norm.evaluation.comparison import Comparison, compare, per_case
from nnunet_norm.evaluation.evaluate import ABSENT, SETTINGS, evaluate_folder, evaluate_pairs, summary_of
from nnunet_norm.evaluation.options import DEFAULT_TOLERANCE, Classes, Options
from nnunet_norm.evaluation.pairs import Pair, pairs_of_folders
from nnunet_norm.evaluation.table import as_text, tolerance_in_words

__all__ = [
    "ABSENT",
    "DEFAULT_TOLERANCE",
    "SETTINGS",
    "Classes",
    "Comparison",
    "Options",
    "Pair",
    "as_text",
    "compare",
    "evaluate_folder",
    "evaluate_pairs",
    "pairs_of_folders",
    "per_case",
    "summary_of",
    "tolerance_in_words",
]
