"""What is checked before a prediction starts, so that it does not fail after hours: inputs, output folder, cascade."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nnunet_norm.errors import InputImageError, OutputError
from nnunet_norm.prediction import nifti

T = TypeVar("T")

NAMES_AT_MOST = 5
"""How many cases one line lists."""


def find_cases(folder: str, file_ending: str) -> list[list[str]]:
    """Every case of a folder in nnU-Net's naming ``<case>_0000<file_ending>``: its files, by channel.

    Args:
        folder: the input folder.
        file_ending: as in dataset.json, with its dot.

    Raises:
        InputImageError: no such folder, no file with that ending, or one without a channel number.
    """
    if not os.path.isdir(folder):
        raise InputImageError(f"input folder {folder!r} does not exist: give the folder with the images (-i)")
    names = sorted(name for name in os.listdir(folder) if name.endswith(file_ending))
    if not names:
        raise InputImageError(f"input folder {folder!r} has no image ending in {file_ending!r}, as dataset.json has it")
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(file_ending))
    cases: dict[str, list[str]] = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match is None:
            wanted = name[: -len(file_ending)] + "_0000" + file_ending
            raise InputImageError(f"image {name!r} in {folder!r} has no channel number: name it {wanted!r}")
        cases.setdefault(match[1], []).append(os.path.join(folder, name))
    return list(cases.values())


def require_normalized(image: torch.Tensor) -> None:
    """Refuse an image that cannot have been normalized by its quantiles.

    Raises:
        InputImageError: it has values below 0 or above 1.
    """
    if not image.numel():  # refused by whoever looks at shapes
        return
    lowest, highest = (float(found) for found in torch.aminmax(image))
    if lowest < 0 or highest > 1:
        raise InputImageError(
            f"the preprocessed image has values from {lowest:.3g} to {highest:.3g}, and this model takes images normalized "
            "by their quantiles, 0 to 1 (input_normalization image_quantile): predict files, which are normalized so"
        )


def case_name(case: Sequence[str], file_ending: str) -> str:
    """The case that files belong to: ``case_07`` for ``[".../case_07_0000.nii.gz"]``."""
    return os.path.basename(case[0])[: -len(file_ending) - len("_0000")]


def check_channels(cases: Sequence[Sequence[str]], dataset_json: dict[str, Any], reader: Any) -> None:
    """Refuse cases whose files do not hold the channels that the model was trained on.

    One file may hold several channels (RGB). So where the number of files is not that of channels, one case of each number
    of files is read.

    Args:
        cases: per case its files.
        dataset_json: the model's dataset.json.
        reader: nnU-Net's reader for these files.

    Raises:
        InputImageError: too few or too many channels, or an image that cannot be read.
    """
    ending, channels = dataset_json["file_ending"], channel_names(dataset_json)
    suspects: dict[int, list[Sequence[str]]] = {}
    for case in cases:
        if len(case) != len(channels):
            suspects.setdefault(len(case), []).append(case)
    for alike in suspects.values():
        found = len(read_image(alike[0], ending, reader)[0]) if alike[0] else 0
        if found != len(channels):
            raise InputImageError(_wrong_channels(alike, found, channels, ending))


def read_image(case: Sequence[str], file_ending: str, reader: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The image (C, x, y, z) of a case and nnU-Net's properties of it.

    Raises:
        InputImageError: it cannot be read, or has values that are not finite and that the reader would hide.
    """
    name = f"case {case_name(case, file_ending)!r}"
    for file in case:
        if nifti.is_hidden(file, reader):
            stored = _read(partial(nifti.stored_values, file), f"image {os.path.basename(file)!r} of {name}")
            require_finite(stored, f"image {os.path.basename(file)!r} of {name}")
    return _read(lambda: reader.read_images(case), name)


def read_segmentation(file: str, reader: Any) -> NDArray[np.float32]:
    """The previous stage's segmentation (1, x, y, z).

    Raises:
        InputImageError: it cannot be read.
    """
    return read_labels(file, reader)[0]


