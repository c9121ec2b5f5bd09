"""What the scores of segmentations are called: keys of summaries, columns of tables, words of command lines."""

from __future__ import annotations

DICE, NSD, HD95 = "Dice", "NSD", "HD95"

METRICS = (DICE, NSD)
"""By which the best model or pair can be chosen."""

SMALLER_IS_BETTER = frozenset({HD95})
"""Distances. They have no value (NaN) for a class that only one of two segmentations has, where Dice and NSD are 0."""

EVERY = "*"
"""The key of a tolerance for all classes that have none of their own."""
