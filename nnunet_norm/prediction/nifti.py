"""NIfTI files as they are stored. ITK's reader, nnU-Net's default, hides two things that matter here.

It turns NaN and infinity into 0, and fills with 0 what is missing in a truncated file.
"""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray

ENDINGS = (".nii", ".nii.gz")


def is_hidden(file: str, reader: Any) -> bool:
    """Whether ``reader`` would hide what is wrong with the file."""
    return isinstance(reader, SimpleITKIO) and file.endswith(ENDINGS)


def stored_values(file: str) -> NDArray[Any]:
    """Every value as it is stored, without slope and intercept; raises one of many exceptions if the file is not whole."""
    image: Any = nibabel.load(file)
    return np.asanyarray(image.dataobj.get_unscaled())