def read_labels(file: str, reader: Any) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """A segmentation (1, x, y, z) and nnU-Net's properties of it; raises InputImageError."""
    return _read(lambda: reader.read_seg(file), f"segmentation {file!r}")


def check_image(image: NDArray[np.float32], case: Sequence[str], dataset_json: dict[str, Any]) -> None:
    """Refuse an image with other channels than the model's, or with values that are not finite.

    The raw image is checked, because preprocessing may hide such values (clipping) or fail on them.

    Raises:
        InputImageError: as said.
    """
    ending, channels = dataset_json["file_ending"], channel_names(dataset_json)
    if len(image) != len(channels):
        raise InputImageError(_wrong_channels([case], len(image), channels, ending))
    require_finite(image, f"the image of case {case_name(case, ending)!r}")


def require_finite(values: NDArray[Any] | torch.Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputImageError: with the number of such values.
    """
    isfinite = torch.isfinite if isinstance(values, torch.Tensor) else np.isfinite
    parts = (plane for part in values for plane in part) if values.ndim > 2 else values  # so that masks stay small
    bad = sum(int((~isfinite(part)).sum()) for part in parts)
    if bad:
        raise InputImageError(f"{what} has {bad} values that are not finite (NaN or infinity)")


def check_previous_stage(
    folder: str | None, previous_stage: str | None, cases: Sequence[Sequence[str]], file_ending: str
) -> None:
    """Refuse a cascade without the segmentations of its previous stage, and such segmentations without a cascade.

    Args:
        folder: where the segmentations of the previous stage are.
        previous_stage: the configuration's previous stage; None if it is not a cascade.
        cases: per case its files.
        file_ending: as in dataset.json, with its dot.

    Raises:
        InputImageError: as said, or a segmentation that is missing.
    """
    if (folder is None) != (previous_stage is None):
        raise InputImageError(
            f"this configuration continues the cascade's {previous_stage!r}: give its segmentations "
            f"(-prev_stage_predictions)"
            if folder is None
            else f"-prev_stage_predictions {folder!r} is of no use: this configuration is not the second stage of a cascade"
        )
    if folder is not None:
        files = [os.path.join(folder, case_name(case, file_ending) + file_ending) for case in cases]
        missing = [os.path.basename(file) for file in files if not os.path.isfile(file)]
        if missing:
            raise InputImageError(f"-prev_stage_predictions {folder!r} lacks {listed(missing)}")


def check_output_folder(folder: str) -> None:
    """Create the folder if need be, and see that a file can be made in it.

    Raises:
        OutputError: it cannot be created or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"output folder {folder!r} cannot be written ({error.strerror}): choose another (-o)"
        ) from error


def channel_names(dataset_json: dict[str, Any]) -> list[str]:
    """The model's channels in order; old datasets call them modalities."""
    names = dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]
    return [names[str(number)] for number in range(len(names))]


def listed(names: Sequence[str]) -> str:
    """Names for one line: the first few, and how many more."""
    more = len(names) - NAMES_AT_MOST
    return ", ".join(names[:NAMES_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _wrong_channels(cases: Sequence[Sequence[str]], found: int, channels: Sequence[str], ending: str) -> str:
    first = case_name(cases[0], ending)
    here = {os.path.basename(file) for file in cases[0]}
    missing = [name for name in (f"{first}_{i:04d}{ending}" for i in range(len(channels))) if name not in here]
    also = f"; also {listed([case_name(case, ending) for case in cases[1:]])}" if len(cases) > 1 else ""
    return (
        f"case {first!r} has {found} channel{'s' * (found != 1)}, the model needs {len(channels)} ({', '.join(channels)})"
        + (f": missing {listed(missing)}" if missing and found < len(channels) else "")
        + also
    )


def _read(load: Callable[[], T], what: str) -> T:
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:
        # Whatever a reader raises (there are many, each with its own exceptions), it is about these files.
        why = str(error).strip() or f"{type(error).__name__}, or its channels differ in shape or spacing"
        raise InputImageError(f"{what} cannot be read: {why.splitlines()[-1].strip()}") from error
