"""A trained model as one that stock nnU-Net runs: its own trainer, and the norm named in the plans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_norm.architectures import is_unetr
from nnunet_norm.errors import ArchitectureError, ModelFolderError
from nnunet_norm.layers import find_norms, get_input_normalization
from nnunet_norm.layers.domains import get_domain_statistics
from nnunet_norm.planning.naming import check_plans_name
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.model_folder import trainers_on_search_path
from nnunet_norm.prediction.model_writing import (
    Fold,
    PlannedNorm,
    complete_folds,
    configuration_of,
    load_model,
    write_model,
)
from nnunet_norm.receptive_field import trace
from nnunet_norm.receptive_field.trace import first_output
from nnunet_norm.stages.graph import operator_of
from nnunet_norm.stages.operators import Pointwise

TRAINER = "nnUNetTrainer"

_OF_DOMAINS = "domain_statistics."

TOLERANCE = 1e-4
"""Of the largest logit. Rounding stays far below it, and another norm or eps that matters above."""


@dataclass(frozen=True)
class StockExport:
    """A trained model, and what it is called as one of stock nnU-Net's.

    Attributes:
        source: its folder.
        model: the model, loaded with the weights of ``folds``.
        folds: which are exported.
        checkpoint_name: the checkpoint's file name in every fold.
        norm: what the plans will name.
        plans_name: how the plans will be called.
    """

    source: Path
    model: CasePredictor
    folds: Sequence[Fold]
    checkpoint_name: str
    norm: PlannedNorm
    plans_name: str

    @property
    def configuration(self) -> str:
        """Name of the model's configuration."""
        trust = self.model.trust_checkpoint
        return configuration_of(self.source, self.folds[0], self.checkpoint_name, trust_checkpoint=trust)

    @property
    def dataset_name(self) -> str:
        """As the plans have it."""
        return str(self.model.plans_manager.dataset_name)

    def write(self, target: str | Path) -> None:
        """Write the folder, after comparing what the old and the new network make of an image of noise.

        Raises:
            ModelFolderError: they differ; then the model has something that plans cannot name.
            OutputError: see ``write_model``.
        """
        norms = {type(norm).__name__ for norm in find_norms(self.model.bare_network).values()}
        origin = {
            "trainer": self.model.trainer_name,
            "plans": self.model.plans_manager.plans_name,
            "checkpoint": self.checkpoint_name,
            "norm": norms.pop() if norms else None,
        }
        write_model(
            self.source,
            target,
            folds=self.folds,
            checkpoint_name=self.checkpoint_name,
            weights=lambda _, state: {key: value for key, value in state.items() if not key.startswith(_OF_DOMAINS)},
            norm=self.norm,
            trainer_name=TRAINER,
            plans_name=self.plans_name,
            note={"written_by": "nnunet-norm export", "version": version("nnunet_norm"), "of": origin},
            check=self._compare,
            trust_checkpoint=self.model.trust_checkpoint,
        )

    def _compare(self, written: CasePredictor) -> None:
        difference = difference_on_noise(self.model.bare_network, written.bare_network, self.model)
        if not difference <= TOLERANCE:
            raise ModelFolderError(
                f"the model in {str(self.source)!r} gives another result with nnUNetTrainer and {self.norm.op} (relative "
                f"difference {difference:.2g}): its trainer {self.model.trainer_name} does more than plans can say"
            )


def stock_export(
    folder: str | Path,
    folds: Sequence[Fold] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    plans_name: str | None = None,
    *,
    trust_checkpoint: bool = False,
) -> StockExport:
    """Load a trained model and find out how stock nnU-Net would name it.

    Every norm with stored statistics does in eval mode what BatchNorm does, and has the keys of its state dict: BatchRenorm,
    ghost and frozen BatchNorm, InstanceNorm with running statistics. Of a model with statistics per experimental batch those
    of all together are exported, with which nnU-Net's predictor predicts, too. Models of this package's trainers with plain
    InstanceNorm, or without norms, are stock models but for the trainer's name.

    Args:
        folder: a trained model.
        folds: which to export; None: all that are there.
        checkpoint_name: the checkpoint's file name in every fold.
        plans_name: how the plans will be called; None: the old name and what the trainer's name says of the norm, as in
            ``nnUNetPlans_BRN``.
        trust_checkpoint: the model may run code of its own when it is read.

    Raises:
        ModelFolderError: the model is not whole, has norms that stock plans cannot name, or is a stock model already.
        PlansError: ``plans_name`` cannot be one.
        SetupError: the model's trainer cannot be found.
    """
    folds = complete_folds(folder, checkpoint_name) if folds is None else folds
    model = load_model(folder, folds, checkpoint_name, trust_checkpoint=trust_checkpoint)
    if is_unetr(model.bare_network):
        raise ModelFolderError(
            f"the model in {str(folder)!r} is a UNETR, which stock nnU-Net does not build: use it with this package "
            "(nnUNetv2_export_model_to_zip shares it)"
        )
    if model.input_normalization is not None:
        raise ModelFolderError(
            f"the model in {str(folder)!r} takes images normalized by quantiles (input_normalization "
            f"{model.input_normalization}), which stock nnU-Net does not do: use it with this package "
            "(nnUNetv2_export_model_to_zip shares it)"
        )
    norm = planned_norm(model, folder)
    _refuse_stock(model, folder, norm)
    old = model.plans_manager.plans_name
    if plans_name is None:
        word = model.trainer_name.removeprefix(TRAINER).strip("_") or _norm_class(model)
        plans_name = f"{old}_{re.sub('_+', '_', word)}"
    if plans_name == old:
        raise ModelFolderError(
            f"--plans-name {old} is the model's own: choose another, its norm is not that of these plans"
        )
    check_plans_name(plans_name)
    return StockExport(Path(folder), model, folds, checkpoint_name, norm, plans_name)


