"""Whole training steps of nnU-Net's own trainers, for ``training.py``."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from layers_contenders import CONFIGURATION, stock_plans
from layers_measure import peak_bytes, seconds, synchronize
from torch import Tensor

STOCK = "nnUNetTrainer"

DATASET = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}

LEARNING_RATE = 1e-6
"""Targets are drawn: with nnU-Net's rate some networks would run away. This one hardly moves them, at the same cost."""

MOST_GRAPHS = 64
"""torch.compile keeps 8 graphs per function and runs uncompiled from then on; here many networks share a function."""


def no_settings(_batch: int) -> dict[str, Any]:
    """A block that leaves everything as it is."""
    return {}


def given(block: Mapping[str, Any], _batch: int) -> Mapping[str, Any]:
    """The same block for every batch."""
    return block


def as_it_is(_trainer: Any) -> None:
    """A trainer as it begins a training."""


def open_limits(trainer: Any) -> None:
    """BatchRenorm as it is after its schedule."""
    for layer in trainer.renorms:
        layer.num_batches_tracked.fill_(layer.warmup_steps + layer.ramp_steps)


def freeze(trainer: Any) -> None:
    """FrozenBN as it is in its last epoch."""
    trainer.current_epoch = trainer.num_epochs - 1
    trainer._freeze()


@dataclass(frozen=True)
class Contender:
    """A training whose steps are measured.

    Attributes:
        title: in tables.
        trainer: its name.
        settings: what stands in the plans' block for a batch of that size.
        prepare: brings a trainer that is initialized to where it is measured.
    """

    title: str
    trainer: str
    settings: Callable[[int], Mapping[str, Any]] = no_settings
    prepare: Callable[[Any], None] = as_it_is


NORMS: dict[str, Contender] = {
    "stock": Contender("nnU-Net's own trainer", STOCK),
    "instance_norm": Contender("InstanceNorm", "nnUNetTrainerInstanceNorm"),
    "batch_renorm": Contender("BatchRenorm, limits open", "nnUNetTrainerBRN", prepare=open_limits),
    "batch_renorm_warmup": Contender("BatchRenorm, warm-up", "nnUNetTrainerBRN"),
    "batch_norm": Contender("BatchNorm", "nnUNetTrainerBatchNorm"),
    "group_norm": Contender("GroupNorm, groups of 16", "nnUNetTrainerGN"),
    "ghost_batch_norm": Contender(
        "GhostBatchNorm, halves of the batch",
        "nnUNetTrainerGhostBN",
        lambda batch: {"normalization_batch_size": batch // 2 if batch % 2 == 0 else batch},
    ),
    "instance_norm_tracked": Contender("InstanceNorm, tracked", "nnUNetTrainerINTracked"),
    "frozen_before": Contender("FrozenBN, before freezing", "nnUNetTrainerFrozenBN"),
    "frozen_after": Contender("FrozenBN, frozen", "nnUNetTrainerFrozenBN", prepare=freeze),
    "none": Contender("no norm", "nnUNetTrainerNoNorm"),
}


def small_plans(patch_size: Sequence[int] | None, batch: int | None, features: int | None) -> dict[str, Any]:
    """The stock plans, with another patch, batch, or number of features at the first stage (the others in proportion)."""
    plans = stock_plans(patch_size, batch)
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    if features is not None:
        first = kwargs["features_per_stage"][0]
        kwargs["features_per_stage"] = [count * features // first for count in kwargs["features_per_stage"]]
    return plans


def trainer_of(contender: Contender, plans: dict[str, Any], classes: int, device: torch.device) -> Any:
    """The trainer after ``initialize``: network, loss with deep supervision and optimizer are those of a training."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    import nnunet_norm.trainers.nnunet_norm_trainers as trainers

    kind = nnUNetTrainer if contender.trainer == STOCK else getattr(trainers, contender.trainer)
    own = copy.deepcopy(plans) | {"continue_training": False}
    configuration = own["configurations"][CONFIGURATION]
    configuration["nnunet_norm"] = {"seed": 0, **contender.settings(configuration["batch_size"])}
    labels = {"background": 0} | {f"organ {number}": number for number in range(1, classes)}
    trainer = kind(own, CONFIGURATION, 0, DATASET | {"labels": labels}, device)
    # nnU-Net looks at the names in this folder to tell how the images are stored; no step reads any.
    folder = Path(trainer.preprocessed_dataset_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.b2nd").touch()
    torch.manual_seed(0)
    trainer.initialize()
    for group in trainer.optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    contender.prepare(trainer)
    trainer.network.train()
    return trainer


@contextmanager
def trainers(
    contenders: Mapping[str, Contender], mode: str, plans: dict[str, Any], classes: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A trainer for each, in folders that are gone afterwards; compiled as nnU-Net does, or not."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnUNetv2_train does
    with tempfile.TemporaryDirectory() as folder:
        variables = {f"nnUNet_{kind}": str(Path(folder) / kind) for kind in ("raw", "preprocessed", "results")}
        variables["nnUNet_extTrainer"] = str(files("nnunet_norm.trainers"))
        variables["nnUNet_compile"] = "t" if mode == "compiled" else "f"
        with patch.dict(os.environ, variables), contextlib.redirect_stdout(io.StringIO()):
            made = {name: trainer_of(one, plans, classes, device) for name, one in contenders.items()}
        yield made


class Step:
    """Steps of a trainer on one batch that stays the same: forward, loss with deep supervision, backward, clipping, SGD.

    Args:
        trainer: As ``trainer_of`` gives it.
        classes: Labels, background included.
        seed: Of the images and labels, which are drawn.
    """

    def __init__(self, trainer: Any, classes: int, seed: int = 0) -> None:
        self.trainer = trainer
        generator = torch.Generator().manual_seed(seed)
        shape = [trainer.batch_size, 1, *trainer.configuration_manager.patch_size]
        scales = trainer._get_deep_supervision_scales()
        sizes = [[round(n * s) for n, s in zip(shape[2:], scale, strict=True)] for scale in scales]
        targets = [torch.randint(0, classes, (*shape[:2], *size), generator=generator) for size in sizes]
        self.batch = {
            "data": torch.randn(shape, generator=generator).to(trainer.device),
            "target": [target.to(trainer.device, torch.int16) for target in targets],
        }

    def train(self) -> None:
        """One step of the training."""
        loss = float(self.trainer.train_step(self.batch)["loss"])
        assert loss == loss, "a network that runs away does not do what is to be measured"

    def validate(self) -> None:
        """One step of the validation; the network must be in eval mode, as nnU-Net has it then."""
        with torch.no_grad():
            self.trainer.validation_step(self.batch)

    def gradients(self) -> list[Tensor]:
        """Of a step in double precision, clipped as nnU-Net does, without those of parameters that get none.

        What rounding hides in single precision shows. The trainer stays in double precision: it is of no more use.
        """
        self.trainer.network.double()
        self.batch["data"] = self.batch["data"].double()
        self.train()
        return [p.grad for p in self.trainer.network.parameters() if p.grad is not None]

    def peak(self) -> int:
        """Bytes of a step above parameters, momentum and batch. The gradients of the last step are let go before."""
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return peak_bytes(self.train, self.trainer.device.type)


def in_turn(actions: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each action, round by round, in another order in each."""
    names = list(actions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(seconds(actions[name], 1, device))
    synchronize(device)
    return taken
