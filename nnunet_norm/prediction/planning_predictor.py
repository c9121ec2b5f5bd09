"""How an image is predicted, decided before anything runs: the part of ``HaloPredictor`` that makes plans."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError, TilingError
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.layers import TILE, TILE_WARNING
from nnunet_norm.prediction.choice import (
    EXECUTIONS,
    Task,
    population_of,
    stages_or_reason,
    why_never_stages,
)
from nnunet_norm.prediction.execution import Image
from nnunet_norm.prediction.folding import fold_model
from nnunet_norm.prediction.halo import tile_shape
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.prediction.tiles_plan import TilesPlan
from nnunet_norm.prediction.tiling_predictor import TilingPredictor
from nnunet_norm.prediction.ways import Wishes
from nnunet_norm.stages import Graph, read_verified, scratch_folder

logger = logging.getLogger(__name__)


class PlanningPredictor(TilingPredictor):
    """Knows the network's operators and makes plans for images; the arguments are those of ``HaloPredictor``."""

    def __init__(
        self,
        tile_step_size: float = 0.5,
        use_gaussian: bool = True,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own default
        verbose: bool = False,
        verbose_preprocessing: bool = False,
        allow_tqdm: bool = True,
        *,
        tile_size: Sequence[int] | str | None = None,
        halo: str | int | Sequence[int] = "auto",
        execution: str = "auto",
        population: str | None = None,
        batches: ExperimentalBatches | str | os.PathLike[str] | None = None,
        controls: bool = False,
        scratch: str | Path | None = None,
        max_memory: int | None = None,
        fold_norms: bool = True,
        trust_checkpoint: bool = False,
    ) -> None:
        super().__init__(
            tile_step_size,
            use_gaussian,
            use_mirroring,
            perform_everything_on_device,
            device,
            verbose,
            verbose_preprocessing,
            allow_tqdm,
        )
        if execution not in EXECUTIONS:
            raise TilingError(f"execution {execution!r} is unknown: choose {', '.join(EXECUTIONS)}")
        if max_memory is not None and max_memory <= 0:
            raise TilingError(f"max_memory {max_memory} must be a positive number of bytes, or None")
        self._choose_tiles(tile_size, halo)
        self.execution = execution
        self._choose_population(population, batches, controls)
        self.scratch = Path(scratch) if scratch is not None else None
        self.work_parent = None if self.scratch is None else str(self.scratch)
        self.max_memory = max_memory
        self.fold_norms = fold_norms
        self.trust_checkpoint = trust_checkpoint
        self.folded_norms = 0
        self.last_plan: StagesPlan | TilesPlan | None = None
        self.network_dtype: torch.dtype | None = None
        self._graphs: WeakKeyDictionary[nn.Module, Graph | str] = WeakKeyDictionary()

    def _fit_loaded_model(self) -> None:
        """Fold norms with stored statistics into the convolutions before them; those of a batch when it has them."""
        super()._fit_loaded_model()
        if self.input_normalization == TILE:
            logger.warning(TILE_WARNING)
        self.folded_norms = self._fold() if self.fold_norms and self.population != "batch" else 0

    def _fold(self) -> int:
        """Fold the network, and the weights of every fold of the model; how many norms."""
        return len(fold_model(self.bare_network, self.list_of_parameters))

    @property
    def graph(self) -> Graph | str:
        """The network as a graph of operators, or why it cannot be run stage by stage; found once per network."""
        network = self.bare_network
        if network not in self._graphs:
            try:
                self._graphs[network] = read_verified(network, self.field)
            except ArchitectureError as error:
                self._graphs[network] = str(error)
        return self._graphs[network]

    def plan(self, image: Tensor) -> StagesPlan | TilesPlan:
        """How ``image`` (C, x, y, z) will be predicted.

        Raises:
            TilingError: options that do not go together, do not suit the network, or cannot be honoured.
        """
        staged = self.stages_or_reason(self.task(image))
        return staged if isinstance(staged, StagesPlan) else self.tiles_because(staged, image)

    def tiles_because(self, reason: str, image: Image, *, streamed: bool = False) -> TilesPlan:
        """The tiles that predict an image which is not run stage by stage, for a reason.

        Raises:
            TilingError: see ``tiles_plan``; with the reason, if the user has not chosen tiles.
        """
        try:
            plan = self.tiles_plan(image, reason, streamed=streamed)
        except TilingError as error:
            if self.execution == "tiles" or self.tiles_are_given:
                raise
            raise TilingError(f"{error}; in tiles because {reason}") from error
        return self.with_halo_error(plan, image, streamed=streamed)

    @property
    def _wishes(self) -> Wishes:
        return Wishes(self.execution, self.population, self.scratch, self.max_memory, self.tiles_are_given)

    def _check(self, cases: list[list[str]], previous_stage_folder: str | None) -> None:
        super()._check(cases, previous_stage_folder)
        self.check_options()

    def check_options(self) -> None:
        """Refuse what no image can mend: options against the network, and the folder of scratch.

        Raises:
            TilingError, OutputError: as said.
        """
        population = population_of(self._wishes, self.field)
        if self.execution == "stages" or population == "image":
            why_never_stages(self._wishes, population, self.graph)
        if self.field.only_extent is not None and not isinstance(self.tile_size, str | None):
            tile_shape(self.tile_size, self.configuration_manager.patch_size, self.field)
        if self.scratch is not None:
            with scratch_folder(self.scratch):
                pass

    def task(self, image: Image, *, streamed: bool = False, resumable: bool = False) -> Task:
        """What predicting an image (C, x, y, z) takes.

        Args:
            image: a tensor, or a volume on a disk.
            streamed: its labels are wanted, box by box, for all folds; else its logits, for one.
            resumable: see ``Task``.

        Raises:
            InputImageError: an image without the four axes, or without voxels.
        """
        shape, slices = self._axes(image)
        return Task(
            image_shape=shape,
            slices=slices,
            mirror_axes=self.mirror_axes,
            device=self.device,
            dtype=self._dtype,
            on_device=self.perform_everything_on_device,
            folds=len(self.list_of_parameters) if streamed else 1,
            streamed=streamed,
            resumable=resumable,
        )

    def stages_or_reason(self, task: Task, spare: Path | None = None) -> StagesPlan | str:
        """The plan that runs an image stage by stage, or why it is predicted in tiles.

        Args:
            task: the image.
            spare: where scratch may lie if memory is short and no folder was named.

        Raises:
            TilingError: see ``plan``.
        """
        self._require_settled()
        wishes = self._wishes
        population = population_of(wishes, self.field)
        in_tiles = wishes.execution == "tiles" or wishes.tiles_are_given or population == "tile"
        graph = "" if in_tiles else self.graph
        if isinstance(graph, str) or spare is None or wishes.scratch is not None:
            return stages_or_reason(wishes, population, graph, task)
        on_disk = replace(wishes, scratch=spare)
        try:
            found = stages_or_reason(wishes, population, graph, task)
            reason = found if isinstance(found, str) else ""
        except TilingError as error:
            reason = str(error)
        if not reason:
            return found
        self._say(f"scratch goes to {spare}: {reason}")
        return stages_or_reason(on_disk, population, graph, task)
