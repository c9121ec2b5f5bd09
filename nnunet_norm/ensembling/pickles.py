"""The pickles that nnU-Net leaves beside its predictions, read so that they run no code but nnU-Net's own postprocessing.

A pickle may name any function of any installed module to be called while it is read. Here plain values, numpy's numbers and
numpy's arrays of numbers are built, by functions of this package under numpy's names, and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_norm.errors import EnsembleError
from nnunet_norm.prediction.safe_loading import ALLOWED


class _Array(np.ndarray[Any, Any]):
    """Stands for ``numpy.ndarray``: takes the state of an array of numbers and no other."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, is_fortran, data = state
        if not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that holds something else than numbers")
        super().__setstate__((version, shape, np.dtype(dtype.code), is_fortran, data))


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> _Array:
    """Stands for numpy's function that makes an array to be filled from its state."""
    del kind, shape, code
    return _Array((0,), np.uint8)


def _array_of_buffer(buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray[Any, Any]:
    """Stands for numpy's function that makes an array of newer pickles."""
    return np.frombuffer(bytes(buffer), np.dtype(dtype.code)).reshape(shape, order="F" if order == "F" else "C")


_MODULES = ("numpy._core", "numpy.core")
_KNOWN: dict[str, Any] = {
    "numpy.ndarray": _Array,
    **{name: made for made, name in ALLOWED},
    **{f"{module}.multiarray._reconstruct": _empty_array for module in _MODULES},
    **{f"{module}.numeric._frombuffer": _array_of_buffer for module in _MODULES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, known: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of that name; an error for any that is not known."""
        try:
            return self._known[f"{module}.{name}"]
        except KeyError as error:
            raise _Unknown(f"{module}.{name}") from error


class _Unknown(pickle.UnpicklingError):
    """A pickle that names a function or class that is not known."""


def load_restricted(path: Path, functions: Mapping[str, Any] | None = None) -> Any:
    """What a pickle of plain values, numbers, arrays of numbers, and named functions holds.

    Args:
        path: the pickle.
        functions: what it may name beside that, by module and name, for example ``{"package.module.function": function}``.

    Raises:
        EnsembleError: it cannot be read, is not whole, or names something else; that is not called.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, {**_KNOWN, **(functions or {})}).load())
    except OSError as error:
        raise EnsembleError(f"{path} cannot be read ({error.strerror}): predict its cases again") from error
    except _Unknown as error:
        raise EnsembleError(
            f"{path} would call {error} when it is read, and no file of nnU-Net needs that; it was not called: write the "
            "file anew with nnU-Net"
        ) from error
    # Bytes that are no pickle raise whatever the opcode that they happen to be finds missing.
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise EnsembleError(f"{path} is not whole, or no pickle of plain values: write it anew with nnU-Net") from error


def _plain(value: Any) -> Any:
    """The same with numpy's own arrays, so that it can be written again."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(part) for part in value)
    return value.view(np.ndarray) if isinstance(value, _Array) else value
