"""Which tile size and halo a prediction uses, and whether the result is that of the whole image: a pure decision.

No image is touched here. The one thing that needs an image, the effective receptive field, comes in as a function that
is called only where the theoretical reach does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnunet_norm.errors import TilingError
from nnunet_norm.prediction.tile_axis import Sides, TileAxis, of_tokens
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.tiling import padded_shape, plan_tiles, round_up, smallest_tile

HALO_WORDS = ("auto", "exact", "erf")
"""What a halo may be besides a number: the exact one where it fits, the exact one or a refusal, the effective one."""

LARGEST_ENLARGEMENT = 2
"""A tile that the user did not choose may grow to this multiple of the patch, per axis, to make the exact halo fit."""


@dataclass(frozen=True)
class Decision:
    """How one image is predicted in tiles. Everything per spatial axis of the network, in voxels.

    Attributes:
        image_shape: the image; a 2d network takes the slices of a stack one by one, so here it is that of a slice.
        stride: the network's total stride.
        tile_size: extent of a tile; an image below it is one tile.
        halo: (before, after) that is cut away at tile sides inside the image.
        source: per axis where the halo comes from: theoretical, effective, given, none needed, two tokens of a transformer,
            or half of the tile where there is no room for more or the effective one cannot be measured.
        exact: whether the result is that of the whole image in one pass, apart from rounding.
        reason: why it is exact or not.
        statistics: "fixed", or "tile" where a layer normalizes with the statistics of its tile.
        tiles: how many tiles are predicted, over all slices of a stack.
        population: whose statistics the norms use: "tile", or "stored" for fixed ones.
        measured_error: what a halo that does not suffice did to tiles of this image (``HaloError.as_dict``), if that was
            measured.
    """

    image_shape: tuple[int, ...]
    stride: tuple[int, ...]
    tile_size: tuple[int, ...]
    halo: Sides
    source: tuple[str, ...]
    exact: bool
    reason: str
    statistics: str
    tiles: int
    population: str = "stored"
    measured_error: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The decision for a JSON file, with the name of the execution plan, which adds the population."""
        return {"plan": "tiles", **{key: value for key, value in asdict(self).items() if key != "population"}}

    def describe(self) -> str:
        """The decision for the user, in one line."""
        halo = ", ".join(
            "none needed" if source == "none needed" else f"{before}/{after} ({source})"
            for (before, after), source in zip(self.halo, self.source, strict=True)
        )
        return (
            f"image of {by(self.image_shape)} voxels: {self.tiles} tile{'s' * (self.tiles != 1)} of at most "
            f"{by(self.tile_size)}, halo before/after per axis: {halo}; {self.statistics} statistics; "
            f"{'exact' if self.exact else 'not exact'}: {self.reason}"
        )


def tile_shape(
    tile_size: Sequence[int] | None, patch_size: Sequence[int], field: ReceptiveField
) -> tuple[tuple[int, ...], str | None]:
    """The tile to start from, a multiple of the total stride, and a line about a correction of what the user gave.

    For tile statistics it is at least two strides wide on one axis: the one element at the bottom of the network would
    have no variance, and InstanceNorm refuses it. A network that takes one extent alone has tiles of that.

    Args:
        tile_size: the user's choice, one number for all axes or one per axis; None takes the patch.
        patch_size: the configuration's patch size.
        field: the network's receptive field.

    Raises:
        TilingError: a number of axes that is not the network's, a size below 1, or one that the network does not take.
    """
    asked = tuple(patch_size) if tile_size is None else _per_axis("tile size", tile_size, len(field.stride), minimum=1)
    if field.only_extent not in (None, asked):
        raise TilingError(
            f"tile size {by(asked)} does not suit this network, which takes tiles of {by(field.only_extent or ())} alone, "
            "the patch that it was trained with: leave --tile-size out"
        )
    tile = padded_shape(asked, field.stride)
    if field.tile_statistics and tile == field.stride and field.only_extent is None:
        tile = (*tile[:-1], 2 * tile[-1])
    if tile_size is None or tile == asked:
        return tile, None
    return tile, f"tile size {by(asked)} is corrected upwards to {by(tile)}: the total stride is {by(field.stride)}"


def planned_shape(image_shape: Sequence[int], tile: Sequence[int], field: ReceptiveField) -> tuple[int, ...]:
    """The shape that is cut into tiles: the image's, for tile statistics at least a tile's.

    The statistics of tiles are comparable only if all tiles are of one size, that of training. So smaller images are
    zero-padded to a tile, as in training; and for a network that takes one extent alone. Else, with fixed statistics, nothing
    but a multiple of the total stride is needed.
    """
    if not field.tile_statistics and field.only_extent is None:
        return tuple(image_shape)
    return tuple(max(n, t) for n, t in zip(image_shape, tile, strict=True))


