"""How much memory lives at a time while torch works, known without a device: see :class:`Living`."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Living(TorchDispatchMode):
    """Follows the storages of all tensors that operators make inside it, from their making to their end.

    A backward pass inside is followed too, with what autograd saves for it. On the device ``meta``, where nothing is
    computed, this counts what a pass would take. What a kernel takes for its work makes no tensor: see :meth:`at_work`.

    Attributes:
        now: bytes that live now, of tensors made inside.
        peak: the most bytes that lived at a time.
        largest: the most elements of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What comes from outside is no tensor made inside, nor is a view of it.
        for tensor in tree_iter((args, kwargs)):
            self._follow(tensor, counts=False)
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            self._follow(tensor, counts=True)
        self.peak = max(self.peak, self.now + self.at_work(func, args, output))
        return output

    def at_work(self, func: Any, args: tuple[Any, ...], output: Any) -> int:
        """Bytes that an operator takes while it works, on top of what it makes; none is known here."""
        del func, args, output
        return 0

    def _follow(self, tensor: object, *, counts: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes() if counts else 0
            self.now += self._bytes[key]
            self.largest = max(self.largest, tensor.nelement() if counts else 0)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._bytes.pop(key)
