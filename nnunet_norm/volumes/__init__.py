"""Volumes that are too large for memory: zarr images in, zarr labels out, and how both are cut into pieces.

The library zarr is optional (``pip install 'nnunet_norm[volumes]'``); it is imported when a volume is opened.
"""

from nnunet_norm.volumes.intensity import (
    ChannelIntensities,
    Intensities,
    measure_intensities,
    refuse_unknown_normalization,
)
from nnunet_norm.volumes.layout import parts, shard_and_chunk, shard_counts, shards
from nnunet_norm.volumes.normalized import NormalizedVolume
from nnunet_norm.volumes.spacing import refuse_resampling
from nnunet_norm.volumes.zarr_image import Volume, ZarrImage, find_volumes, holds_volumes, is_volume
from nnunet_norm.volumes.zarr_labels import (
    LabelVolume,
    discard_unfinished,
    is_finished,
    label_layout,
    provenance_of,
    unfinished_path,
)

__all__ = [
    "ChannelIntensities",
    "Intensities",
    "LabelVolume",
    "NormalizedVolume",
    "Volume",
    "ZarrImage",
    "discard_unfinished",
    "find_volumes",
    "holds_volumes",
    "is_finished",
    "is_volume",
    "label_layout",
    "measure_intensities",
    "parts",
    "provenance_of",
    "refuse_resampling",
    "refuse_unknown_normalization",
    "shard_and_chunk",
    "shard_counts",
    "shards",
    "unfinished_path",
]
