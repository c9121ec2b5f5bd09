"""Which case belongs to which experimental batch: ``experimental_batches.json`` beside a dataset's ``dataset.json``.

An experimental batch is a set of images with technical conditions in common: a plate, a scanner, a site. The file names
one for every case, and, where they are known, the control images, which carry the conditions and no treatment::

    {"batches": {"case_001": "plate_1", "case_002": "plate_1", "case_003": "plate_2"}, "controls": ["case_001"]}
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

from nnunet_norm.errors import ExperimentalBatchesError

FILE_NAME = "experimental_batches.json"

FEWEST_CASES = 2
"""An experimental batch of one case cannot be trained on and validated in one cross-validation."""

SHOWN = 5
"""Names that a message lists before it counts."""


@dataclass(frozen=True)
class ExperimentalBatches:
    """Experimental batches and their cases.

    Attributes:
        batches: Case identifier -> name of its experimental batch. Cases that are not in the training set may be among them.
        controls: Cases that are controls.
        source: Where this was read, for messages.

    Raises:
        ExperimentalBatchesError: No case, a name that is no text or empty, or a control without an experimental batch.

    References:
        Lin and Lu 2022, doi 10.1101/2022.10.14.512286 (batch effects normalization, BEN).
    """

    batches: Mapping[str, str]
    controls: frozenset[str] = frozenset()
    source: str = FILE_NAME

    def __post_init__(self) -> None:
        if not isinstance(self.batches, Mapping) or not self.batches:
            raise self._error('"batches" must be an object of at least one "case": "name of its experimental batch"')
        for case, name in self.batches.items():
            if not isinstance(name, str) or not name:
                raise self._error(f"the experimental batch of {case!r} is {name!r}; it must be a name")
        if unknown := sorted(self.controls - self.batches.keys()):
            raise self._error(f'"controls" names {listed(unknown)}, which "batches" does not; add each there')

    @classmethod
    def from_json(cls, content: Any, source: str = FILE_NAME) -> Self:
        """Read what the file holds, as ``json`` returns it.

        Raises:
            ExperimentalBatchesError: It is not what the module describes.
        """
        if not isinstance(content, dict) or "batches" not in content:
            raise ExperimentalBatchesError(f'{source}: it must be an object with "batches", and if you like "controls"')
        if unknown := sorted(content.keys() - {"batches", "controls"}):
            raise ExperimentalBatchesError(
                f'{source}: {listed(unknown)} is not known; there are "batches" and "controls"'
            )
        controls = content.get("controls", [])
        if not isinstance(controls, list) or not all(isinstance(case, str) for case in controls):
            raise ExperimentalBatchesError(f'{source}: "controls" is {controls!r}; it must be a list of cases')
        return cls(content["batches"], frozenset(controls), source)

    @property
    def names(self) -> tuple[str, ...]:
        """Every experimental batch, sorted."""
        return tuple(sorted(set(self.batches.values())))

    def cases_of(self, name: str, controls_only: bool = False) -> list[str]:
        """The cases of an experimental batch, sorted.

        Raises:
            ExperimentalBatchesError: There is no such experimental batch, or it has no controls and they are asked for.
        """
        cases = sorted(case for case, batch in self.batches.items() if batch == name)
        if not cases:
            raise self._error(f"there is no experimental batch {name!r}; there are {listed(self.names)}")
        if controls_only:
            cases = [case for case in cases if case in self.controls]
            if not cases:
                raise self._error(f'experimental batch {name!r} has no controls; name them under "controls"')
        return cases

    def grouped(self, cases: Iterable[str]) -> dict[str, list[str]]:
        """``cases`` by experimental batch, names and cases sorted; only those that have cases.

        Raises:
            ExperimentalBatchesError: As :meth:`require`.
        """
        cases = sorted(cases)
        self.require(cases)
        groups: dict[str, list[str]] = {}
        for case in cases:
            groups.setdefault(self.batches[case], []).append(case)
        return dict(sorted(groups.items()))

    def require(self, cases: Iterable[str]) -> None:
        """Refuse ``cases`` of which one has no experimental batch.

        Raises:
            ExperimentalBatchesError: It names them, see :func:`missing_cases`.
        """
        if missing := missing_cases(self, cases):
            raise self._error(missing)

    def _error(self, text: str) -> ExperimentalBatchesError:
        return ExperimentalBatchesError(f"{self.source}: {text}")


def listed(names: Sequence[str], most: int = SHOWN) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def load_experimental_batches(path: str | os.PathLike[str]) -> ExperimentalBatches:
    """Read a file of experimental batches.

    Raises:
        ExperimentalBatchesError: It cannot be read, is no JSON, names a case twice or is not what the module describes.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ExperimentalBatchesError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExperimentalBatchesError(f"{path} is not JSON ({error}); write it in UTF-8") from error

    def without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if repeated := sorted(
            key for key, count in counts.items() if count > 1
        ):  # json would keep the last one silently
            raise ExperimentalBatchesError(f"{path}: {listed(repeated)} stands in it more than once")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=without_repetitions)
    except json.JSONDecodeError as error:
        raise ExperimentalBatchesError(f"{path} is not JSON: {error}") from error
    return ExperimentalBatches.from_json(content, str(path))


