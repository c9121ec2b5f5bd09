"""Model folders with other weights, another norm or another trainer than the model they come from, whole or not there."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_norm.errors import ModelFolderError, OutputError
from nnunet_norm.planning.configurations import heirs
from nnunet_norm.planning.naming import check_plans_name
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.model_folder import check_model_folder
from nnunet_norm.prediction.safe_loading import load_checkpoint
from nnunet_norm.writing import write_json, written_beside

_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory", "cannot be opened")
"""What torch's errors say when it cannot open or fill a file; there is no class for it."""

NOTE = "nnunet_norm.json"
"""Beside plans.json: where a model comes from that was not trained as it is."""

Fold = int | str
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class PlannedNorm:
    """A norm as plans name it.

    Attributes:
        op: dotted path of a class that is called as ``op(channels, **kwargs)``; None: no norm.
        kwargs: for its constructor.
    """

    op: str | None
    kwargs: Mapping[str, Any]


def load_model(
    folder: str | Path, folds: Sequence[Fold], checkpoint_name: str, *, trust_checkpoint: bool = False
) -> CasePredictor:
    """A trained model on the CPU as nnU-Net loads it, with the weights of every fold checked against the network.

    Args:
        folder: the model.
        folds: which to load.
        checkpoint_name: the checkpoint's file name in every fold.
        trust_checkpoint: see ``CasePredictor.trust_checkpoint``.

    Raises:
        ModelFolderError, SetupError: see ``CasePredictor.initialize_from_trained_model_folder``.
    """
    with redirect_stdout(StringIO()):  # nnU-Net tells that the CPU is no GPU, and where it looks for the trainer
        loaded = CasePredictor(device=torch.device("cpu"), allow_tqdm=False)
        loaded.trust_checkpoint = trust_checkpoint
        loaded.initialize_from_trained_model_folder(str(folder), folds, checkpoint_name)
    loaded.bare_network.eval()
    return loaded


def complete_folds(folder: str | Path, checkpoint_name: str) -> list[Fold]:
    """The folds of a model that have the checkpoint, "all" too, in order.

    Raises:
        ModelFolderError: see ``check_model_folder``; or there is none.
    """
    names = [path.parent.name.removeprefix("fold_") for path in Path(folder).glob(f"fold_*/{checkpoint_name}")]
    folds: list[Fold] = [*sorted(int(name) for name in names if name.isdecimal()), *(["all"] if "all" in names else [])]
    check_model_folder(str(folder), folds or None, checkpoint_name)
    return folds


def configuration_of(folder: str | Path, fold: Fold, checkpoint_name: str, *, trust_checkpoint: bool = False) -> str:
    """Name of the configuration that a model was trained with.

    Raises:
        ModelFolderError: the checkpoint would run code, unless ``trust_checkpoint``.
    """
    path = Path(folder) / f"fold_{fold}" / checkpoint_name
    checkpoint = load_checkpoint(path, trust=trust_checkpoint, mmap=True)
    return str(checkpoint["init_args"]["configuration"])