def planned_norm(model: CasePredictor, folder: str | Path) -> PlannedNorm:
    """The one norm of all layers, as stock plans name it."""
    norms: dict[str, Any] = find_norms(model.bare_network)
    known = [*norms.values(), get_domain_statistics(model.bare_network), get_input_normalization(model.bare_network)]
    ours = [m for m in model.bare_network.modules() if _is_of_this_package(m) and m not in known]
    if ours:
        raise ModelFolderError(
            f"the model in {str(folder)!r} has {type(ours[0]).__name__}, which stock nnU-Net has not: use it with this "
            "package"
        )
    axes = len(model.configuration_manager.patch_size)
    if not norms:
        return PlannedNorm(None, {})
    kinds = {_kind(name, norm, axes, folder) for name, norm in norms.items()}
    for what, found in (
        ("kinds of norm", kinds),
        ("eps", {norm.eps for norm in norms.values()}),
        ("affine", {bool(norm.affine) for norm in norms.values()}),
    ):
        if len(found) > 1:
            raise ModelFolderError(
                f"the model in {str(folder)!r} has different {what} ({', '.join(sorted(map(str, found)))}), and plans name "
                "one for all layers: use it with this package"
            )
    first = next(iter(norms.values()))
    return PlannedNorm(kinds.pop(), {"eps": first.eps, "affine": bool(first.affine)})


def _kind(name: str, norm: nn.Module, axes: int, folder: str | Path) -> str:
    """Dotted path of torch's norm that does in eval mode what this one does."""
    try:
        stored = isinstance(operator_of(norm, axes), Pointwise)
    except ArchitectureError as error:
        raise ModelFolderError(f"{name} of the model in {str(folder)!r} is {error}, which plans cannot name") from error
    if stored:
        return f"torch.nn.modules.batchnorm.BatchNorm{axes}d"
    if isinstance(norm, _InstanceNorm):
        return f"torch.nn.modules.instancenorm.InstanceNorm{axes}d"
    raise ModelFolderError(
        f"the model in {str(folder)!r} has {type(norm).__name__}, which plans cannot name so that stock nnU-Net builds it: "
        "use the model with this package"
    )


def _refuse_stock(model: CasePredictor, folder: str | Path, norm: PlannedNorm) -> None:
    """Refuse a model that needs nothing of this package."""
    with trainers_on_search_path(), redirect_stdout(StringIO()):
        trainer = recursive_find_trainer_class_by_name(model.trainer_name)
    if not trainer.__module__.startswith("nnunetv2.") or any(
        _is_of_this_package(m) for m in model.bare_network.modules()
    ):
        return
    advice = "; nnunet-norm recalibrate gives it stored statistics" if norm.op and "instancenorm" in norm.op else ""
    raise ModelFolderError(
        f"the model in {str(folder)!r} ({model.trainer_name}) runs in stock nnU-Net as it is: use it so{advice}"
    )


def _norm_class(model: CasePredictor) -> str:
    return next((type(norm).__name__ for norm in find_norms(model.bare_network).values()), "NoNorm")


def _is_of_this_package(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "nnunet_norm"


def difference_on_noise(old: nn.Module, new: nn.Module, model: CasePredictor) -> float:
    """Largest difference of two networks' outputs for a small image of noise, over the largest output; may be NaN.

    Args:
        old: in eval mode, on the CPU.
        new: the same.
        model: of which plans they are.
    """
    plans, configuration = model.plans_manager, model.configuration_manager
    try:
        extents = [2 * stride for stride in trace(old).stride]
    except ArchitectureError:  # then a patch
        extents = configuration.patch_size
    channels = determine_num_input_channels(plans, configuration, model.dataset_json)
    noise = torch.randn((1, channels, *extents), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = (first_output(network(noise)) for network in (old, new))
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-30))
