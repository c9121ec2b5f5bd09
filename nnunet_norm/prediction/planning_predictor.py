"""How an image is predicted, decided before anything runs: the part of ``HaloPredictor`` that makes plans."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError, InputImageError, TilingError
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.prediction.choice import (
    EXECUTIONS,
    Wishes,
    population_of,
    stages_or_reason,
    why_never_stages,
)
from nnunet_norm.prediction.execution import TilesPlan
from nnunet_norm.prediction.folding import fold_model
from nnunet_norm.prediction.halo import HALO_WORDS, decide, planned_shape, tile_shape
from nnunet_norm.prediction.measured_halo import MeasuredHalo
from nnunet_norm.prediction.population_predictor import PopulationPredictor
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.receptive_field import ReceptiveField, trace
from nnunet_norm.stages import Graph, read_verified, scratch_folder

logger = logging.getLogger(__name__)


class PlanningPredictor(PopulationPredictor):
    """Knows the network's reach and operators, and makes plans for images; the arguments are those of ``HaloPredictor``."""

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
        tile_size: Sequence[int] | None = None,
        halo: str | int | Sequence[int] = "auto",
        execution: str = "auto",
        population: str | None = None,
        batches: ExperimentalBatches | str | os.PathLike[str] | None = None,
        controls: bool = False,
        scratch: str | Path | None = None,
        max_memory: int | None = None,
        fold_norms: bool = True,
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
        if isinstance(halo, str) and halo not in HALO_WORDS:
            raise TilingError(f"halo {halo!r} is unknown: choose {', '.join(HALO_WORDS)} or a number of voxels")
        if execution not in EXECUTIONS:
            raise TilingError(f"execution {execution!r} is unknown: choose {', '.join(EXECUTIONS)}")
        if max_memory is not None and max_memory <= 0:
            raise TilingError(f"max_memory {max_memory} must be a positive number of bytes, or None")
        self.tile_size = tile_size
        self.halo = halo
        self.execution = execution
        self._choose_population(population, batches, controls)
        self.scratch = Path(scratch) if scratch is not None else None
        self.max_memory = max_memory
        self.fold_norms = fold_norms
        self.folded_norms = 0
        self.last_plan: StagesPlan | TilesPlan | None = None
        self.network_dtype: torch.dtype | None = None
        self._graphs: WeakKeyDictionary[nn.Module, Graph | str] = WeakKeyDictionary()
        self._fields: WeakKeyDictionary[nn.Module, ReceptiveField] = WeakKeyDictionary()
        self._measured = MeasuredHalo(self._say)
        self._said: set[str] = set()

    def _fit_loaded_model(self) -> None:
        """Fold norms with stored statistics into the convolutions before them; those of a batch when it has them."""
        super()._fit_loaded_model()
        self.folded_norms = self._fold() if self.fold_norms and self.population != "batch" else 0

    def _fold(self) -> int:
        """Fold the network, and the weights of every fold of the model; how many norms."""
        return len(fold_model(self.bare_network, self.list_of_parameters))

    @property
    def field(self) -> ReceptiveField:
        """The network's receptive field, traced once per network."""
        network = self.bare_network
        if network not in self._fields:
            self._fields[network] = trace(network)
        return self._fields[network]

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

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Spatial axes that are mirrored."""
        return tuple(self.allowed_mirroring_axes or ()) if self.use_mirroring else ()

    def plan(self, image: Tensor) -> StagesPlan | TilesPlan:
        """How ``image`` (C, x, y, z) will be predicted.

        Raises:
            TilingError: options that do not go together, do not suit the network, or cannot be honoured.
        """
        staged = self.stages_or_reason(image)
        return staged if isinstance(staged, StagesPlan) else self.tiles_plan(image, staged)

    def tiles_plan(self, image: Tensor, reason: str = "") -> TilesPlan:
        """How ``image`` (C, x, y, z) would be predicted in tiles, for a reason.

        Raises:
            TilingError: tile size or halo that do not go together, or do not suit the network.
        """
        field, (shape, slices) = self.field, self._axes(image)
        tile, note = tile_shape(self.tile_size, self.configuration_manager.patch_size, field)
        self._say(note)
        decision = decide(
            shape,
            field,
            tile,
            tile_is_given=self.tile_size is not None,
            halo=self.halo,
            mirror_axes=self.mirror_axes,
            slices=slices,
            effective=lambda: self._measured.of(
                self.bare_network,
                image,
                field,
                self.configuration_manager.patch_size,
                required=self.halo == "erf",
            ),
        )
        return TilesPlan(decision, planned_shape(shape, tile, field), reason)

    @property
    def _wishes(self) -> Wishes:
        tiles_are_given = self.tile_size is not None or self.halo != "auto"
        return Wishes(self.execution, self.population, self.scratch, self.max_memory, tiles_are_given)

    def _check(self, cases: list[list[str]], previous_stage_folder: str | None) -> None:
        """Also what no image can mend: options against the network, and the folder of scratch."""
        super()._check(cases, previous_stage_folder)
        population = population_of(self._wishes, self.field)
        if self.execution == "stages" or population == "image":
            why_never_stages(self._wishes, population, self.graph)
        if self.scratch is not None:
            with scratch_folder(self.scratch):
                pass

    def _axes(self, image: Tensor) -> tuple[tuple[int, ...], int]:
        """The image's extents along the network's axes, and how many slices of that shape it has."""
        ndim = len(self.field.stride)
        if image.ndim not in (4, ndim + 1):
            raise InputImageError(f"image of shape {tuple(image.shape)} has not the four axes (C, x, y, z)")
        if not image.numel():
            raise InputImageError(f"image of shape {tuple(image.shape)} is empty")
        return tuple(image.shape[-ndim:]), 1 if image.ndim == ndim + 1 else image.shape[1]

    def stages_or_reason(self, image: Tensor) -> StagesPlan | str:
        """The plan that runs the image stage by stage, or why it is predicted in tiles.

        Raises:
            TilingError: see ``plan``.
        """
        self._require_settled()
        wishes = self._wishes
        shape, slices = self._axes(image)
        population = population_of(wishes, self.field)
        weight = next((p for p in self.bare_network.parameters() if p.is_floating_point()), image)
        return stages_or_reason(
            wishes,
            population,
            self.graph if wishes.execution != "tiles" and not wishes.tiles_are_given and population != "tile" else "",
            shape,
            slices=slices,
            mirror_axes=self.mirror_axes,
            device=self.device,
            dtype=weight.dtype,
            on_device=self.perform_everything_on_device,
        )

    def _say(self, line: str | None) -> None:
        """Log a line once."""
        if line is not None and line not in self._said:
            self._said.add(line)
            logger.info(line)