def write_model(
    source: str | Path,
    target: str | Path,
    *,
    folds: Sequence[Fold],
    checkpoint_name: str = "checkpoint_final.pth",
    weights: Callable[[Fold, Weights], Weights] | None = None,
    norm: PlannedNorm | None = None,
    trainer_name: str | None = None,
    plans_name: str | None = None,
    note: Mapping[str, Any] | None = None,
    outdated: str | None = None,
    check: Callable[[CasePredictor], None] | None = None,
    trust_checkpoint: bool = False,
) -> None:
    """Write a model folder that every command of nnU-Net takes, from one that is there and stays as it is.

    A checkpoint has what predicting and ``-pretrained_weights`` read, and nothing that a training is continued from
    (optimizer, log): about half of the size. It holds tensors and plain values only. Before the folder has its name, it is
    loaded by nnU-Net's own predictor.

    Args:
        source: a trained model.
        target: the folder to write; it must not exist.
        folds: which folds to write.
        checkpoint_name: of the source, and of what is written.
        weights: called as ``weights(fold, state_dict)``, gives the state dict to write; None: the one that is there.
        norm: what the plans of the model's configuration name as norm from now on; None: what they name.
        trainer_name: what the checkpoints name as trainer; None: the one that they name.
        plans_name: new name of the plans; None: the name that they have.
        note: where the model comes from, written as ``nnunet_norm.json`` beside plans.json. A note of the source goes into
            it as ``"before"``.
        outdated: what to say in each fold's summary of the validation if that does not hold for the new weights.
        check: called with the new model, loaded; an error leaves nothing behind.
        trust_checkpoint: the source may run code of its own when it is read.

    Raises:
        ModelFolderError: the source is not whole, or would run code; or what was written is not of the network that its plans
            describe.
        OutputError: the target exists, or cannot be written.
        PlansError: ``plans_name`` cannot be one.
    """
    source = Path(source)
    check_model_folder(str(source), list(folds), checkpoint_name)
    plans = load_json(str(source / "plans.json"))
    configuration = configuration_of(source, folds[0], checkpoint_name, trust_checkpoint=trust_checkpoint)
    if norm is not None:
        plans = plans_with_norm(plans, configuration, norm)
    if plans_name is not None:
        check_plans_name(plans_name)
        plans = plans | {"plans_name": plans_name}
    with _written_whole(Path(target)) as folder:
        write_json(folder / "plans.json", plans)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            _copy(source / name, folder / name)
        if note is not None:
            before = {"before": load_json(str(source / NOTE))} if (source / NOTE).is_file() else {}
            write_json(folder / NOTE, {**note, **before})
        for fold in folds:
            old, new = (path / f"fold_{fold}" for path in (source, folder))
            checkpoint = load_checkpoint(old / checkpoint_name, trust=trust_checkpoint)
            state = checkpoint["network_weights"]
            init_args = {"plans": plans, "configuration": configuration, "fold": fold}
            content = {
                "network_weights": state if weights is None else weights(fold, state),
                "init_args": {**init_args, "dataset_json": load_json(str(source / "dataset.json"))},
                "trainer_name": trainer_name or checkpoint["trainer_name"],
                "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
            }
            new.mkdir()
            write_checkpoint(new / checkpoint_name, content)
            _copy_what_sharing_needs(old, new, outdated)
        try:
            loaded = load_model(folder, folds, checkpoint_name, trust_checkpoint=trust_checkpoint)
        except ModelFolderError as error:  # the folder will not have had this name
            raise ModelFolderError(str(error).replace(str(folder), str(target))) from error
        if check is not None:
            check(loaded)


def plans_with_norm(plans: dict[str, Any], configuration: str, norm: PlannedNorm) -> dict[str, Any]:
    """New plans in which one configuration names another norm; those that inherit from it keep what they had.

    The block ``"nnunet_norm"`` of a configuration stays: it tells how the model was trained, and stock nnU-Net ignores it.

    Raises:
        ModelFolderError: the architecture takes no norm from the plans.
    """
    changed = copy.deepcopy(plans)
    manager = PlansManager(plans)
    architecture = copy.deepcopy(manager.get_configuration(configuration).configuration["architecture"])
    kwargs = architecture["arch_kwargs"]
    if "norm_op" not in kwargs:
        raise ModelFolderError(
            f"the architecture {architecture['network_class_name']} of {configuration} takes no norm_op, so plans cannot "
            "name its norm: use the model with this package"
        )
    kwargs |= {"norm_op": norm.op, "norm_op_kwargs": dict(norm.kwargs)}
    architecture["_kw_requires_import"] = list(dict.fromkeys([*architecture["_kw_requires_import"], "norm_op"]))
    changed["configurations"][configuration]["architecture"] = architecture
    for heir in heirs(plans, configuration):
        kept = manager.get_configuration(heir).configuration["architecture"]
        if PlansManager(changed).get_configuration(heir).configuration["architecture"] != kept:
            changed["configurations"][heir]["architecture"] = copy.deepcopy(kept)
    return changed


def write_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    with checkpoint_beside(path) as beside:
        torch.save(dict(content), beside)


@contextmanager
def checkpoint_beside(path: str | Path) -> Iterator[Path]:
    """:func:`nnunet_norm.writing.written_beside` for ``torch.save``, which has errors of its own.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    with written_beside(path) as beside:
        try:
            yield beside
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if not any(words in reason for words in _WRITER):
                raise
            raise OutputError(f"{path} cannot be written ({reason}): make room, or choose another folder") from error


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to be filled; it is renamed when the block ends well, and removed when not."""
    if os.path.lexists(target):
        raise OutputError(f"{target} is there already, and is not overwritten: choose another name, or remove it")
    beside = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{target} cannot be written ({reason}): make room, or choose another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # after the rename there is nothing left to remove


def _copy(source: Path, target: Path) -> None:
    """Copy a file, if it is there."""
    if source.is_file():
        with written_beside(target) as beside:
            shutil.copyfile(source, beside)


def _copy_what_sharing_needs(old: Path, new: Path, outdated: str | None) -> None:
    """What nnUNetv2_export_model_to_zip takes of every fold besides the checkpoint."""
    for name in ("progress.png", "debug.json"):
        _copy(old / name, new / name)
    summary = old / "validation" / "summary.json"
    if summary.is_file():
        (new / "validation").mkdir()
        said = {} if outdated is None else {"nnunet_norm": outdated}
        write_json(new / "validation" / "summary.json", {**said, **load_json(str(summary))})
