"""Tile and halo for one image: those that the user chose, if memory holds them, or those that cost least and fit into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.halo import (
    Decision,
    by,
    decide,
    exact_halo,
    given_halo,
    mirrored,
    planned_shape,
    tile_shape,
    why_never_exact,
)
from nnunet_norm.prediction.tile_axis import Sides
from nnunet_norm.prediction.tile_choice import Budget, Extents, Tiling, cheapest, remedy, require_room, tilings
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.tiling import padded_shape

AUTO = "auto"
"""The word for a tile size that is chosen here."""


@dataclass(frozen=True, kw_only=True)
class TileTask:
    """An image that is to be cut into tiles.

    Attributes:
        image_shape: spatial axes of the network.
        slices: how many slices of this shape there are.
        field: the network's receptive field.
        patch_size: of the configuration.
        tile_size: what the user asked for: voxels, ``AUTO``, or None for the patch.
        halo: see ``decide``.
        mirror_axes: spatial axes that are mirrored.
        effective: see ``decide``.
        budget: the memory there is.
        cost: of one tile, see ``tile_choice.cost_of``.
        stated: how the memory was stated by the user; None: it was not, and tiles that were named are not refused.
        say: takes lines for the user.
    """

    image_shape: Extents
    slices: int
    field: ReceptiveField
    patch_size: Sequence[int]
    tile_size: Sequence[int] | str | None
    halo: str | int | Sequence[int]
    mirror_axes: Sequence[int]
    effective: Callable[[], Sides | None]
    budget: Budget
    cost: Callable[[Extents], float]
    stated: str | None
    say: Callable[[str | None], None]

    @property
    def memory(self) -> str:
        """The memory, for the user."""
        return self.stated or "the memory that is available"


def planned(task: TileTask) -> tuple[Decision, Extents]:
    """How the image is cut, and the shape that is cut (see ``planned_shape``).

    Raises:
        TilingError: see ``decide``; or memory does not hold the tile, with the sizes that it holds.
    """
    if task.tile_size == AUTO:
        why = _why_the_patch(task)
        if why is None:
            return _automatic(task), task.image_shape
        task.say(f"--tile-size auto keeps the patch of {by(task.patch_size)}: {why}")
    asked = None if isinstance(task.tile_size, str) else task.tile_size
    tile, note = tile_shape(asked, task.patch_size, task.field)
    task.say(note)
    decision = decide(
        task.image_shape,
        task.field,
        tile,
        tile_is_given=asked is not None,
        halo=task.halo,
        mirror_axes=task.mirror_axes,
        slices=task.slices,
        effective=task.effective,
    )
    shape = planned_shape(task.image_shape, tile, task.field)
    if task.stated is not None:
        padded = padded_shape(shape, decision.stride)
        read = tuple(min(edge, n) for edge, n in zip(decision.tile_size, padded, strict=True))
        require_room(read, task.budget, _candidates(task, shape, decision.halo, keep_half=False), task.stated)
    return decision, shape


def _why_the_patch(task: TileTask) -> str | None:
    """Why no other tile than the patch is looked for; None if one is."""
    why = why_never_exact(task.field)
    if why is not None:
        return f"the result depends on the tile ({why})"
    padded = padded_shape(task.image_shape, task.field.stride)
    patch = padded_shape(task.patch_size, task.field.stride)
    need = task.budget.need(tuple(min(edge, n) for edge, n in zip(patch, padded, strict=True)))
    return f"what a tile takes cannot be counted ({need})" if isinstance(need, str) else None


def _automatic(task: TileTask) -> Decision:
    """The cheapest tile that memory holds: with the exact halo if then the core can be half of it, else the effective one."""
    candidates: list[Tiling] = []
    for halo, keep_half in _halos(task):
        candidates = _candidates(task, task.image_shape, halo, keep_half=keep_half)
        chosen = cheapest(candidates, task.budget)
        if chosen is not None:
            return decide(
                task.image_shape,
                task.field,
                chosen.tile,
                automatic=True,
                halo=task.halo,
                mirror_axes=task.mirror_axes,
                slices=task.slices,
                effective=task.effective,
            )
    raise TilingError(
        f"no tile of this network with halo {task.halo!r} fits into {task.memory}: {remedy(candidates, task.budget)}"
    )


def _halos(task: TileTask) -> Iterator[tuple[Sides, bool]]:
    """Halos in the order of preference, each with whether the core must be half of the tile."""
    full = exact_halo(task.field, task.mirror_axes)
    assert full is not None
    if not isinstance(task.halo, str):
        yield tuple((h, h) for h in given_halo(task.halo, len(full))), False
        return
    if task.halo != "erf":
        yield full, task.halo == "auto"
    if task.halo != "exact":
        measured = task.effective()
        if measured is not None:
            sides = mirrored(measured, task.mirror_axes)
            yield tuple((min(b, f), min(a, g)) for (b, a), (f, g) in zip(sides, full, strict=True)), True


def _candidates(task: TileTask, shape: Extents, halo: Sides, *, keep_half: bool) -> list[Tiling]:
    patch = padded_shape(task.patch_size, task.field.stride)
    return tilings(shape, task.field.stride, halo, keep_half=keep_half, cost=task.cost, patch=patch)
