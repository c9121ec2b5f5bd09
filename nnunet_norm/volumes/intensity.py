"""nnU-Net's intensity normalization of a volume that is too large for memory, from one streamed pass over it.

The quantiles of ``input_normalization`` take a second pass. They are exact: every one of nnU-Net's schemes keeps the order of
values, so neighbours of a quantile of the normalized volume are those of the volume, normalized.

nnU-Net crops an image to the smallest box that holds every voxel that is not 0 in some channel, and normalizes what is
left. Both are gathered here in one pass: a channel's moments are taken over its values other than 0, which all lie in
that box, and the zeros of the box are added once it is known.

References:
    Chan et al. 1983, doi 10.1080/00031305.1983.10483115 (moments of parts put together).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_norm.errors import InputImageError, PlansError
from nnunet_norm.inputs import interpolated, normalized, ranks_of, warn_of_constant
from nnunet_norm.layers import IMAGE
from nnunet_norm.stages.regions import Region, hull, slices, whole
from nnunet_norm.volumes.order import OrderStatistics
from nnunet_norm.volumes.zarr_image import ZarrImage

BLOCK_VALUES = 4 * 2**20
"""Values of all channels that are read at once, if chunks are not larger: 16 MiB as float32."""

EPSILON = 1e-8
"""What nnU-Net divides by at least, in float32."""

SCHEMES = (
    *("ZScoreNormalization", "CTNormalization", "NoNormalization"),
    *("RescaleTo01Normalization", "RGBTo01Normalization"),
)
"""nnU-Net's normalizations, by the names that plans use."""


@dataclass(frozen=True)
class ChannelIntensities:
    """How one channel is normalized: ``(clip(x, lower, upper) - shift) / scale``, in float32 as nnU-Net does it.

    With quantiles, ``clip((that - low) / (high - low), 0, 1)`` follows.

    Attributes:
        scheme: its name in the plans.
        shift: what is subtracted.
        scale: what is divided by.
        lower: lower bound; None without clipping.
        upper: upper bound; None without clipping.
        low: what becomes 0 in the end; None without ``input_normalization``.
        high: what becomes 1.
    """

    scheme: str
    shift: float
    scale: float
    lower: float | None = None
    upper: float | None = None
    low: float | None = None
    high: float | None = None

    def normalize(self, values: NDArray[np.float32]) -> None:
        """Normalize values in place."""
        if self.lower is not None:
            np.clip(values, self.lower, self.upper, out=values)
        values -= np.float32(self.shift)
        values /= np.float32(self.scale)
        if self.low is not None and self.high is not None:
            values[...] = normalized(values, np.float32(self.low), np.float32(self.high))


