"""Whether a training fits a GPU, and what would: smaller micro-batches, activation checkpointing, fewer features."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nnunet_norm.errors import ArchitectureError, PlansError
from nnunet_norm.planning.calibration import measured_memory
from nnunet_norm.planning.memory import Network, StepMemory, estimated_memory
from nnunet_norm.planning.topology import as_text
from nnunet_norm.settings import NormSettings

FEATURES_STEP = 4
"""Fewer features are tried in multiples of this: what the kernels of GPUs like, and nnU-Net's plans have."""


@dataclass(frozen=True)
class Choice:
    """A way in which a training would fit.

    Attributes:
        flags: of ``nnunet-norm plan``, on top of those that are given.
        gigabytes: that it takes then.
    """

    flags: str
    gigabytes: float


class Training:
    """The memory of one configuration's training for one process.

    Args:
        network: see :meth:`Network.of`.
        samples: of the batch, for the process that has the most.
        device: a GPU on which steps are measured; None for estimates alone.
    """

    def __init__(self, network: Network, samples: int, device: torch.device | None = None) -> None:
        settings = NormSettings.from_configuration(network.resolved)
        self.network = network
        self.samples = samples
        self.at_once = min(settings.micro_batch_size or samples, samples)
        self.checkpointed = bool(settings.activation_checkpointing)
        self._together = settings.normalization_batch_size or 1
        self._device = device
        self._memories: dict[tuple[int | None, bool], StepMemory] = {}

    def memory(self, *, checkpointed: bool | None = None, base: int | None = None) -> StepMemory:
        """Of a step; with the configuration's own checkpointing and features unless others are named.

        Raises:
            PlansError: the network cannot be estimated.
            ArchitectureError: it has no stages that could be checkpointed.
        """
        checkpointed = self.checkpointed if checkpointed is None else checkpointed
        if (base, checkpointed) not in self._memories:
            network = self.network if base is None else self.network.with_base_features(base)
            memory = estimated_memory(network, checkpointed=checkpointed)
            if self._device is not None:
                memory = measured_memory(network, memory, self._device, checkpointed=checkpointed)
            self._memories[base, checkpointed] = memory
        return self._memories[base, checkpointed]

    @property
    def gigabytes(self) -> float:
        """Of the GPU, as the configuration stands."""
        return self.memory().gigabytes(self.samples, self.at_once)

    @property
    def source(self) -> str:
        """Where that figure is from."""
        return self.memory().source_with(self.at_once)

    def choices(self, limit: float) -> Iterator[Choice]:
        """What would fit ``limit`` gigabytes, each found with the same figures as the refusal.

        One change at a time (checkpointing with micro-batches, if need be); where none of them fits, fewer features with the
        smallest micro-batches, and at last with checkpointing too.
        """
        again = None if self.checkpointed else self._checkpointing(limit)
        single = [self._largest_micro_batch(self.memory(), limit), again, self._most_features(limit)]
        found = [choice for choice in single if choice is not None]
        yield from found or self._together_with_fewer_features(limit)

    def fits_alone(self, limit: float) -> bool:
        """Whether a process with the fewest samples that it can have fits ``limit`` gigabytes: more GPUs would do."""
        return self.memory().gigabytes(self._together, self._together) <= limit

    def _checkpointing(self, limit: float) -> Choice | None:
        """By itself, or else with smaller micro-batches."""
        if not self._checkpointable():
            return None
        memory = self.memory(checkpointed=True)
        whole = memory.gigabytes(self.samples, self.at_once)
        if whole <= limit:
            return Choice("--activation-checkpointing", whole)
        both = self._largest_micro_batch(memory, limit)
        return None if both is None else Choice(f"--activation-checkpointing {both.flags}", both.gigabytes)

    def _largest_micro_batch(self, memory: StepMemory, limit: float) -> Choice | None:
        """The largest below the present one, of whole groups of samples that are normalized together."""
        for size in range(self.at_once - 1, 0, -1):
            gigabytes = memory.gigabytes(self.samples, size)
            if size % self._together == 0 and gigabytes <= limit:
                return Choice(f"--micro-batch-size {size}", gigabytes)
        return None

    def _together_with_fewer_features(self, limit: float) -> Iterator[Choice]:
        smallest = min(self.at_once, self._together)
        micro = f"--micro-batch-size {smallest} " if smallest < self.at_once else ""
        ways = [(micro, self.checkpointed)] if micro else []
        if not self.checkpointed and self._checkpointable():
            ways.append((f"--activation-checkpointing {micro}", True))
        for flags, checkpointed in ways:
            base = self._most_features(limit, at_once=smallest, checkpointed=checkpointed)
            if base is not None:
                yield Choice(f"{flags}{base.flags}", base.gigabytes)
                return

    def _checkpointable(self) -> bool:
        try:
            self.memory(checkpointed=True)
        except ArchitectureError:
            return False
        return True

    def _most_features(
        self, limit: float, *, at_once: int | None = None, checkpointed: bool | None = None
    ) -> Choice | None:
        own = self.network.base_features
        if own is None or "strides" not in self.network.resolved["architecture"]["arch_kwargs"]:
            return None
        if self.network.with_base_features(own) != self.network:
            return None  # the features of each stage are given by themselves, which excludes base features

        def gigabytes_with(base: int) -> float:
            return self.memory(checkpointed=checkpointed, base=base).gigabytes(self.samples, at_once or self.at_once)

        smaller = range(FEATURES_STEP, own, FEATURES_STEP)
        fitting = bisect_right(smaller, limit, key=gigabytes_with)
        if not fitting:
            return None
        most = smaller[fitting - 1]
        return Choice(f"--base-features {most}", gigabytes_with(most))


def counted(number: int, what: str) -> str:
    """``1 sample``, ``2 samples``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def check_fits(training: Training, limit: float) -> None:
    """Refuse what does not fit ``limit`` gigabytes.

    Raises:
        PlansError: it does not; the line names what would fit.
    """
    needed = training.gigabytes
    if needed <= limit:
        return
    smaller = "give a smaller --patch-size" + (", or more --num-gpus" if training.fits_alone(limit) else "")
    choices = [f"{choice.flags} ({choice.gigabytes:.1f} GB)" for choice in training.choices(limit)]
    network, samples = training.network, counted(training.at_once, "sample")
    raise PlansError(
        f"configuration {network.name}: patch {as_text(network.patch)} with {samples} at once takes "
        f"{needed:.1f} GB per GPU ({training.source}), --vram is {limit:g}; "
        + (f"what fits: {', or '.join(choices)}" if choices else smaller)
    )
