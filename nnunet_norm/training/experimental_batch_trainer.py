"""Batch effects normalization: every mini-batch comes from one experimental batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_norm.errors import ExperimentalBatchesError
from nnunet_norm.experimental_batches import (
    FILE_NAME,
    ExperimentalBatches,
    find_experimental_batches,
    listed,
    load_experimental_batches,
)
from nnunet_norm.layers.domains import DomainStatistics, get_domain_statistics
from nnunet_norm.settings import NormSettings
from nnunet_norm.training.grouped_loading import grouped_loading
from nnunet_norm.training.trainer import NormTrainer
from nnunet_norm.training.validation import ValidationPredictor
from nnunet_norm.writing import written_beside


class GroupedValidationPredictor(ValidationPredictor):
    """Measures disparity on batches of one experimental batch each, as the training's are."""

    trainer: ExperimentalBatchTrainer

    def measure_batches(self) -> None:
        """See ``ValidationPredictor``; for each experimental batch, with its statistics."""
        tiles: list[tuple[str, list[Tensor]]] = list(zip(self.trainer.validated, self._tiles, strict=False))
        for name in sorted({name for name, _ in tiles}):
            self._tiles = [own for group, own in tiles if group == name]
            self.trainer.select_statistics(name)
            super().measure_batches()


