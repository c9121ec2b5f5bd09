"""nnU-Net's datasets with every case normalized by the quantiles of its whole image; patches are cut from that.

The quantiles of a case are found once, and kept beside the preprocessed data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset, nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from tqdm import tqdm

from nnunet_norm.errors import OutputError
from nnunet_norm.inputs import NormalizedArray, Quantiles, quantiles_of, warn_of_constant
from nnunet_norm.planning.files import INPUT_QUANTILES
from nnunet_norm.training.distributed import gathered
from nnunet_norm.writing import write_json

logger = logging.getLogger(__name__)


class StoredQuantiles:
    """The quantiles of preprocessed cases in a file beside their folder; of a case that has changed since there are none.

    Args:
        folder: with the preprocessed cases.
        ending: of the file with a case's image.
    """

    def __init__(self, folder: Path, ending: str) -> None:
        self.folder, self.ending = folder, ending
        self.path = folder.parent / f"{folder.name}{INPUT_QUANTILES}.json"

    def read(self) -> dict[str, Quantiles]:
        """What is known, by case; nothing where the file is missing or damaged."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                case: tuple((float(low), float(high)) for low, high in entry["quantiles"])
                for case, entry in stored.items()
                if entry["file"] == self._stamp(case)
            }
        return {}

    def add(self, found: Mapping[str, Quantiles]) -> None:
        """Store further cases; where that is not possible they will be measured again."""
        every = {**self.read(), **found}
        try:
            write_json(
                self.path,
                {case: {"file": self._stamp(case), "quantiles": every[case]} for case in sorted(every)},
            )
        except OutputError as error:
            logger.info("the quantiles of the cases are not kept: %s", error)

    def _stamp(self, case: str) -> list[int] | None:
        """Size and time of the last change of a case's file; None without it."""
        with suppress(OSError):
            found = (self.folder / f"{case}{self.ending}").stat()
            return [found.st_size, found.st_mtime_ns]
        return None


class NormalizedCases(nnUNetBaseDataset):
    """What nnU-Net's datasets lack: mixed into them, in front."""

    ending: str
    """Of the file with a case's image."""

    known: dict[str, Quantiles] | None = None
    """Quantiles by case; None before the first is asked for."""

    def load_case(self, identifier: str) -> Any:
        """nnU-Net's method; the image is read and normalized where it is sliced, the rest is as ever."""
        image, *others = super().load_case(identifier)
        return (NormalizedArray(image, self._of(identifier, image)), *others)

    def find_quantiles(self) -> None:
        """Find the quantiles of all cases before loaders' processes start; of several processes each does a share."""
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # The file may grow while processes read it, and they share out what it lacks: the first one's reading holds.
        self.known = gathered(self._known())[0]
        missing = [case for case in self.identifiers if case not in self.known]
        mine = {case: self._of(case) for case in self._shown(missing[rank::processes])}
        for found in gathered(mine):
            self.known.update(found)
        if missing and rank == 0:
            self._stored.add({case: self.known[case] for case in missing})

    @staticmethod
    def _shown(cases: Iterable[str]) -> Iterable[str]:
        return tqdm(cases, desc="quantiles of images") if cases else cases

    @property
    def _stored(self) -> StoredQuantiles:
        return StoredQuantiles(Path(self.source_folder), self.ending)

    def _known(self) -> dict[str, Quantiles]:
        if self.known is None:
            self.known = self._stored.read()
        return self.known

    def _of(self, case: str, image: Any = None) -> Quantiles:
        known = self._known()
        if case not in known:
            found = quantiles_of(super().load_case(case)[0] if image is None else image)
            warn_of_constant(f"case {str(case)!r}", found)
            known[case] = found
        return known[case]


class NormalizedBlosc2(NormalizedCases, nnUNetDatasetBlosc2):
    """``nnUNetDatasetBlosc2`` with normalized images."""

    ending = ".b2nd"


class NormalizedNumpy(NormalizedCases, nnUNetDatasetNumpy):
    """``nnUNetDatasetNumpy`` with normalized images."""

    ending = ".npz"


def normalized_cases(dataset_class: type[nnUNetBaseDataset]) -> type[nnUNetBaseDataset]:
    """The class of datasets that normalizes what one of nnU-Net's two reads."""
    (found,) = (own for own in (NormalizedBlosc2, NormalizedNumpy) if issubclass(own, dataset_class))
    return found