def decide(
    image_shape: Sequence[int],
    field: ReceptiveField,
    tile: Sequence[int],
    *,
    tile_is_given: bool = False,
    automatic: bool = False,
    halo: str | int | Sequence[int] = "auto",
    mirror_axes: Sequence[int] = (),
    slices: int = 1,
    effective: Callable[[], Sides | None],
) -> Decision:
    """Choose tile and halo for one image.

    Args:
        image_shape: spatial axes of the network (the slices of a stack are counted by ``slices``).
        field: the network's receptive field.
        tile: from ``tile_shape``.
        tile_is_given: the user chose the tile, so it stays; else it may grow where statistics are fixed.
        automatic: the tile was chosen for the image, the halo and the memory (``tile_choice``), so it stays.
        halo: one of ``HALO_WORDS``, or voxels: one number for all axes or one per axis.
        mirror_axes: spatial axes that are mirrored; on them both halos are the larger of the two.
        slices: how many slices of this shape there are.
        effective: measures the effective reach on this image, or gives None; called only if it is needed.

    Raises:
        TilingError: a halo that leaves no core of the tile, or an exact one that does not fit or does not exist.
    """
    planned = planned_shape(image_shape, tile, field)
    stays = tile_is_given or automatic or field.tile_statistics or field.only_extent is not None
    growth = 1 if stays else LARGEST_ENLARGEMENT
    padded = padded_shape(planned, field.stride)
    axes = [TileAxis(s, p, t, growth * t) for s, p, t in zip(field.stride, padded, tile, strict=True)]
    full = exact_halo(field, mirror_axes)
    if isinstance(halo, str):
        edges, sides, word = _named(halo, axes, field, full, tile_is_given, effective, mirror_axes)
    else:
        edges, sides, word = _given(given_halo(halo, len(axes)), axes, field, automatic=automatic)
    inner = [axis.padded > edge for axis, edge in zip(axes, edges, strict=True)]
    sides = tuple(pair if needed else (0, 0) for pair, needed in zip(sides, inner, strict=True))
    exact = not any(inner) or (full is not None and _suffices(sides, inner, field, mirror_axes))
    return Decision(
        image_shape=tuple(image_shape),
        stride=field.stride,
        tile_size=edges,
        halo=sides,
        source=tuple(word if needed else "none needed" for needed in inner),
        exact=exact,
        reason=_reason(exact, any(inner), field, full),
        statistics="tile" if field.tile_statistics else "fixed",
        tiles=slices * len(plan_tiles(planned, edges, sides, field.stride)),
        population="tile" if field.norms_of_tiles else "stored",
    )


def exact_halo(field: ReceptiveField, mirror_axes: Sequence[int] = ()) -> Sides | None:
    """The halo with which tiles give what the whole image does: multiples of the stride; None if there is none."""
    return None if why_never_exact(field) else mirrored(_aligned_halo(field), mirror_axes)


