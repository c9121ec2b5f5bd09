"""From images to an ensemble: every model predicts in its turn, then the probabilities are averaged.

Predictions of the members lie in a hidden folder of the output until all cases are averaged, so that a run that is killed
goes on where it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_norm.ensembling.members import Member, check_case, check_members
from nnunet_norm.ensembling.merging import Merging, alone_in, check_other_folder, merge_cases, write_descriptions
from nnunet_norm.ensembling.models import Model, check_models
from nnunet_norm.ensembling.postprocessing import Postprocessing
from nnunet_norm.ensembling.record import Record, digest_of, state_of
from nnunet_norm.errors import InputImageError
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.checks import case_name, check_output_folder, find_cases
from nnunet_norm.prediction.continuing import identity_of_software
from nnunet_norm.writing import write_json

logger = logging.getLogger(__name__)

MEMBERS = ".members"
"""The hidden folder of the members' predictions."""

IMAGES = "images.json"
"""In a member's folder: of which images its predictions are."""


@dataclass(frozen=True)
class Prediction:
    """How every model predicts.

    Attributes:
        predictor: makes a new predictor, without a model.
        options: what its predictions depend on; JSON.
        checkpoint_name: file name of the checkpoints.
        num_processes_preprocessing: 0 for none.
        num_processes_segmentation_export: 0 for none.
        shared_statistics: whether a case's prediction depends on which other cases there are.
    """

    predictor: Callable[[], HaloPredictor]
    options: Mapping[str, Any]
    checkpoint_name: str = "checkpoint_final.pth"
    num_processes_preprocessing: int = 1
    num_processes_segmentation_export: int = 1
    shared_statistics: bool = False


def predict_ensemble(
    models: Sequence[Model],
    images: str,
    output: str | Path,
    prediction: Prediction,
    merging: Merging,
    *,
    before: Sequence[Postprocessing | None] | None = None,
    keep_members: bool = False,
) -> None:
    """Predict a folder of images with several models and average them; cases that are done are kept.

    Trainers, plans, configurations and folds of the models may differ.

    Args:
        models: at least one; the order matters for the last bit only.
        images: the folder, named ``<case>_0000<ending>`` by channel.
        output: the folder to write.
        prediction: how every model predicts.
        merging: how the average is made and written.
        before: per model what is applied to its prediction before it is averaged.
        keep_members: leave the models' predictions in the output folder, in ``members``.

    Raises:
        ModelFolderError, EnsembleError: models that are not whole, or do not go together, before anything is predicted.
        InputImageError: cases that could not be predicted; what could is kept for the next run.
        OutputError: a file cannot be written.
    """
    check_models(models, prediction.checkpoint_name)
    before = list(before) if before is not None else [None] * len(models)
    ending = models[0].dataset_json["file_ending"]
    files = {case_name(case, ending): case for case in find_cases(images, ending)}
    check_other_folder(output, [images], "predicted")
    folders = {model: Path(output, MEMBERS, _folder_name(model, prediction, files)) for model in models}
    members = [_member(model, folders[model], post, files) for model, post in zip(models, before, strict=True)]
    with alone_in(output):
        _predict_and_merge(folders, files, members, output, prediction, merging)
        _clear(Path(output), folders, keep=keep_members)


