"""A trained model's folder: what must be in it, and nnU-Net's errors about it in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files

from nnunet_norm.errors import ModelFolderError, SetupError
from nnunet_norm.writing import is_whole_checkpoint

SEARCH_PATH = "nnUNet_extTrainer"
"""nnU-Net's variable with the folders of further trainers."""


def check_model_folder(folder: str, folds: Sequence[int | str] | str | None, checkpoint_name: str) -> None:
    """Refuse a folder from which no model can be loaded, and tell what is there instead.

    Args:
        folder: a trained model, as ``<trainer>__<plans>__<configuration>``.
        folds: the folds wanted; None for all that are there.
        checkpoint_name: the checkpoint's file name in every fold.

    Raises:
        ModelFolderError: the folder, plans.json, dataset.json, a fold or a checkpoint is missing or not whole.
    """
    if not os.path.isdir(folder):
        parent = os.path.dirname(os.path.abspath(folder))
        there = _folders(parent, "") if os.path.isdir(parent) else []
        raise ModelFolderError(f"model folder {folder!r} does not exist; beside it: {', '.join(there) or 'nothing'}")
    for name in ("plans.json", "dataset.json"):
        if not os.path.isfile(os.path.join(folder, name)):
            there = sorted(os.listdir(folder))
            raise ModelFolderError(
                f"{name} is missing in model folder {folder!r}; it has: {', '.join(there) or 'nothing'}"
            )
        _require_json(os.path.join(folder, name))
    complete = [
        name[len("fold_") :]
        for name in _folders(folder, "fold_")
        if os.path.isfile(os.path.join(folder, name, checkpoint_name))
    ]
    named = [folds] if isinstance(folds, str) else folds
    wanted = [fold for fold in complete if fold != "all"] if named is None else [str(fold) for fold in named]
    missing = [fold for fold in wanted if fold not in complete]
    if missing or not wanted:
        raise ModelFolderError(
            f"model folder {folder!r} has no {checkpoint_name} for fold {', '.join(missing) or '0 to 4'}; "
            f"folds that have it (choose with -f): {', '.join(complete) or 'none'}"
        )
    for path in (os.path.join(folder, f"fold_{fold}", checkpoint_name) for fold in wanted):
        if not is_whole_checkpoint(path):
            raise ModelFolderError(f"checkpoint {path!r} is not whole: copy it again, or train the fold anew")


@contextmanager
def trainers_on_search_path() -> Iterator[None]:
    """Let nnU-Net's own lookup find this package's trainers, beside those that the user named; restored after."""
    before = os.environ.get(SEARCH_PATH)
    ours = str(files("nnunet_norm.trainers"))
    folders = before.split(os.pathsep) if before else []
    os.environ[SEARCH_PATH] = os.pathsep.join([*folders, ours] if ours not in folders else folders)
    try:
        yield
    finally:
        if before is None:
            del os.environ[SEARCH_PATH]
        else:
            os.environ[SEARCH_PATH] = before


@contextmanager
def model_errors(folder: str) -> Iterator[None]:
    """Turn the two errors that torch and nnU-Net raise about a model into refusals; they have no classes of their own.

    Raises:
        ModelFolderError: a checkpoint that does not fit the network, with the first key that differs.
        SetupError: the model's trainer is not found.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if text.startswith("Error(s) in loading state_dict"):
            raise ModelFolderError(
                f"a checkpoint in {folder!r} is not of the network that its plans describe: {_first_mismatch(text)}"
            ) from error
        if text.startswith("Could not find requested nnunet trainer"):
            trainer = text.removeprefix("Could not find requested nnunet trainer").split()[0]
            raise SetupError(
                f"trainer {trainer!r} of the model in {folder!r} is not found: name its folder in {SEARCH_PATH} "
                f'(this package\'s: export {SEARCH_PATH}="$(nnunet-norm trainers-dir)")'
            ) from error
        raise


def _first_mismatch(text: str) -> str:
    """The first difference that ``load_state_dict`` lists, sizes before missing and unexpected keys."""
    sizes = re.search(r"size mismatch for (\S+): .*?shape (torch\.Size\(.*?\)).*?model is (torch\.Size\(.*?\))", text)
    if sizes:
        key, there, here = (part.replace("torch.Size", "") for part in sizes.groups())
        return f"{key} has shape {there} and should have {here}"
    keys = re.search(r'(Missing|Unexpected) key\(s\) in state_dict: "(.*?)"', text)
    assert keys, text
    return f"{keys[2]} is {keys[1].lower()}"


def _require_json(path: str) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)
    except ValueError as error:
        raise ModelFolderError(f"{path!r} is no JSON ({error}): copy the model again") from error


def _folders(parent: str, prefix: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and entry.name.startswith(prefix))
