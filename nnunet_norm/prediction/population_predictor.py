"""Whose statistics normalize: the part of ``HaloPredictor`` that takes a model's own away, or puts those of a batch in."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from nnunet_norm.errors import TilingError
from nnunet_norm.experimental_batches import ExperimentalBatches, load_experimental_batches
from nnunet_norm.layers import confirm_normalized_images
from nnunet_norm.prediction.cases import CasePredictor
from nnunet_norm.prediction.checks import case_name
from nnunet_norm.prediction.choice import POPULATIONS
from nnunet_norm.prediction.folding import fold_model
from nnunet_norm.prediction.population_estimate import Estimate, PopulationEstimator, preprocessed_images
from nnunet_norm.prediction.populations import (
    Population,
    by_name,
    each_batch,
    network_for,
    require_places,
    the_folder,
    weights_for,
)
from nnunet_norm.prediction.ways import Wishes
from nnunet_norm.prediction.workers import PreprocessedCases, PreprocessedGroups


@dataclass(frozen=True)
class SettledPopulation:
    """A population with its statistics."""

    population: Population
    estimate: Estimate

    def as_dict(self) -> dict[str, Any]:
        """For the record beside the predictions."""
        return {
            "population": "batch",
            "population_of": str(self.population),
            "population_images": sorted(self.population.images) if self.estimate.num_images else [],
            "statistics": self.estimate.way,
        }


class PopulationPredictor(CasePredictor):
    """Predicts with the statistics of a population; the arguments are those of ``HaloPredictor``.

    For "image" and "tile" the network loses the statistics that it has stored, when it is loaded or handed over; one that is
    handed over stays as it is, and what is predicted with shares its parameters. For "batch" the cases that are predicted are
    read twice: statistics are settled for all experimental batches and folds first, and nothing is predicted if one fails.
    """

    population: str | None
    batches: ExperimentalBatches | None
    controls: bool
    fold_norms: bool
    folded_norms: int
    gained_statistics: bool = False
    """Whether the model that was loaded has InstanceNorm, whose places for statistics are new."""

    list_of_parameters: list[dict[str, Any]]
    _settled: SettledPopulation | None = None
    _estimator: PopulationEstimator | None = None
    _populations: Sequence[SettledPopulation] = ()
    _network_of_batch: nn.Module | None = None

    @property
    def _wishes(self) -> Wishes:
        raise NotImplementedError

    def _say(self, line: str | None) -> None:
        raise NotImplementedError

    def _choose_population(
        self, population: str | None, batches: ExperimentalBatches | str | os.PathLike[str] | None, controls: bool
    ) -> None:
        if population is not None and population not in POPULATIONS:
            raise TilingError(f"population {population!r} is unknown: choose {', '.join(POPULATIONS)}")
        if batches is not None and population != "batch":
            given = f"--population {population} was chosen" if population else "--population was not given"
            raise TilingError(f"--batches is for --population batch, and {given}: choose that, or leave --batches out")
        if controls and batches is None:
            raise TilingError(
                "--controls are those of --batches, which is not given: give both, or leave --controls out"
            )
        self.population = population
        self.batches = load_experimental_batches(batches) if isinstance(batches, str | os.PathLike) else batches
        self.controls = controls

    def _fit_loaded_model(self) -> None:
        """Give the network the norms that the population needs.

        Raises:
            StatisticsError: the population is "batch", and a norm of the network cannot have stored statistics.
        """
        stored = set(self.bare_network.state_dict())
        network_for(self.bare_network, self.population, in_place=True)
        self.gained_statistics = bool(self.bare_network.state_dict().keys() - stored)
        self._begin()

    def manual_initialization(
        self,
        network: nn.Module,
        plans_manager: Any,
        configuration_manager: Any,
        parameters: list[dict[str, Any]] | None,
        dataset_json: dict[str, Any],
        trainer_name: str,
        inference_allowed_mirroring_axes: tuple[int, ...] | None,
    ) -> None:
        """nnU-Net's method; the network that is handed over stays as it is.

        Raises:
            StatisticsError: see ``_fit_loaded_model``.
        """
        super().manual_initialization(
            network,
            plans_manager,
            configuration_manager,
            parameters,
            dataset_json,
            trainer_name,
            inference_allowed_mirroring_axes,
        )
        confirm_normalized_images(self.bare_network)  # an image that is not is refused
        own = network_for(self.bare_network, self.population, in_place=False)
        if own is not self.bare_network:
            self.network = own
        self._begin()

    def _begin(self) -> None:
        """Weights that fit the network's norms; statistics of other models are forgotten."""
        network = self.bare_network
        if self.population == "batch":
            require_places(network)
        if self.list_of_parameters is not None and self.population in ("image", "tile", "batch"):
            self.list_of_parameters = [weights_for(network, weights) for weights in self.list_of_parameters]
        self._estimator = self._settled = self._network_of_batch = None

    @property
    def estimator(self) -> PopulationEstimator:
        """Estimates statistics for the weights that the model was loaded with, whatever was predicted since."""
        if self._estimator is None:
            network = copy.deepcopy(self.bare_network)
            self._estimator = PopulationEstimator(
                network,
                self.list_of_parameters or [copy.deepcopy(network.state_dict())],
                patch_size=self.configuration_manager.patch_size,
                wishes=self._wishes,
                device=self.device,
                on_device=self.perform_everything_on_device,
                progress=self.allow_tqdm,
            )
        return self._estimator

    def population_record(self) -> dict[str, Any]:
        """Whose statistics the last image was predicted with, if they are those of a batch."""
        return {} if self._settled is None else self._settled.as_dict()

    def _require_settled(self) -> None:
        if self.population == "batch" and self._settled is None:
            raise TilingError(
                "population 'batch' is that of the files that predict_from_files is given: predict files, or choose another "
                "population for single images"
            )

    def populations_of(self, cases: Sequence[Sequence[str]]) -> list[Population]:
        """The populations of cases, by their files: each experimental batch, or all as one.

        Raises:
            ExperimentalBatchesError: cases without an experimental batch, or one without controls where they are wanted.
            StatisticsError: two cases have the same name.
        """
        named = by_name(cases, [case_name(case, self.dataset_json["file_ending"]) for case in cases])
        return the_folder(named) if self.batches is None else each_batch(named, self.batches, controls=self.controls)

    def _check(self, cases: list[list[str]], previous_stage_folder: str | None) -> None:
        super()._check(cases, previous_stage_folder)
        if self.population == "batch":
            self.populations_of(cases)

    def estimate_on(self, population: Population, previous_stage_folder: str | None, num_processes: int) -> Estimate:
        """Statistics of a population's images for every fold.

        Args:
            population: the images.
            previous_stage_folder: where the segmentations of a cascade's previous stage are.
            num_processes: for preprocessing; 0 for none.

        Raises:
            StatisticsError, InputImageError, OutputError, TilingError: see ``preprocessed_images`` and
                ``PopulationEstimator.estimate``.
        """
        ending = self.dataset_json["file_ending"]
        cases = {
            name: (files, os.path.join(previous_stage_folder, name + ending) if previous_stage_folder else None)
            for name, files in population.images.items()
        }
        with preprocessed_images(
            self.preprocessing,
            cases,
            scratch=self._wishes.scratch,
            workers=num_processes,
            progress=self.allow_tqdm,
        ) as images:
            return self.estimator.estimate(images, str(population))

    @contextmanager
    def _statistics_settled(
        self,
        cases: list[list[str]],
        inputs: list[list[str]],
        previous_stage_folder: str | None,
        num_processes: int,
    ) -> Iterator[None]:
        """See ``CasePredictor``; a population is all of its cases, also if some are not predicted in this call."""
        if self.population != "batch":
            yield
            return
        wanted = {tuple(files) for files in inputs}
        settled = []
        for population in self.populations_of(cases):
            if wanted.isdisjoint(population.cases.values()):
                continue
            of_all = population.name is not None and not population.controls
            known = self.estimator.of_domain(str(population.name)) if of_all else None
            estimate = known or self.estimate_on(population, previous_stage_folder, num_processes)
            self._say(f"population batch: {population}; statistics: {estimate.way}")
            settled.append(SettledPopulation(population, estimate))
        self._populations = settled
        try:
            yield
        finally:
            self._populations, self._settled = (), None

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str | None] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> PreprocessedCases | PreprocessedGroups:
        every = (input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated)
        if self.population != "batch":
            return self._preprocessed(*every, num_processes)
        groups = []
        for settled in self._populations:
            members = set(settled.population.cases.values())
            places = [place for place, files in enumerate(input_list_of_lists) if tuple(files) in members]
            inputs, previous, outputs = (
                None if given is None else [given[place] for place in places] for given in every
            )
            cases = self._preprocessed(inputs, previous, outputs, num_processes)  # type: ignore[arg-type]
            groups.append((partial(self._use, settled), places, cases))
        return PreprocessedGroups(groups)

    def _use(self, settled: SettledPopulation) -> None:
        """Predict with a population's statistics from now on, folded into convolutions if that is wanted."""
        network = copy.deepcopy(self.estimator.network).cpu()  # where weights lie until they are used
        weights = [
            {**of_fold, **found}
            for of_fold, found in zip(self.estimator.weights, settled.estimate.statistics, strict=True)
        ]
        self.folded_norms = len(fold_model(network, weights)) if self.fold_norms else 0
        if self._network_of_batch is None:  # folded alike for all populations, so one network is followed and traced
            self._network_of_batch = network
            compiled = isinstance(self.network, OptimizedModule)
            self.network = torch.compile(network) if compiled else network  # type: ignore[assignment]
        self.list_of_parameters = weights
        self.bare_network.load_state_dict(weights[0])
        self._settled = settled
