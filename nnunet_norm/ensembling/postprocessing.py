"""nnU-Net's postprocessing: found, read without running foreign code, and applied to a segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)
from nnunetv2.utilities.file_path_utilities import folds_tuple_to_string
from numpy.typing import NDArray

from nnunet_norm.ensembling.pickles import load_restricted
from nnunet_norm.ensembling.record import changed_since
from nnunet_norm.errors import EnsembleError

FILE = "postprocessing.pkl"
"""What nnU-Net's determine_postprocessing writes."""

POSTPROCESSED = "postprocessed"
"""Where it leaves what its choice makes of the segmentations."""

_FUNCTION = remove_all_but_largest_component_from_segmentation
_ARGUMENTS = {"labels_or_regions", "background_label"}


@dataclass(frozen=True)
class Postprocessing:
    """What ``nnUNetv2_apply_postprocessing`` would do with a segmentation.

    Attributes:
        path: the file that tells it.
        arguments: of every call of nnU-Net's function that keeps the largest component, in order.
    """

    path: Path
    arguments: tuple[dict[str, Any], ...]

    def __call__(self, segmentation: NDArray[Any]) -> NDArray[Any]:
        """The segmentation (x, y, z) without the components that are removed; what was given stays as it is.

        Components are labelled on the whole image, which takes several times its memory.
        """
        return np.asarray(apply_postprocessing(segmentation, [_FUNCTION] * len(self.arguments), list(self.arguments)))


def load_postprocessing(path: str | Path) -> Postprocessing:
    """Read a ``postprocessing.pkl``.

    Raises:
        EnsembleError: it is not there, not whole, or would do something else than nnU-Net's own postprocessing.
    """
    path = Path(path)
    if not path.is_file():
        raise EnsembleError(
            f"postprocessing {path} is not there: nnunet-norm ensemble --find and nnUNetv2_find_best_configuration write "
            f"it for the best, nnUNetv2_determine_postprocessing for any"
        )
    found = load_restricted(path, {f"{_FUNCTION.__module__}.{_FUNCTION.__qualname__}": _FUNCTION})
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, list) for part in found)):
        raise EnsembleError(f"postprocessing {path} is not what nnU-Net writes: determine it anew")
    functions, arguments = found
    if len(functions) != len(arguments) or any(function is not _FUNCTION for function in functions):
        raise EnsembleError(f"postprocessing {path} names functions that are not nnU-Net's: determine it anew")
    for given in arguments:
        if not isinstance(given, dict) or not {"labels_or_regions"} <= set(given) <= _ARGUMENTS:
            raise EnsembleError(f"postprocessing {path} has arguments that are not nnU-Net's: determine it anew")
        if given.get("background_label", 0) != 0:
            raise EnsembleError(
                f"postprocessing {path} turns what it removes into label {given['background_label']}, and only 0, the "
                "background, is known: determine it anew"
            )
    return Postprocessing(path, tuple(arguments))


def postprocessing_in(folder: Path) -> Postprocessing:
    """The postprocessing that was determined on the cross-validation in a folder.

    Raises:
        EnsembleError: a search has noted of what files it was determined, and they have changed; see also
            ``load_postprocessing``.
    """
    found = load_postprocessing(folder / FILE)
    changed = [*changed_since(folder / POSTPROCESSED), *changed_since(folder)]
    if changed:
        raise EnsembleError(
            f"postprocessing {found.path} was determined before {changed[0]} was written anew: search again with nnunet-norm "
            "ensemble --find, or name a file with -pp_pkl_file"
        )
    return found


def postprocessing_of_model(folder: str | Path, folds: Sequence[int | str]) -> Postprocessing:
    """The model's own postprocessing, determined on the cross-validation of exactly these folds.

    Raises:
        EnsembleError: it was not determined; see also ``load_postprocessing``.
    """
    joined = Path(folder) / f"crossval_results_folds_{folds_tuple_to_string(list(folds))}"
    if not (joined / FILE).is_file():
        first = "" if joined.is_dir() else "search once with nnunet-norm ensemble --find, then "
        raise EnsembleError(
            f"model {Path(folder).name} has no postprocessing of its own for fold {', '.join(map(str, folds))}: {first}run "
            f"nnUNetv2_determine_postprocessing -i {joined} -ref REFERENCES, or name one with -pp_pkl_file"
        )
    return postprocessing_in(joined)
