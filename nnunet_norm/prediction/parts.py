"""Which parts of a prediction that is divided among processes are still to be made: of cases, and of volumes on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nnunet_norm.errors import OutputError
from nnunet_norm.prediction import checks
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.volumes import VolumePrediction


class CaseParts:
    """The cases of a folder, divided as ``predict_from_files`` divides them: case i goes to part i modulo their number."""

    def __init__(self, predictor: CasePredictor, source: str, previous_stage_folder: str | None = None) -> None:
        """Find the cases, and look at what can be wrong with them before anything is computed.

        Args:
            predictor: with a model.
            source: folder of the images.
            previous_stage_folder: for a cascade.

        Raises:
            InputImageError, TilingError: as ``predict_from_files`` before it begins.
        """
        self.ending = predictor.dataset_json["file_ending"]
        cases = checks.find_cases(source, self.ending)
        predictor._check(cases, previous_stage_folder)
        self.names = [checks.case_name(case, self.ending) for case in cases]

    def missing(self, output: str, *, probabilities: bool) -> list[int]:
        """Numbers of the cases that have no prediction yet; a file that is there is whole.

        Args:
            output: folder of the predictions.
            probabilities: they are wanted too.
        """
        endings = [self.ending, *((".npz", ".pkl") if probabilities else ())]
        there = [all(os.path.isfile(Path(output, f"{name}{end}")) for end in endings) for name in self.names]
        return [number for number, is_there in enumerate(there) if not is_there]

    def missing_parts(self, num_parts: int, output: str, *, probabilities: bool) -> list[int]:
        """Numbers of the parts that are to be predicted yet."""
        return sorted({number % num_parts for number in self.missing(output, probabilities=probabilities)})

    def verify(self, num_parts: int, output: str, *, probabilities: bool) -> None:
        """See that every case was predicted.

        Raises:
            OutputError: cases that are missing, and the parts that they belong to.
        """
        missing = self.missing(output, probabilities=probabilities)
        if not missing:
            return
        names = checks.listed([self.names[number] for number in missing])
        parts = sorted({number % num_parts for number in missing})
        raise OutputError(
            f"{output!r} lacks {len(missing)} of {len(self.names)} cases ({names}): predict part {_listed(parts)} of "
            f"{num_parts} again (-num_parts {num_parts} -part_id {parts[0]} --continue_prediction)"
        )


def missing_volume_parts(prediction: VolumePrediction) -> list[int]:
    """Numbers of the parts that are to be predicted yet, of one volume at least.

    Args:
        prediction: of all volumes; their outputs are begun, so that settings that do not go with what is there are refused.

    Raises:
        OutputError: as said.
    """
    num_parts, found = prediction.options.num_parts, set[int]()
    for number, volume in enumerate(prediction.all_volumes):
        if prediction.is_complete(volume):
            continue
        if prediction.divides:
            found |= set(prediction.parts_of(volume).missing())
        else:
            found.add(number % num_parts)
    return sorted(found)


def _listed(numbers: Sequence[int]) -> str:
    return checks.listed([str(number) for number in numbers])
