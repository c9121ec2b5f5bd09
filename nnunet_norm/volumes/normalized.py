"""``NormalizedVolume``: a volume on disk as the network wants to see it, read and normalized where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnunet_norm.stages.regions import Region, clip
from nnunet_norm.volumes.intensity import Intensities
from nnunet_norm.volumes.zarr_image import ZarrImage, bounds_of


class NormalizedVolume:
    """What nnU-Net's preprocessing makes of an image when nothing is resampled, without ever holding it.

    Indexing gives a ``torch.Tensor`` of type float32 that equals the same part of the array that nnU-Net's
    ``DefaultPreprocessor.run_case_npy`` returns. The axes are those of the network: transposed, and cropped.

    Args:
        image: the image on disk.
        intensities: what it is cropped to and normalized by.
        transpose_forward: of the plans; axis i of the network is axis ``transpose_forward[i]`` of the file.

    Attributes:
        shape: (C, x, y, z) as the network names its axes.
        spacing: on the network's axes; None if unknown.
    """

    dtype = torch.float32

    def __init__(self, image: ZarrImage, intensities: Intensities, transpose_forward: Sequence[int]) -> None:
        assert len(intensities.channels) == image.shape[0], (len(intensities.channels), image.shape)
        self.image, self.intensities = image, intensities
        self._axes = tuple(transpose_forward)
        self._origin = tuple(intensities.box[axis][0] for axis in self._axes)
        extents = (intensities.box[axis][1] - intensities.box[axis][0] for axis in self._axes)
        self.shape = torch.Size((image.shape[0], *extents))
        self.spacing = None if image.spacing is None else tuple(image.spacing[axis] for axis in self._axes)

    @property
    def ndim(self) -> int:
        """4."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        wanted = index if isinstance(index, tuple) else (index,)
        if len(wanted) > self.ndim:
            raise IndexError(f"{len(wanted)} indices for a volume of {self.ndim} axes")
        channels, *spatial = wanted + (slice(None),) * (self.ndim - len(wanted))
        within: list[slice | int] = [slice(None)] * 3
        for axis, (side, origin, n) in enumerate(zip(spatial, self._origin, self.shape[1:], strict=True)):
            start, stop = bounds_of(side, n)
            within[self._axes[axis]] = slice(start + origin, stop + origin)
        values = self.image.read(within)
        for channel, parameters in zip(values, self.intensities.channels, strict=True):
            parameters.normalize(channel)
        tensor = torch.from_numpy(values).permute(0, *(1 + axis for axis in self._axes))
        return tensor[(channels, *(slice(None) if isinstance(side, slice) else 0 for side in spatial))].contiguous()

    def to_file(self, region: Region) -> Region:
        """Where a region of the network's axes lies in the file."""
        found = [(0, 0)] * 3
        for axis, (start, stop), origin in zip(self._axes, region, self._origin, strict=True):
            found[axis] = (start + origin, stop + origin)
        return tuple(found)

    def from_file(self, region: Region) -> Region | None:
        """Where the part of a region of the file that lies in the box is on the network's axes; None if nothing does."""
        moved = tuple(
            (region[axis][0] - origin, region[axis][1] - origin)
            for axis, origin in zip(self._axes, self._origin, strict=True)
        )
        inside = clip(moved, self.shape[1:])
        return inside if all(start < stop for start, stop in inside) else None

    def properties(self) -> dict[str, Any]:
        """What nnU-Net's preprocessing notes beside an image, for its export."""
        before = tuple(self.image.shape[1 + axis] for axis in self._axes)
        return {
            "spacing": self.image.spacing,
            "shape_before_cropping": before,
            "bbox_used_for_cropping": [list(self.intensities.box[axis]) for axis in self._axes],
            "shape_after_cropping_and_before_resampling": tuple(self.shape[1:]),
        }
