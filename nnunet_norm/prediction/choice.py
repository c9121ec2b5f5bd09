"""Which execution plan predicts an image, and with whose statistics; refusals of what cannot be honoured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.prediction.ways import Way, Wishes, first_way
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.stages import Graph
from nnunet_norm.tiling import padded_shape

EXECUTIONS = ("auto", "stages", "tiles")
POPULATIONS = ("stored", "image", "tile", "batch")


@dataclass(frozen=True, kw_only=True)
class Task:
    """An image that is to be predicted, and what with.

    Attributes:
        image_shape: spatial axes of the network.
        slices: how many slices of this shape there are.
        mirror_axes: spatial axes that are mirrored.
        device: where the network computes.
        dtype: of its weights.
        on_device: scratch may lie on the device.
        folds: how many folds of the model are averaged.
        streamed: logits are turned into labels as they come; else they are wanted as one array in memory.
        resumable: what lies on a disk must stand in files that another process can continue with.
    """

    image_shape: tuple[int, ...]
    slices: int
    mirror_axes: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    on_device: bool
    folds: int = 1
    streamed: bool = False
    resumable: bool = False

    @property
    def passes(self) -> int:
        """Of the network over the image."""
        return self.folds * 2 ** len(self.mirror_axes)

    def result_bytes(self, channels: int, *, on_disk: bool) -> int:
        """Bytes that the result takes: nothing where a single pass is handed on as it comes."""
        plane = channels * math.prod(self.image_shape) * max(self.dtype.itemsize, torch.float32.itemsize)
        if not self.streamed:
            return plane * self.slices
        if self.passes == 1:
            return 0
        return plane * (2 if on_disk and self.resumable else 1)


def population_of(wishes: Wishes, field: ReceptiveField) -> str:
    """Whose statistics are used: ``stored``, ``image``, ``tile`` or ``batch``.

    A network whose stored statistics are not to be used has lost them (``populations.network_for``); one that is to have
    those of a batch has places for them.

    Raises:
        TilingError: statistics that the network does not have, or that the execution asked for cannot use.
    """
    population = _population(wishes, field)
    if wishes.execution == "stages" and population == "tile":
        raise TilingError("execution 'stages' has no tiles, so --population tile needs --execution tiles (or auto)")
    if wishes.execution == "stages" and wishes.tiles_are_given:
        raise TilingError("--tile-size and --halo are for tiles: leave them out, or choose --execution tiles")
    if population == "image" and (wishes.execution == "tiles" or wishes.tiles_are_given):
        chosen = "--execution tiles was chosen" if wishes.execution == "tiles" else "--tile-size or --halo was given"
        raise TilingError(
            f"tiles cannot use the whole image's statistics, and {chosen}: leave that out, or choose --population tile, as "
            "nnU-Net does with InstanceNorm"
        )
    return population


def _population(wishes: Wishes, field: ReceptiveField) -> str:
    if wishes.population == "batch":
        return "batch"
    if field.normalizes_tiles:
        return _population_of_tiles(wishes, field)
    if not field.tile_statistics:
        if wishes.population not in (None, "stored"):
            raise TilingError(
                f"population {wishes.population!r} is of no use: this network has no norm that takes statistics; leave "
                "--population out"
            )
        return "stored"
    if wishes.population == "stored":
        raise TilingError(
            f"population 'stored' does not exist for this network: {field.tile_statistics[0]} has no stored statistics; "
            "choose --population image, tile or batch"
        )
    return wishes.population or "image"


def _population_of_tiles(wishes: Wishes, field: ReceptiveField) -> str:
    """Whose statistics the norms of a network use whose input is normalized by the quantiles of every tile."""
    if wishes.population == "image":
        raise TilingError(
            "population 'image' needs the whole image, and this network normalizes every tile by its own quantiles "
            "(input_normalization tile_quantile): leave --population out, or choose tile"
        )
    norms = field.norms_of_tiles
    if norms and wishes.population == "stored":
        raise TilingError(
            f"population 'stored' does not exist for this network: {norms[0]} has no stored statistics; choose --population "
            "tile or batch"
        )
    return "tile" if norms else "stored"


def stages_or_reason(wishes: Wishes, population: str, graph: Graph | str, task: Task) -> StagesPlan | str:
    """The plan that runs the image stage by stage, or why tiles do.

    Args:
        wishes: what the user asked for.
        population: from ``population_of``.
        graph: the network, or why it cannot be run stage by stage.
        task: the image.

    Raises:
        TilingError: stages were asked for, or are needed for the statistics, and cannot be had.
    """
    if population == "tile":
        return "the statistics of tiles were asked for"
    reason = _why_tiles(wishes, graph)
    if reason is None:
        assert isinstance(graph, Graph)
        plan = _fitting(wishes, population, graph, task)
        if isinstance(plan, StagesPlan):
            return plan
        reason = plan
    _refuse_tiles(wishes, population, reason)
    return reason


def why_never_stages(wishes: Wishes, population: str, graph: Graph | str) -> None:
    """Refuse what no image can mend: stages were asked for, or are needed, and the network's operators are not known.

    Raises:
        TilingError: as said.
    """
    reason = _why_tiles(wishes, graph)
    if population != "tile" and reason is not None:
        _refuse_tiles(wishes, population, reason)


def _refuse_tiles(wishes: Wishes, population: str, reason: str) -> None:
    """Refuse to cut the image into tiles, for a reason, where that would break what was asked for."""
    if wishes.execution == "stages":
        other = "--execution tiles" + (" --population tile" if population == "image" else "")
        raise TilingError(f"execution 'stages' is not possible: {reason}; else choose {other}")
    if population == "image":
        raise TilingError(
            f"the whole image's statistics cannot be had: {reason}; else choose --population tile, as nnU-Net does "
            "with InstanceNorm"
        )


def _why_tiles(wishes: Wishes, graph: Graph | str) -> str | None:
    if wishes.execution == "tiles":
        return "--execution tiles was chosen"
    if wishes.tiles_are_given:
        return "--tile-size or --halo was given, which are for tiles"
    if isinstance(graph, str):
        return f"this network cannot be run stage by stage: {graph}"
    return None


def _fitting(wishes: Wishes, population: str, graph: Graph, task: Task) -> StagesPlan | str:
    """The plan that memory and disk hold, or what is missing."""
    padded = padded_shape(task.image_shape, graph.stride)
    way = first_way(
        wishes,
        graph,
        {padded: 1},
        task.device,
        task.dtype,
        on_device=task.on_device,
        result_bytes=lambda on_disk: task.result_bytes(graph.nodes[-1].channels, on_disk=on_disk),
        in_place=not task.resumable,
    )
    if isinstance(way, str):
        return way
    return staged(population, task, way, padded, wishes.scratch)


def staged(population: str, task: Task, way: Way, padded: tuple[int, ...], scratch: Path | None) -> StagesPlan:
    """The plan for one image, that goes a certain way."""
    schedule = way.schedules[padded]
    return StagesPlan(
        schedule=schedule,
        image_shape=task.image_shape,
        slices=task.slices,
        mirror_axes=task.mirror_axes,
        population=population,
        device=task.device,
        dtype=task.dtype,
        place=way.place,
        scratch_folder=scratch,
        result_bytes=task.result_bytes(schedule.graph.nodes[-1].channels, on_disk=way.place == "disk"),
        memory_bytes=way.memory_bytes,
        first_level=way.first_level,
        block_bytes=way.block_bytes,
        reason="norms see the whole image" if population == "image" else "the halo is that of every stage",
    )
