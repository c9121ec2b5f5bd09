"""``NormalizedArray``: an image that is read and normalized where it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_norm.inputs.quantiles import Quantiles, normalized


class NormalizedArray:
    """An image (C, *spatial) on a disk, normalized by its quantiles; nothing is read before it is sliced.

    Args:
        array: what gives a NumPy array where it is sliced: nnU-Net's blosc2 file, or a memory-mapped one.
        quantiles: per channel.

    Attributes:
        shape: (C, *spatial).
        dtype: of the array.
    """

    def __init__(self, array: Any, quantiles: Quantiles) -> None:
        assert len(quantiles) == array.shape[0], (len(quantiles), array.shape)
        self._array, self._quantiles = array, np.asarray(quantiles, np.float32)
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        values = np.asarray(self._array[index])
        of_channels = self._quantiles[index[0] if isinstance(index, tuple) else index]
        low, high = (of_channels[..., side] for side in (0, 1))
        axes = low.shape + (1,) * (values.ndim - low.ndim)
        return normalized(values, low.reshape(axes), high.reshape(axes)).astype(self.dtype, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        del copy  # what is normalized is always new
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)