def _predict_and_merge(
    folders: Mapping[Model, Path],
    files: Mapping[str, Sequence[str]],
    members: Sequence[Member],
    output: str | Path,
    prediction: Prediction,
    merging: Merging,
) -> None:
    """Make what is not done; raises InputImageError after all others, if there are cases that could not be predicted."""
    predictions = [folder.name for folder in folders.values()]
    record = Record(output, {**merging.settings(members), "predictions": predictions})
    sources = {case: [state_of(path) for path in paths] for case, paths in files.items()}
    outputs = {case: merging.outputs(output, case, members[0].file_ending) for case in files}
    done = [case for case in files if record.is_done(case, sources[case], outputs[case])]
    todo = [case for case in files if case not in set(done)]
    failures = []
    for number, (model, folder) in enumerate(folders.items(), 1):
        if not todo:
            break
        logger.info(f"model {number} of {len(folders)}: {model.name}, fold {', '.join(map(str, model.folds))}")
        needed = files if prediction.shared_statistics else {case: files[case] for case in todo}
        try:
            _predict(model, needed, folder, prediction)
        except InputImageError as error:  # of cases; the others are predicted
            failures.append(str(error))
            todo = [case for case in todo if _is_predicted(model, folder, case)]
    if todo:
        members = [replace(member, files={case: member.files[case] for case in todo}) for member in members]
        check_members(members)
        for case in todo:
            check_case(members, case)
        write_descriptions(members[0], output)
        record.keep_only(done)
        merge_cases(members, todo, output, merging, lambda case: record.note(case, sources[case], outputs[case]))
    if failures:
        raise InputImageError("; ".join(failures))


def _member(model: Model, folder: Path, before: Postprocessing | None, files: Mapping[str, Sequence[str]]) -> Member:
    paths = {case: folder / f"{case}.npz" for case in files}
    return Member(model.name, model.plans, model.dataset_json, paths, before)


def _folder_name(model: Model, prediction: Prediction, files: Mapping[str, Sequence[str]]) -> str:
    """The member's folder: another one as soon as its predictions would be others."""
    checkpoints = [state_of(model.folder / f"fold_{fold}" / prediction.checkpoint_name) for fold in model.folds]
    identity: dict[str, Any] = {
        "plans": model.plans,
        "dataset": model.dataset_json,
        "checkpoints": checkpoints,
        "options": dict(prediction.options),
        "software": identity_of_software(),
    }
    if prediction.shared_statistics:
        identity["images"] = [state_of(path) for paths in files.values() for path in paths]
    return f"{model.name}-{digest_of(identity)}"


def _predict(model: Model, files: Mapping[str, Sequence[str]], folder: Path, prediction: Prediction) -> None:
    """Predict what the member's folder lacks."""
    check_output_folder(str(folder))
    states = {case: [state_of(path) for path in paths] for case, paths in files.items()}
    _forget_changed_images(model, folder, states)
    if all(_is_predicted(model, folder, case) for case in files):
        return
    predictor = prediction.predictor()
    predictor.initialize_from_trained_model_folder(str(model.folder), model.folds, prediction.checkpoint_name)
    predictor.predict_from_files(
        [list(paths) for paths in files.values()],
        [str(folder / case) for case in files],
        save_probabilities=True,
        overwrite=False,
        num_processes_preprocessing=prediction.num_processes_preprocessing,
        num_processes_segmentation_export=prediction.num_processes_segmentation_export,
    )


def _files_of(model: Model, folder: Path, case: str) -> list[Path]:
    return [folder / f"{case}{end}" for end in (model.dataset_json["file_ending"], ".npz", ".pkl")]


def _is_predicted(model: Model, folder: Path, case: str) -> bool:
    return all(path.is_file() for path in _files_of(model, folder, case))


def _forget_changed_images(model: Model, folder: Path, states: Mapping[str, Any]) -> None:
    """Remove the predictions of images that have changed since, then write down of which images those to come are."""
    try:
        known = json.loads((folder / IMAGES).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or cut off: then nothing is known of what is there
        known = {}
    for case, state in states.items():
        if known.get(case) != json.loads(json.dumps(state)):
            for path in _files_of(model, folder, case):
                path.unlink(missing_ok=True)
    write_json(folder / IMAGES, {**known, **states})


def _clear(output: Path, folders: Mapping[Model, Path], *, keep: bool) -> None:
    """Remove the members' predictions, or give them names that are seen."""
    if keep:
        names = [f"{model.name}__fold_{'_'.join(map(str, model.folds))}" for model in folders]
        for number, folder in enumerate(folders.values()):
            if folder.is_dir():
                same = names[:number].count(names[number])  # models of other folders may have the same name
                target = output / "members" / (f"{names[number]}__{same + 1}" if same else names[number])
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                os.replace(folder, target)
    shutil.rmtree(output / MEMBERS, ignore_errors=True)
