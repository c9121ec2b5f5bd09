"""nnU-Net's loaders with mini-batches that come from one group of cases each, the same group on all processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

UNSEEDED = 0
"""Seed of the groups in trainings without a seed: processes must draw the same ones, and so must a continued training."""


@dataclass(frozen=True)
class GroupSequence:
    """Which group each step is of: a pure function of its number.

    Attributes:
        names: The groups.
        probabilities: Of each, with sum 1.
        seed: Whole numbers; what differs in one of them draws independently.
    """

    names: Sequence[str]
    probabilities: Sequence[float]
    seed: Sequence[int]

    def __call__(self, step: int) -> str:
        """The group of a step; steps are numbered from 0."""
        return self.names[np.random.default_rng([*self.seed, step]).choice(len(self.names), p=self.probabilities)]


class GroupedDataLoader(nnUNetDataLoader):
    """nnU-Net's loader, with all cases of a mini-batch from one group; cropping, oversampling and augmentation are its own.

    A group is drawn in proportion to its share of the cases, so that every case comes as often as ever, and its cases with
    replacement, as nnU-Net draws them. Worker w of n makes the steps w, w + n, w + 2n, ...: taken in turn, as
    ``MultiThreadedAugmenter`` does, they are in order. The groups have a generator of their own; cases are drawn from
    NumPy's global one, from which nnU-Net draws, and thus differ between processes as ever.

    Args:
        data: The cases.
        *args: For nnU-Net's loader.
        groups: Case identifier -> name of its group, for all cases of ``data``.
        seed: See :class:`GroupSequence`.
        first_step: Number of the first mini-batch.
        **kwargs: For nnU-Net's loader.
    """

    def __init__(
        self,
        data: nnUNetBaseDataset,
        *args: Any,
        groups: Mapping[str, str],
        seed: Sequence[int],
        first_step: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, *args, **kwargs)
        cases = np.asarray(self.indices)
        of_case = np.asarray([groups[case] for case in cases])
        weights = (
            np.ones(len(cases)) if self.sampling_probabilities is None else np.asarray(self.sampling_probabilities)
        )
        self._cases = {name: (cases[of_case == name], weights[of_case == name]) for name in np.unique(of_case).tolist()}
        shares = [float(mine.sum() / weights.sum()) for _, mine in self._cases.values()]
        self.sequence = GroupSequence(list(self._cases), shares, tuple(seed))
        self.first_step = first_step
        self._made = 0

    def set_thread_id(self, thread_id: int) -> None:
        """Called in a worker, where one thread has to do: torch's pool does not survive the fork."""
        super().set_thread_id(thread_id)
        torch.set_num_threads(1)

    def get_indices(self) -> Any:
        """The cases of the next mini-batch."""
        step = self.first_step + self._made * self.number_of_threads_in_multithreaded + self.thread_id
        self._made += 1
        cases, weights = self._cases[self.sequence(step)]
        # From the global generator, as nnU-Net's loaders draw.
        return np.random.choice(cases, self.batch_size, replace=True, p=weights / weights.sum())  # noqa: NPY002


@contextmanager
def grouped_loading(groups: Mapping[str, str], *, seed: int | None, first_steps: Sequence[int]) -> Iterator[None]:
    """Inside, ``nnUNetTrainer.get_dataloaders`` makes loaders of this module, and has their workers take turns.

    nnU-Net takes batches from whichever worker is first, so that processes of one training would soon be at different groups.

    Args:
        groups: Case identifier -> name of its group.
        seed: Of the groups; None for :data:`UNSEEDED`.
        first_steps: Number of the first mini-batch of the training and of the validation loader, which nnU-Net makes in
            this order.
    """
    module = import_module(nnUNetTrainer.__module__)
    numbers = itertools.count()

    def loader(data: nnUNetBaseDataset, *args: Any, **kwargs: Any) -> GroupedDataLoader:
        number = next(numbers)
        own_seed = (UNSEEDED if seed is None else seed, number)
        return GroupedDataLoader(data, *args, groups=groups, seed=own_seed, first_step=first_steps[number], **kwargs)

    with (
        patch.object(module, "nnUNetDataLoader", loader),
        patch.object(module, "NonDetMultiThreadedAugmenter", _in_turn),
    ):
        yield


def _in_turn(
    data_loader: GroupedDataLoader, *, num_processes: int, num_cached: int, **kwargs: Any
) -> MultiThreadedAugmenter:
    """Workers that take turns, with about as many batches in store as nnU-Net has."""
    data_loader.number_of_threads_in_multithreaded = num_processes
    per_worker = -(-num_cached // num_processes)
    return MultiThreadedAugmenter(data_loader, num_processes=num_processes, num_cached_per_queue=per_worker, **kwargs)