@dataclass(frozen=True)
class Intensities:
    """All that normalizes an image.

    Attributes:
        box: what nnU-Net crops the image to, on the axes of the file.
        channels: one per channel.
    """

    box: Region
    channels: tuple[ChannelIntensities, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which keeps every float exactly."""
        return {"box": [list(side) for side in self.box], "channels": [asdict(channel) for channel in self.channels]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Intensities:
        """What ``as_dict`` gave."""
        box = tuple((int(start), int(stop)) for start, stop in stored["box"])
        return cls(box, tuple(ChannelIntensities(**channel) for channel in stored["channels"]))


def measure_intensities(
    image: ZarrImage,
    plans_manager: Any,
    configuration_manager: Any,
    *,
    input_normalization: str | None = None,
    progress: bool = False,
) -> Intensities:
    """Read the whole image in a fixed order, and find what nnU-Net would crop it to and normalize it by.

    Once, or twice for the quantiles of ``input_normalization``.
    Memory is bounded by a few times a block of 16 MiB, or of one chunk where that is larger. Sums are
    in float64, where nnU-Net's are in float32: its own mean and deviation differ from these by its rounding.

    Args:
        image: the image.
        plans_manager: nnU-Net's, of the plans.
        configuration_manager: nnU-Net's, of the configuration.
        input_normalization: that of the network.
        progress: show a bar.

    Raises:
        InputImageError: a chunk cannot be decoded, values are not finite, or not those of an RGB image.
        PlansError: as :func:`refuse_unknown_normalization`.
    """
    refuse_unknown_normalization(plans_manager, configuration_manager)
    schemes = configuration_manager.normalization_schemes
    orders = [OrderStatistics() for _ in range(image.shape[0])] if input_normalization == IMAGE else []
    moments = [Moments() for _ in range(image.shape[0])]
    box: Region | None = None
    regions = list(blocks(image))
    for region in tqdm(regions, desc=f"intensities of {image.name}", disable=not progress):
        values = image.read(slices(region))
        nonzero = values != 0
        found = _box_of(nonzero.any(axis=0), region, box)
        box = hull(box, found) if box and found else box or found
        for channel, moment in enumerate(moments):
            moment.add(values[channel][nonzero[channel]])
        for channel, order in enumerate(orders):
            order.add(values[channel][nonzero[channel]])
    # nnU-Net leaves an image of zeros alone.
    box = box or whole(image.shape[1:])
    voxels = math.prod(stop - start for start, stop in box)
    properties = plans_manager.foreground_intensity_properties_per_channel
    channels = tuple(
        _channel(image.name, scheme, moment.with_zeros(voxels), properties.get(str(number), {}), number)
        for number, (scheme, moment) in enumerate(zip(schemes, moments, strict=True))
    )
    if orders:
        for order, moment in zip(orders, moments, strict=True):
            order.choose(ranks_of(voxels), voxels - moment.count)
        for region in tqdm(regions, desc=f"quantiles of {image.name}", disable=not progress):
            for order, values in zip(orders, image.read(slices(region)), strict=True):
                order.refine(values[values != 0])
        channels = tuple(_with_quantiles(*each, voxels) for each in zip(channels, orders, strict=True))
        warn_of_constant(f"volume {image.name!r}", [(each.low or 0.0, each.high or 0.0) for each in channels])
    return Intensities(box, channels)


def _with_quantiles(channel: ChannelIntensities, order: OrderStatistics, count: int) -> ChannelIntensities:
    """A channel with the quantiles of what it is normalized to."""
    values = order.values()
    channel.normalize(values)
    low, high = interpolated(values, count)
    return replace(channel, low=low, high=high)


def refuse_unknown_normalization(plans_manager: Any, configuration_manager: Any) -> None:
    """Refuse plans whose preprocessing cannot be done in one pass.

    Raises:
        PlansError: another preprocessor than nnU-Net's default, a normalization that is not known, or one that only
            takes the voxels inside a mask, whose holes cannot be filled without the whole volume.
    """
    del plans_manager
    preprocessor = configuration_manager.preprocessor_name
    if preprocessor != "DefaultPreprocessor":
        raise PlansError(
            f"preprocessor {preprocessor!r} cannot be streamed over a zarr volume: give the image in a format that "
            f"nnU-Net reads, or use plans with 'DefaultPreprocessor'"
        )
    masks = configuration_manager.use_mask_for_norm
    for channel, scheme in enumerate(configuration_manager.normalization_schemes):
        if scheme not in SCHEMES:
            raise PlansError(
                f"normalization {scheme!r} of channel {channel} cannot be streamed over a zarr volume: give the image in "
                f"a format that nnU-Net reads, or use plans with one of {', '.join(SCHEMES)}"
            )
        if scheme == "ZScoreNormalization" and masks[channel]:
            raise PlansError(
                f"use_mask_for_norm true (channel {channel}) needs the mask of the whole volume with its holes filled, "
                f"which cannot be streamed: give a format that nnU-Net reads, or train with plans where it is not"
            )


def blocks(image: ZarrImage) -> Iterator[Region]:
    """Regions of whole chunks that cover the image in the order of z, y, x."""
    most = BLOCK_VALUES // image.shape[0]
    edges = [min(edge, n) for edge, n in zip(image.chunk, image.shape[1:], strict=True)]
    while True:
        # The last axis first: blocks that are long in it read whole rows of chunks.
        for axis in (2, 1, 0):
            longer = [edge * (1 + (a == axis)) for a, edge in enumerate(edges)]
            if edges[axis] < image.shape[1 + axis] and math.prod(longer) <= most:
                edges = longer
                break
        else:
            break
    axes = [[(i, min(i + edge, n)) for i in range(0, n, edge)] for edge, n in zip(edges, image.shape[1:], strict=True)]
    yield from itertools.product(*axes)


@dataclass
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of values that come in parts; in float64."""

    count: int = 0
    mean: float = 0.0
    deviations: float = 0.0
    extremes: tuple[float, float] = field(default=(math.inf, -math.inf))

    def add(self, values: NDArray[np.float32]) -> None:
        """Take in further values."""
        if not values.size:
            return
        mean = float(values.mean(dtype=np.float64))
        differences = values.astype(np.float64)
        differences -= mean
        deviations = float(np.square(differences, out=differences).sum())
        self._join(values.size, mean, deviations, (float(values.min()), float(values.max())))

    def with_zeros(self, count: int) -> Moments:
        """These moments with as many zeros added as make up ``count`` values."""
        joined = Moments(self.count, self.mean, self.deviations, self.extremes)
        if count > self.count:
            joined._join(count - self.count, 0.0, 0.0, (0.0, 0.0))
        return joined

    def _join(self, count: int, mean: float, deviations: float, extremes: tuple[float, float]) -> None:
        total, distance = self.count + count, mean - self.mean
        self.deviations += deviations + distance**2 * (self.count / total) * count
        self.mean += distance * count / total
        self.count = total
        self.extremes = min(self.extremes[0], extremes[0]), max(self.extremes[1], extremes[1])


def _channel(
    name: str, scheme: str, moments: Moments, properties: Mapping[str, float], number: int
) -> ChannelIntensities:
    """The parameters that make the formula of ``ChannelIntensities`` that of nnU-Net's scheme."""
    lowest, highest = moments.extremes
    if scheme == "ZScoreNormalization":
        deviation = math.sqrt(moments.deviations / moments.count)
        return ChannelIntensities(scheme, moments.mean, max(deviation, EPSILON))
    if scheme == "CTNormalization":
        bounds = float(properties["percentile_00_5"]), float(properties["percentile_99_5"])
        return ChannelIntensities(scheme, float(properties["mean"]), max(float(properties["std"]), EPSILON), *bounds)
    if scheme == "RescaleTo01Normalization":
        # The range in float32, as nnU-Net takes the maximum after it has subtracted the minimum.
        extent = float(np.float32(highest) - np.float32(lowest))
        return ChannelIntensities(scheme, lowest, max(extent, EPSILON))
    if scheme == "RGBTo01Normalization":
        if lowest < 0 or highest > 255:
            raise InputImageError(
                f"volume {name!r} has values from {lowest:g} to {highest:g} in channel {number}: RGBTo01Normalization "
                f"takes 0 to 255"
            )
        return ChannelIntensities(scheme, 0.0, 255.0)
    return ChannelIntensities(scheme, 0.0, 1.0)


def _box_of(nonzero: NDArray[np.bool_], region: Region, known: Region | None) -> Region | None:
    """The smallest box in the volume that holds what is nonzero in a region; None if nothing is, or it is known."""
    if known and all(k[0] <= r[0] and r[1] <= k[1] for k, r in zip(known, region, strict=True)):
        return None
    sides: list[Sequence[int]] = []
    for axis, (start, _) in enumerate(region):
        hits = np.flatnonzero(nonzero.any(axis=tuple(a for a in range(3) if a != axis)))
        if not hits.size:
            return None
        sides.append((start + int(hits[0]), start + int(hits[-1]) + 1))
    return tuple((side[0], side[1]) for side in sides)
