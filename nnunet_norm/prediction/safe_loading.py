"""Checkpoints read so that they run no code: torch's restricted unpickler, and what nnU-Net writes beside tensors.

A checkpoint is a pickle, and a pickle may name any function of any installed module to be called while it is read. The
restricted unpickler knows tensors and plain values. nnU-Net's log has numpy's numbers, too. They are read here by
functions of this module under numpy's names, so that numpy's own never see the bytes of a stranger.
"""

from __future__ import annotations

import json
import os
import pickle
import pydoc
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from nnunet_norm.errors import ModelFolderError

_NUMBER = re.compile(r"[biufc]\d{1,2}")


class _NumberType:
    """Stands for ``numpy.dtype`` where it is that of a plain number; nothing else can be built with it."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        del align, copy
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"numpy.dtype {code!r} is not that of a number")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the order of bytes from the state of a ``numpy.dtype``, and nothing else."""
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"numpy.dtype {self.code!r} with byte order {order!r}")
        self.code = order + self.code.lstrip("<>=|")


def _number(dtype: _NumberType, data: bytes) -> np.generic:
    """Stands for numpy's function that makes a number from its bytes."""
    kind = np.dtype(dtype.code)
    if len(data) != kind.itemsize:
        raise pickle.UnpicklingError(f"a number of {len(data)} bytes, and {kind} has {kind.itemsize}")
    number: np.generic = np.frombuffer(data, kind)[0]
    return number


ALLOWED = (
    (_NumberType, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),  # numpy 2
    (_number, "numpy.core.multiarray.scalar"),  # numpy 1
)
"""What may be called beside what torch allows, with the names under which checkpoints have it."""


@contextmanager
def restricted_loading(*, trust: bool = False) -> Iterator[None]:
    """Inside, ``torch.load`` runs no code of the file, whatever its caller says, as nnU-Net's predictor does.

    It holds for the process, so other threads load so, too, meanwhile.

    Args:
        trust: change nothing.

    Raises:
        ModelFolderError: a file that would run code, or holds something else that is no tensor and no plain value.
    """
    if trust:
        yield
        return
    load = torch.load

    def restricted(f: Any, *args: Any, **kwargs: Any) -> Any:
        with _refusals(f), torch.serialization.safe_globals(list(ALLOWED)):
            return load(f, *args, **(kwargs | {"weights_only": True}))

    with mock.patch.object(torch, "load", restricted):
        yield


def load_checkpoint(path: str | os.PathLike[str], *, trust: bool = False, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint on the CPU.

    Args:
        path: written by ``torch.save``.
        trust: let it run what code it will.
        mmap: leave tensors in the file until they are looked at.

    Raises:
        ModelFolderError: see ``restricted_loading``.
    """
    with restricted_loading(trust=trust):
        checkpoint: dict[str, Any] = torch.load(Path(path), map_location="cpu", weights_only=not trust, mmap=mmap)
    return checkpoint


@contextmanager
def _refusals(file: Any) -> Iterator[None]:
    """Turn the errors of the restricted unpickler into a refusal, and leave all others."""
    name = repr(os.fspath(file)) if isinstance(file, str | os.PathLike) else "the checkpoint"
    damaged = f"checkpoint {name} is not whole: copy it again, or train the fold anew"
    remedy = "if you trust where it comes from, read it with --trust-checkpoint"
    try:
        yield
    except pickle.UnpicklingError as error:
        text = str(error)
        wanted = re.search(r"(?:GLOBAL|function <\S+ (?:function|class)) (\S+?)[>'\s]", text)
        if wanted:
            raise ModelFolderError(
                f"checkpoint {name} would call {wanted[1]} when it is read, and no checkpoint of nnU-Net needs that; it "
                f"was not called: {remedy}"
            ) from error
        if not _is_intact(file):
            raise ModelFolderError(damaged) from error
        why = re.split(r"\. Please |Check the documentation", text.rpartition("WeightsUnpickler error:")[2])[0].strip()
        raise ModelFolderError(
            f"checkpoint {name} holds more than tensors and plain values ({why}): {remedy}"
        ) from error
    except RuntimeError as error:
        if "PytorchStreamReader" in str(error):
            raise ModelFolderError(damaged) from error
        if "TorchScript" in str(error):
            raise ModelFolderError(
                f"checkpoint {name} is a TorchScript archive, which is a program and no checkpoint of nnU-Net: {remedy}"
            ) from error
        raise


def _is_intact(file: Any) -> bool:
    """Whether the contents of a zip archive are those that its checksums tell; True for anything but a path."""
    if not isinstance(file, str | os.PathLike):
        return True
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def check_architecture(model_folder: str | os.PathLike[str]) -> None:
    """Refuse plans.json that would have nnU-Net call something else than classes of layers.

    nnU-Net imports what the plans name as network, convolution, norm, dropout and nonlinearity, and calls it with arguments
    from the plans: ``subprocess.Popen``, if they say so.

    Args:
        model_folder: has a plans.json that is JSON.

    Raises:
        ModelFolderError: a name that is found and is no subclass of ``torch.nn.Module``.
    """
    path = Path(model_folder) / "plans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    for configuration in plans.get("configurations", {}).values():
        architecture = configuration.get("architecture", {})
        kwargs = architecture.get("arch_kwargs", {})
        named = {key: kwargs.get(key) for key in architecture.get("_kw_requires_import", ())}
        named["network_class_name"] = architecture.get("network_class_name")
        for key, name in named.items():
            found = pydoc.locate(name) if isinstance(name, str) else None
            if found is not None and not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
                raise ModelFolderError(
                    f"{str(path)!r} names {name} as {key}, which is no class of layers and would be called: if you trust "
                    "where the model comes from, read it with --trust-checkpoint"
                )