class ExperimentalBatchTrainer(NormTrainer):
    """Trains on mini-batches of one experimental batch each, so that BatchNorm takes out what its images have in common.

    Which case belongs to which experimental batch stands in ``experimental_batches.json`` beside the dataset's
    ``dataset.json`` (:mod:`nnunet_norm.experimental_batches`); a copy goes into the model's folder. Training and validation
    batches are drawn alike, and all processes draw from the same experimental batch at a time, since they normalize together.
    At inference the statistics should be those of the whole experimental batch.

    With ``domain_statistics`` in the plans' block the network carries one set of running statistics per experimental batch
    (:class:`nnunet_norm.layers.domains.DomainStatistics`), and each validation case is predicted with those of its own. One
    without a training case is predicted with the statistics of all together, which are those of checkpoints' norms too:
    whatever loads a checkpoint and knows nothing of domains predicts with them.

    Raises:
        ExperimentalBatchesError: If the file is missing, malformed or without a case of the training, or its names are not
            those of ``domain_statistics``.

    References:
        Lin and Lu 2022, doi 10.1101/2022.10.14.512286; Wu and Johnson 2021, arXiv:2105.07576, section 5.2.
    """

    norm: ClassVar[str | None] = "batch_norm"
    validation_predictor: ClassVar[type[ValidationPredictor]] = GroupedValidationPredictor

    validated: list[str]
    """The experimental batches of the cases of the final validation, in its order; there while it runs."""

    def refuse(self, plans: dict[str, Any], configuration: dict[str, Any], settings: NormSettings) -> None:
        """See ``NormTrainer``. Networks for inference are built without a trainer, and thus without the file."""
        super().refuse(plans, configuration, settings)
        self.experimental_batches_file = find_experimental_batches(plans["dataset_name"])
        self.experimental_batches = load_experimental_batches(self.experimental_batches_file)
        wanted = settings.domain_statistics or ()
        if unknown := [name for name in wanted if name not in self.experimental_batches.names]:
            raise _misfit(f"name {listed(unknown)}, which it does not have", self.experimental_batches)

    @classmethod
    def finish_network(cls, network: nn.Module, configuration_manager: ConfigurationManager) -> nn.Module:
        """The network, which carries statistics per experimental batch if the plans name any."""
        network = super().finish_network(network, configuration_manager)
        names = NormSettings.from_configuration(configuration_manager.configuration).domain_statistics
        if names is not None:
            network.domain_statistics = DomainStatistics(names, network)
        return network

    @property
    def domains(self) -> DomainStatistics | None:
        """The statistics per experimental batch; None if the plans want none."""
        return get_domain_statistics(self.bare_network)

    def initialize(self) -> None:
        """Build everything; the norms' own buffers belong to the last batch from here on if there are domains."""
        super().initialize()
        if self.domains is not None:
            self.domains.listen(self.bare_network)

    def get_dataloaders(self) -> Any:
        """nnU-Net's loaders, each mini-batch from one experimental batch.

        Raises:
            ExperimentalBatchesError: If cases of the split are in none.
        """
        steps = self.num_iterations_per_epoch, self.num_val_iterations_per_epoch
        with grouped_loading(
            self.experimental_batches.batches,
            seed=self.settings.seed,
            first_steps=[self.current_epoch * number for number in steps],
        ):
            return super().get_dataloaders()

    def get_tr_and_val_datasets(self) -> Any:
        """nnU-Net's datasets, after a look at their experimental batches."""
        training, validation = super().get_tr_and_val_datasets()
        self.experimental_batches.require({*training.identifiers, *validation.identifiers})
        groups = [self.experimental_batches.grouped(data.identifiers) for data in (training, validation)]
        if self.domains is not None and (missing := [name for name in groups[0] if name not in self.domains.names]):
            raise _misfit(f"lack {listed(missing)}", self.experimental_batches)
        for name in sorted({name for group in groups for name in group}):
            trained, validated = (len(group.get(name, [])) for group in groups)
            self.print_to_log_file(f"Experimental batch {name}: {trained} training and {validated} validation cases")
        if len(groups[0]) == 1:
            self.print_to_log_file(
                f"WARNING: all training cases are of experimental batch {next(iter(groups[0]))}: this is plain BatchNorm."
            )
        return training, validation

    def on_train_start(self) -> None:
        """Begin the statistics per experimental batch afresh, unless a training is continued, and keep the file's copy."""
        super().on_train_start()
        if self.local_rank == 0:
            with written_beside(Path(self.output_folder_base) / FILE_NAME) as beside:
                shutil.copyfile(self.experimental_batches_file, beside)
        if self.domains is not None:
            self._initial_statistics = None  # statistics per domain have no initial values
            if self.current_epoch == 0:
                self.domains.num_batches.zero_()  # pretrained weights bring the count of another training

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step; then the batch's statistics are taken in by its experimental batch."""
        result = super().train_step(batch)
        if self.domains is not None:
            self.domains.keep(self.bare_network, self._batch_of(batch["keys"]))
        return result

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The base's step, with the statistics of the batch's experimental batch."""
        self.select_statistics(self._batch_of(batch["keys"]))
        return super().validation_step(batch)

    def _batch_of(self, cases: Any) -> str:
        """The experimental batch of all cases of a mini-batch."""
        (name,) = self.experimental_batches.grouped(map(str, cases))
        return name

    def select_statistics(self, name: str) -> None:
        """Give the norms the statistics of an experimental batch; those of all if it was never trained on."""
        if self.domains is None:
            return
        if self.domains.has_seen(name):
            self.domains.select(self.bare_network, name)
        else:
            self.domains.pooled(self.bare_network)

    @property
    def remedy(self) -> str:
        """See ``NormTrainer``: one set of running statistics does not fit experimental batches that differ."""
        if self.domains is not None:
            return super().remedy
        return (
            "if experimental batches differ, predict with the statistics of each, or keep them with domain_statistics "
            "(nnunet-norm plan --domain-statistics)"
        )

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, with the statistics of all experimental batches together in the norms."""
        if self.domains is not None:
            self.domains.pooled(self.bare_network)
        super().save_checkpoint(filename)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """The base's validation; every case is predicted with the statistics of its experimental batch."""
        with self._each_case_with_its_own():
            super().perform_actual_validation(save_probabilities)
        if self.domains is not None:
            self.domains.pooled(self.bare_network)

    @contextmanager
    def _each_case_with_its_own(self) -> Iterator[None]:
        """Inside, loading a case selects its statistics: nnU-Net's validation loads each right before it predicts it."""
        trainer = self

        class Dataset(self.dataset_class):  # type: ignore[name-defined]
            def load_case(self, identifier: str) -> Any:
                trainer.validated.append(trainer._batch_of([identifier]))
                trainer.select_statistics(trainer.validated[-1])
                return super().load_case(identifier)

        self.validated = []
        with patch.object(self, "dataset_class", Dataset):
            yield


def _misfit(text: str, batches: ExperimentalBatches) -> ExperimentalBatchesError:
    return ExperimentalBatchesError(
        f"{batches.source}: nnunet_norm.domain_statistics of the plans {text}; derive plans anew with "
        "nnunet-norm plan --domain-statistics"
    )
