"""Whole training steps of nnU-Net's own trainer, for ``layers.py``."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from layers_contenders import CONFIGURATION
from layers_measure import WARM_UP, peak_bytes

if TYPE_CHECKING:
    from nnunet_norm.training import NormTrainer

TRAINERS = {
    "instance_norm": ("InstanceNorm", "nnUNetTrainerInstanceNorm"),
    "batch_norm": ("BatchNorm", "nnUNetTrainerBatchNorm"),
    "batch_renorm": ("BatchRenorm, limits open", "nnUNetTrainerBRN"),
    "group_norm": ("GroupNorm, groups of 16", "nnUNetTrainerGN"),
}
"""Title and trainer of each contender."""

DATASET = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "numTraining": 1}


def trainer_of(name: str, plans: dict[str, Any], classes: int, device: str) -> NormTrainer:
    """nnU-Net's trainer after ``initialize``: network, optimizer and loss are those of a training."""
    import nnunet_norm.trainers.nnunet_norm_trainers as trainers

    labels = {"background": 0} | {f"organ {number}": number for number in range(1, classes)}
    trainer: NormTrainer = getattr(trainers, TRAINERS[name][1])(
        plans | {"continue_training": False}, CONFIGURATION, 0, DATASET | {"labels": labels}, torch.device(device)
    )
    # nnU-Net looks at the names in this folder to tell how the images are stored; no step reads any.
    folder = Path(trainer.preprocessed_dataset_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.b2nd").touch()
    trainer.initialize()
    for layer in trainer.renorms:
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.fill_(layer.warmup_steps + layer.ramp_steps)
    trainer.network.train()
    return trainer


@contextmanager
def trainers(names: list[str], mode: str, plans: dict[str, Any], classes: int, device: str) -> Iterator[dict[str, Any]]:
    """A trainer per name, in folders that are gone afterwards; compiled as nnU-Net does, or not."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {f"nnUNet_{kind}": str(Path(folder) / kind) for kind in ("raw", "preprocessed", "results")}
        variables["nnUNet_extTrainer"] = str(files("nnunet_norm.trainers"))
        variables["nnUNet_compile"] = "t" if mode == "compiled" else "f"
        with patch.dict(os.environ, variables), contextlib.redirect_stdout(io.StringIO()):
            made = {name: trainer_of(name, plans, classes, device) for name in names}
        yield made


class Step:
    """A training step on one batch: forward, nnU-Net's loss with deep supervision, backward, clipping and SGD."""

    def __init__(self, trainer: NormTrainer, classes: int) -> None:
        self.trainer = trainer
        configuration = trainer.configuration_manager
        generator = torch.Generator().manual_seed(0)
        shape = [configuration.batch_size, 1, *configuration.patch_size]
        sizes = [[round(n * s) for n, s in zip(shape[2:], scale, strict=True)] for scale in self._scales()]
        targets = [torch.randint(0, classes, (*shape[:2], *size), generator=generator) for size in sizes]
        device = trainer.device
        self.batch = {
            "data": torch.randn(shape, generator=generator).to(device),
            "target": [target.to(device, torch.int16) for target in targets],
        }
        for _ in range(WARM_UP):
            self.both()

    def _scales(self) -> list[list[float]]:
        return self.trainer._get_deep_supervision_scales()

    def both(self) -> None:
        """``train_step`` of nnU-Net's trainer."""
        self.trainer.train_step(self.batch)

    def memory(self) -> dict[str, int]:
        """``peak``: bytes above parameters, momentum and batch. The gradients of the last step are let go before."""
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return {"peak": peak_bytes(self.both, self.trainer.device.type)}