def given_halo(halo: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """A halo in voxels, one per axis.

    Raises:
        TilingError: a number of axes that is not the network's, or a negative one.
    """
    return _per_axis("halo", halo, axes, minimum=0)


def why_never_exact(field: ReceptiveField) -> str | None:
    """Why no halo makes a tiled prediction that of the whole image; None if a large enough one does."""
    if field.normalizes_tiles:
        return (
            "no halo can make it seamless, because every tile is normalized by its own quantiles (input_normalization "
            "tile_quantile; with image_quantile the whole image is)"
        )
    if field.tile_statistics:
        first, *others = field.tile_statistics
        more = f" and {len(others)} more" if others else ""
        besides = f"; besides, {field.unbounded} sees the whole tile" if field.unbounded is not None else ""
        return (
            f"no halo can make it seamless, because the statistics of {first}{more} depend on the tile "
            f"(stored ones, which BatchRenorm and BatchNorm have, do not){besides}"
        )
    if field.unbounded is not None:
        return f"no halo can make it exact, because {field.unbounded} sees the whole tile"
    return None


def by(shape: Sequence[int]) -> str:
    """A shape for the user: ``128 x 128``."""
    return " x ".join(map(str, shape))


Choice = tuple[tuple[int, ...], Sides, str]
"""Tile edges, halo, and where the halo comes from."""


def _given(halo: Sequence[int], axes: Sequence[TileAxis], field: ReceptiveField, *, automatic: bool) -> Choice:
    edges = []
    for number, (h, axis) in enumerate(zip(halo, axes, strict=True)):
        if 2 * h + axis.stride > axis.largest and not (automatic and axis.padded <= axis.largest):
            larger = (
                f" or --tile-size at least {smallest_tile(h, [axis.stride])[0]}" if field.only_extent is None else ""
            )
            raise TilingError(
                f"halo {h} leaves no core of a tile of {axis.largest} on axis {number} (total stride {axis.stride}): choose "
                f"--halo at most {(axis.largest - axis.stride) // 2}{larger}"
            )
        edge = axis.edge_for(2 * h, keep_half=False)
        assert edge is not None, (h, axis)
        edges.append(edge)
    return tuple(edges), tuple((h, h) for h in halo), "given"


def _named(
    halo: str,
    axes: Sequence[TileAxis],
    field: ReceptiveField,
    full: Sides | None,
    tile_is_given: bool,
    effective: Callable[[], Sides | None],
    mirror_axes: Sequence[int],
) -> Choice:
    """The choice for one of ``HALO_WORDS``. The exact halo is all or nothing: one axis short of it is not exact."""
    tile = tuple(axis.tile for axis in axes)
    if halo == "exact" and full is None:
        raise TilingError(f"halo 'exact' does not exist for this network: {why_never_exact(field)}; choose --halo auto")
    if halo != "erf" and full is not None:
        keep_half = halo == "auto" and not tile_is_given
        edges = [axis.edge_for(sum(pair), keep_half=keep_half) for axis, pair in zip(axes, full, strict=True)]
        fitting = tuple(edge for edge in edges if edge is not None)
        if len(fitting) == len(edges):
            return fitting, full, "theoretical"
        if halo == "exact":
            raise TilingError(f"halo 'exact' does not fit tiles of {by(tile)}: {_remedy(full, field)}")
    if all(axis.padded <= axis.tile for axis in axes):
        return tile, ((0, 0),) * len(axes), "effective"
    if halo == "auto" and field.only_extent is not None:
        return tile, *of_tokens(axes)
    measured = effective()
    sides = ((max(tile),) * 2,) * len(axes) if measured is None else mirrored(measured, mirror_axes)
    if full is not None:
        sides = tuple((min(b, f), min(a, g)) for (b, a), (f, g) in zip(sides, full, strict=True))
    source = "half of the tile" if measured is None else "effective"
    return tile, tuple(axis.cap(pair) for axis, pair in zip(axes, sides, strict=True)), source


def _reason(exact: bool, inner: bool, field: ReceptiveField, full: Sides | None) -> str:
    if not inner:
        return "the image fits one tile"
    if exact:
        return "statistics are fixed and the halo covers the theoretical receptive field"
    return why_never_exact(field) or _remedy(full or (), field)


def _remedy(full: Sides, field: ReceptiveField) -> str:
    halo = ", ".join(f"{before}/{after}" for before, after in full)
    return (
        f"the exact halo before/after per axis is {halo} (--tile-size at least {by(smallest_tile(full, field.stride))})"
    )


def _suffices(sides: Sides, inner: Sequence[bool], field: ReceptiveField, mirror_axes: Sequence[int]) -> bool:
    """Whether halos cover the reach: the aligned one after rounding down to the grid, or that of any voxel."""
    aligned, any_voxel = mirrored(field.aligned, mirror_axes), mirrored(field.any_voxel, mirror_axes)
    return all(
        have // stride * stride >= on_grid or have >= anywhere
        for pair, a, v, stride, needed in zip(sides, aligned, any_voxel, field.stride, inner, strict=True)
        if needed
        for have, on_grid, anywhere in zip(pair, a, v, strict=True)
    )


def _aligned_halo(field: ReceptiveField) -> Sides:
    """The aligned reach rounded up to the stride: then cores lie on its grid, for which the aligned reach is meant."""
    return tuple((round_up(b, s), round_up(a, s)) for (b, a), s in zip(field.aligned, field.stride, strict=True))


def mirrored(sides: Sides, mirror_axes: Sequence[int]) -> Sides:
    """On axes that are mirrored the larger of the two on both sides."""
    return tuple((max(pair), max(pair)) if axis in mirror_axes else pair for axis, pair in enumerate(sides))


def _per_axis(what: str, value: int | Sequence[int], axes: int, *, minimum: int) -> tuple[int, ...]:
    numbers = (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)
    if len(numbers) != axes or min(numbers) < minimum:
        raise TilingError(
            f"{what} {by(numbers)} does not suit a network with {axes} spatial axes: "
            f"give one number for all or one per axis, each at least {minimum}"
        )
    return numbers
