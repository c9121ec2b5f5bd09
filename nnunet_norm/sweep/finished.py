"""Whether a training is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunet_norm.validations import FINAL, is_of_training
from nnunet_norm.writing import is_whole_checkpoint


def missing_of(results: Path, *, npz: bool = False) -> str | None:
    """What a training lacks to be finished: its final checkpoint, or a validation with that; None if it lacks nothing.

    Args:
        results: nnU-Net's folder of the fold.
        npz: whether probabilities of the validation are wanted too.
    """
    final, latest = results / FINAL, results / "checkpoint_latest.pth"
    if not (final.is_file() and is_whole_checkpoint(final)):
        return final.name
    if latest.is_file() and latest.stat().st_mtime_ns > final.stat().st_mtime_ns:
        return f"a {final.name} of the training that began since"
    summary = results / "validation" / "summary.json"
    content = read_summary(results)
    if content is None or not is_of_training(summary, results):
        return f"validation/{summary.name}"
    if npz:
        there = [path for path in summary.parent.glob("*.npz") if is_of_training(path, results)]
        if len(there) < len(content["metric_per_case"]):
            return "validation/*.npz"
    return None


def read_summary(results: Path) -> dict[str, Any] | None:
    """The summary of a fold's validation, by nnU-Net; None if there is none that can be read."""
    try:
        content = json.loads((results / "validation" / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not whole
        return None
    return content if isinstance(content, dict) and "metric_per_case" in content else None
