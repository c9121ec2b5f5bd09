"""How long a training is and how it learns, and what a changed batch size makes of both."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from nnunet_norm.architectures import LEARNING_RATE
from nnunet_norm.planning.configurations import Configuration
from nnunet_norm.settings import NormSettings

LOGGER = logging.getLogger(__name__)

LR_SCALINGS = ("linear", "sqrt", "none")

INITIAL_LR, ITERATIONS_PER_EPOCH, VAL_ITERATIONS_PER_EPOCH, EPOCHS = 0.01, 250, 50, 1000
"""What nnU-Net's trainer has, which no plans file says; a test compares them."""


@dataclass(frozen=True)
class Schedule:
    """A training as its plans describe it.

    Attributes:
        batch_size: samples per optimizer step, over all GPUs.
        iterations_per_epoch: optimizer steps.
        val_iterations_per_epoch: batches of validation.
        initial_lr: learning rate at the start, after the warm-up.
        warmup_epochs: epochs over which it rises to that; 0 for none.
    """

    batch_size: int
    iterations_per_epoch: int
    val_iterations_per_epoch: int
    initial_lr: float
    warmup_epochs: int

    @property
    def samples_per_epoch(self) -> int:
        """Training samples that an epoch sees."""
        return self.batch_size * self.iterations_per_epoch

    @classmethod
    def of(cls, resolved: Configuration, *, unetr: bool = False) -> "Schedule":
        """What a resolved configuration says, with nnU-Net's own values where it says nothing; or UNETR's, if it is for that.

        Args:
            resolved: everything that it inherits included.
            unetr: that a UNETR is trained; also where it does not give its sizes.
        """
        settings = NormSettings.from_configuration(resolved)
        usual = LEARNING_RATE if unetr or settings.unetr is not None else INITIAL_LR
        return cls(
            resolved["batch_size"],
            settings.num_iterations_per_epoch or ITERATIONS_PER_EPOCH,
            settings.num_val_iterations_per_epoch or VAL_ITERATIONS_PER_EPOCH,
            settings.initial_lr or usual,
            settings.warmup_epochs or 0,
        )


def scaled_lr(lr: float, old_batch: int, new_batch: int, rule: str) -> float:
    """The learning rate for another batch size.

    ``linear``: lr * new / old, which leaves the sum of updates over the same samples as it was (Goyal et al. 2017, section
    2.1, who warm up). ``sqrt``: lr * sqrt(new / old), which leaves the variance of an update as it was (Krizhevsky 2014,
    section 5, who found linear to work better). ``none``: lr.

    References:
        Goyal et al. 2017, arXiv:1706.02677; Krizhevsky 2014, arXiv:1404.5997.
    """
    ratio = new_batch / old_batch
    return lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def kept_iterations(iterations: int, old_batch: int, new_batch: int) -> int:
    """Iterations after which a new batch size has seen as many samples, to the nearest, and at least one."""
    return max(1, round(iterations * old_batch / new_batch))


def scaled_settings(resolved: Configuration, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """Entries of the block that follow from the new batch size of ``asked``, by ``lr_scaling`` and ``keep_samples``.

    Args:
        resolved: the configuration before the change.
        asked: see :func:`nnunet_norm.planning.options.asked_for`.
        name: of the configuration, for messages.
    """
    old = Schedule.of(resolved, unetr="unetr" in asked)
    settings: dict[str, Any] = {}
    if "lr_scaling" in asked:
        rule = asked["lr_scaling"]
        lr = scaled_lr(old.initial_lr, old.batch_size, asked["batch_size"], rule)
        if rule != "none":
            settings["initial_lr"] = lr
            batches = f"batch {old.batch_size} -> {asked['batch_size']}"
            LOGGER.info("%s: learning rate %.4g -> %.4g (%s, %s)", name, old.initial_lr, lr, rule, batches)
    if "keep_samples" in asked:
        iterations = kept_iterations(old.iterations_per_epoch, old.batch_size, asked["batch_size"])
        settings["num_iterations_per_epoch"] = iterations
        samples = iterations * asked["batch_size"]
        text = f"{old.iterations_per_epoch} iterations of {old.batch_size} samples become "
        text += f"{iterations} of {asked['batch_size']}"
        if samples != old.samples_per_epoch:
            text += f": rounded, {samples} samples per epoch instead of {old.samples_per_epoch}"
        LOGGER.info("%s: %s", name, text)
        if "val_iterations_per_epoch" not in asked:
            validation = kept_iterations(old.val_iterations_per_epoch, old.batch_size, asked["batch_size"])
            settings["num_val_iterations_per_epoch"] = validation
            LOGGER.info("%s: %d iterations of validation become %d", name, old.val_iterations_per_epoch, validation)
    return settings