def find_experimental_batches(dataset_name: str) -> Path:
    """The file of a dataset: beside ``dataset.json`` in nnUNet_raw, else in nnUNet_preprocessed.

    Raises:
        ExperimentalBatchesError: It is in neither.
    """
    folders = [
        Path(str(variable)) / dataset_name for variable in (nnUNet_raw, nnUNet_preprocessed) if variable.is_set()
    ]
    for folder in folders:
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    where = " or ".join(str(folder) for folder in folders) or "nnUNet_raw and nnUNet_preprocessed, which are not set"
    raise ExperimentalBatchesError(
        f'there is no {FILE_NAME} in {where}; write it as {{"batches": {{"case_001": "plate_1", ...}}}}'
    )


def missing_cases(batches: ExperimentalBatches, cases: Iterable[str]) -> str:
    """Which of ``cases`` have no experimental batch, and, since they may be misspelt, what is there instead; or nothing."""
    cases = set(cases)
    missing = sorted(cases - batches.batches.keys())
    if not missing:
        return ""
    others = sorted(batches.batches.keys() - cases)
    hint = f" ({listed(others, 2)} in it are no cases of the dataset)" if others else ""
    return (
        f"{len(missing)} of {len(cases)} cases have no experimental batch: {listed(missing)}{hint}; name one for each"
    )


def small_batches(batches: ExperimentalBatches, cases: Iterable[str]) -> str:
    """Which experimental batches have fewer than :data:`FEWEST_CASES` of ``cases``, but not none; or nothing."""
    groups = batches.grouped(case for case in cases if case in batches.batches)
    small = [f"{name} ({members[0]})" for name, members in groups.items() if len(members) < FEWEST_CASES]
    if not small:
        return ""
    return f"experimental batches of one case: {listed(small)}; give them more cases, or the name of another batch"


def untrained_batches(batches: ExperimentalBatches, splits: Sequence[Mapping[str, Sequence[str]]]) -> str:
    """Which experimental batches a fold validates on without having trained on them; or nothing.

    Args:
        batches: The experimental batches.
        splits: The folds as ``splits_final.json`` has them, each with the cases of "train" and "val".
    """
    folds: dict[str, list[str]] = {}
    for fold, split in enumerate(splits):
        trained, validated = (
            {batches.batches[case] for case in split[key] if case in batches.batches} for key in ("train", "val")
        )
        for name in validated - trained:
            folds.setdefault(name, []).append(str(fold))
    if not folds:
        return ""
    where = [f"{name} (fold {', '.join(folds[name])})" for name in sorted(folds)]
    return f"experimental batches that a fold validates on without a training case: {listed(where)}"
