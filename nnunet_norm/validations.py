"""Whether what lies in a fold's validation is of the training that the fold has now."""

from __future__ import annotations

from pathlib import Path

FINAL = "checkpoint_final.pth"
"""nnU-Net writes it when a training ends; the validation comes after."""


def is_of_training(file: Path, results: Path) -> bool:
    """Whether a file was written after the fold's training ended, so that it is none of an earlier training.

    Args:
        file: of the validation; it is there.
        results: nnU-Net's folder of the fold; without a final checkpoint nothing is known against the file.
    """
    final = results / FINAL
    return not final.is_file() or file.stat().st_mtime_ns >= final.stat().st_mtime_ns
