"""Averaging probabilities, case by case, as ``nnUNetv2_ensemble`` does: the same voxels, in bounded memory.

    p(x) = (p_1(x) + ... + p_n(x)) / n    in single precision and in this order; labels by nnU-Net's label manager

All files of a case are read side by side, piece by piece, and their average goes to a file that is mapped into memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_norm.ensembling.members import Member, check_case, check_members, properties_of
from nnunet_norm.ensembling.postprocessing import Postprocessing
from nnunet_norm.ensembling.probabilities import VOXELS, read_header, read_pieces
from nnunet_norm.ensembling.record import Record, digest_of, state_of
from nnunet_norm.errors import EnsembleError, InputImageError
from nnunet_norm.orphans import end_with_parent
from nnunet_norm.prediction.checks import check_output_folder, read_segmentation
from nnunet_norm.prediction.export import write_prediction
from nnunet_norm.prediction.work_folder import WorkFolder
from nnunet_norm.prediction.workers import Workers
from nnunet_norm.writing import write_json


@dataclass(frozen=True)
class Merging:
    """How cases are merged.

    Attributes:
        save_probabilities: write the average, too, as nnU-Net does with ``--save_npz``.
        postprocessing: applied to the segmentation of the average; probabilities stay as they are.
        scratch: folder for the mapped files; None: beside the output.
        num_processes: cases at a time; with 1 or 0 this process does it.
        progress: show progress.
    """

    save_probabilities: bool = False
    postprocessing: Postprocessing | None = None
    scratch: str | None = None
    num_processes: int = 1
    progress: bool = True

    def outputs(self, folder: str | Path, case: str, file_ending: str) -> list[Path]:
        """The files of a case."""
        endings = [file_ending, *((".npz", ".pkl") if self.save_probabilities else ())]
        return [Path(folder, case + ending) for ending in endings]

    def settings(self, members: Sequence[Member]) -> dict[str, Any]:
        """What every case depends on, for the record; JSON."""
        return {
            "postprocessing_before": [_described(member.postprocessing) for member in members],
            "postprocessing_after": _described(self.postprocessing),
            "descriptions": digest_of([[member.plans, member.dataset_json] for member in members]),
        }


def _described(postprocessing: Postprocessing | None) -> str | None:
    return None if postprocessing is None else repr(postprocessing.arguments)


def merge_folders(members: Sequence[Member], output: str | Path, merging: Merging) -> list[str]:
    """Average what several members predicted, and write it as nnU-Net does; cases that are done are kept.

    Args:
        members: at least one; the geometry of the files is that of the first.
        output: the folder to write; with dataset.json and the first member's plans.json.
        merging: see there.

    Returns:
        The cases that were merged now.

    Raises:
        EnsembleError: members that do not go together, before anything is written; or cases that cannot be merged, after all
            others.
        OutputError: a file cannot be written.
    """
    cases = check_members(members)
    check_other_folder(output, [path.parent for member in members for path in member.files.values()], "averaged")
    paths = {case: [path for member in members for path in member.sources(case)] for case in cases}
    with alone_in(output):
        record = Record(output, merging.settings(members))
        sources = {case: [state_of(path) for path in paths[case] if path.is_file()] for case in cases}
        outputs = {case: merging.outputs(output, case, members[0].file_ending) for case in cases}
        done = [case for case in cases if record.is_done(case, sources[case], outputs[case])]
        todo = [case for case in cases if case not in set(done)]
        for case in tqdm(todo, desc="checking", disable=not merging.progress, leave=False):
            check_case(members, case)
        write_descriptions(members[0], output)
        record.keep_only(done)
        merge_cases(members, todo, output, merging, lambda case: record.note(case, sources[case], outputs[case]))
    return todo


def check_other_folder(output: str | Path, inputs: Iterable[str | Path], what: str) -> None:
    """Refuse to write among what is read.

    Raises:
        EnsembleError: the output is one of the inputs.
    """
    if os.path.realpath(output) in {os.path.realpath(folder) for folder in inputs}:
        raise EnsembleError(f"-o {output} is one of the folders that are {what}: choose another")


@contextmanager
def alone_in(output: str | Path) -> Iterator[None]:
    """Keep other ensembles out of the folder that is written, made if need be, until the block ends.

    Raises:
        OutputError: another process writes an ensemble there, or the folder cannot be written to.
    """
    check_output_folder(str(output))
    work = WorkFolder(output, os.path.join(output, ""), resume=False)  # no case's, and short however long the name is
    try:
        yield
    finally:
        work.close(remove=True)


def write_descriptions(member: Member, output: str | Path) -> None:
    """dataset.json, as nnUNetv2_ensemble leaves it, and plans.json, which postprocessing and evaluation ask for."""
    write_json(Path(output, "dataset.json"), member.dataset_json)
    write_json(Path(output, "plans.json"), member.plans)


def merge_cases(
    members: Sequence[Member],
    cases: Sequence[str],
    output: str | Path,
    merging: Merging,
    merged: Callable[[str], None],
) -> None:
    """Merge some cases; see ``merge_folders``.

    Args:
        members: checked.
        cases: checked.
        output: the folder.
        merging: see there.
        merged: called with every case whose files are written.

    Raises:
        EnsembleError: cases that cannot be merged, after all others.
        OutputError: a file cannot be written.
    """
    merge = MergeCase(tuple(members), str(output), merging)
    count = min(merging.num_processes, len(cases))
    count = count if count > 1 else 0
    task = partial(_in_worker, merge) if count else merge
    failures = []
    bar = tqdm(total=len(cases), desc="averaging", disable=not merging.progress)
    with bar, Workers(count, "averaging", "-np", finishes=False) as workers:
        for case, failure in workers.each(task, cases):
            bar.update()
            if failure is None:
                merged(case)
            else:
                failures.append(f"case {case!r}: {failure}")
    if failures:
        cases_said = f"{len(failures)} case{'s' * (len(failures) != 1)}"
        raise EnsembleError(f"{cases_said} not averaged (the others are): {'; '.join(sorted(failures))}")


def _in_worker(merge: MergeCase, case: str) -> str | None:
    """In a process of its own, which has one thread and ends with the one that started it."""
    end_with_parent()
    torch.set_num_threads(1)
    return merge(case)


@dataclass(frozen=True)
class MergeCase:
    """Merges a case, in whatever process."""

    members: tuple[Member, ...]
    output: str
    merging: Merging

    def __call__(self, case: str) -> str | None:
        """Write the files of a case whole; or tell why it cannot be merged."""
        target = os.path.join(self.output, case)
        work = WorkFolder(self.merging.scratch or self.output, target, resume=False)
        try:
            self._merge(case, target, work)
        except (EnsembleError, InputImageError) as error:  # of this case alone
            return str(error)
        finally:
            work.close(remove=True)
        return None

    def _merge(self, case: str, target: str, work: WorkFolder) -> None:
        first, paths = self.members[0], [member.files[case] for member in self.members]
        shape = read_header(paths[0]).shape
        removed = [self._removed(member, case) for member in self.members]
        probabilities = work.allocate("probabilities", shape, np.float32)
        segmentation = work.allocate("segmentation", shape[1:], _label_type(first))
        average(paths, removed, probabilities, has_regions=first.label_manager.has_regions)
        self._label(probabilities, segmentation)
        if self.merging.postprocessing is not None:
            segmentation[...] = self.merging.postprocessing(segmentation)
        write_prediction(
            segmentation,
            probabilities if self.merging.save_probabilities else None,
            properties_of(paths[0]),
            first.plans_manager.image_reader_writer_class,
            target,
            first.file_ending,
        )

    def _removed(self, member: Member, case: str) -> NDArray[np.bool_] | None:
        """Where the member's own postprocessing turns its segmentation to background, flat; None: nowhere."""
        if member.postprocessing is None:
            return None
        reader = member.plans_manager.image_reader_writer_class()
        before = read_segmentation(str(member.segmentation(case)), reader)[0]
        removed = (member.postprocessing(before) == 0) & (before != 0)
        return removed.ravel() if removed.any() else None

    def _label(self, probabilities: NDArray[np.float32], segmentation: NDArray[Any]) -> None:
        manager = self.members[0].label_manager
        flat, labels = probabilities.reshape(len(probabilities), -1), segmentation.reshape(-1)
        step = max(VOXELS // len(flat), 1)
        for start in range(0, labels.size, step):
            labels[start : start + step] = manager.convert_probabilities_to_segmentation(flat[:, start : start + step])


def average(
    paths: Sequence[Path],
    removed: Sequence[NDArray[np.bool_] | None],
    result: NDArray[np.float32],
    *,
    has_regions: bool,
) -> None:
    """The average of several files, as ``nnunetv2.ensembling.ensemble.average_probabilities`` has it to the last bit.

    Args:
        paths: ``.npz`` files of one shape (K, x, y, z).
        removed: per file the voxels (x * y * z) that count as background: probability 1 for class 0 and 0 for all others;
            where channels are regions, 0 for all. None: none.
        result: (K, x, y, z), takes the average.
        has_regions: whether channels are regions.

    Raises:
        EnsembleError: a file is not whole, or has values that are no probabilities.
    """
    flat = result.reshape(len(result), -1)
    for pieces in zip(*(read_pieces(path) for path in paths), strict=True):
        number, place, _ = pieces[0]
        total = np.zeros(0, np.float32)
        for order, ((_, _, values), mask) in enumerate(zip(pieces, removed, strict=True)):
            if mask is not None:
                values = np.where(mask[place], values.dtype.type(number == 0 and not has_regions), values)
            if order == 0:
                total = values.astype(np.float32)
            else:
                total += values  # double precision is rounded once, after the sum, as NumPy does with whole arrays
        total /= len(paths)
        flat[number, place] = total


def _label_type(member: Member) -> type[np.unsignedinteger[Any]]:
    """Holds every label of the dataset."""
    manager = member.label_manager
    most = max([*manager.all_labels, manager.num_segmentation_heads, *(manager.regions_class_order or [])])
    return np.uint8 if most < 255 else np.uint16
