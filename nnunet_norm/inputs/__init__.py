"""Whole images normalized by their quantiles: in memory, patch by patch, or streamed from a disk."""

from nnunet_norm.inputs.normalized import NormalizedArray
from nnunet_norm.inputs.quantiles import (
    Quantiles,
    interpolated,
    normalize_image,
    normalized,
    quantiles_of,
    ranks_of,
    warn_of_constant,
)

__all__ = [
    "NormalizedArray",
    "Quantiles",
    "interpolated",
    "normalize_image",
    "normalized",
    "quantiles_of",
    "ranks_of",
    "warn_of_constant",
]
