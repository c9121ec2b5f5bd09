"""Reading, computing and writing at the same time: the next block is fetched and the last one written meanwhile.

On CUDA both go through pinned memory, each on a stream of its own. On a CPU threads do it where maps lie on a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

Reading = Callable[[], dict[int, Tensor]]
Fetched = tuple[dict[int, Tensor], torch.cuda.Event | None]

WRITES_UNDER_WAY = 2
"""Blocks that wait to be written, at most: each holds its memory."""


class Transfer:
    """Brings blocks to the device and back; without ``overlap`` each when it is asked for."""

    def __init__(self, device: torch.device, *, overlap: bool) -> None:
        self.device = device
        self._reader = ThreadPoolExecutor(1) if overlap else None
        self._writer = ThreadPoolExecutor(1) if overlap else None
        self._ahead: dict[Hashable, Future[Fetched]] = {}
        self._writes: list[Future[None]] = []
        on_cuda = overlap and device.type == "cuda"
        self._inwards, self._outwards = (torch.cuda.Stream(device) if on_cuda else None for _ in range(2))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._reader, self._writer):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        # An error of a thread holds what it was at, and that holds the error: a circle, and with it memory and files.
        self._ahead.clear()
        self._writes.clear()

    @property
    def overlaps(self) -> bool:
        """Whether fetching ahead is of any use."""
        return self._reader is not None

    def fetch(self, key: Hashable, reading: Reading) -> None:
        """Begin to read what will be asked for under that key."""
        if self._reader is not None:
            self._ahead[key] = self._reader.submit(self._load, reading)

    def read(self, key: Hashable, reading: Reading) -> dict[int, Tensor]:
        """What ``reading`` gives, on the device; fetched before, or now."""
        ahead = self._ahead.pop(key, None)
        values, event = ahead.result() if ahead is not None else self._load(reading)
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for value in values.values():
                value.record_stream(stream)
        return values

    def forget(self) -> None:
        """Drop what was fetched and is not wanted any more."""
        for future in self._ahead.values():
            future.exception()
        self._ahead.clear()

    def write(self, put: Callable[[Any, Tensor], None], where: Any, values: Tensor, *, on_device: bool = False) -> None:
        """Call ``put(where, values)`` now or soon; errors come with a later call.

        Args:
            put: takes the values, on the CPU unless ``on_device``.
            where: handed on.
            values: on the device.
            on_device: they stay there, and go at once.
        """
        if self._writer is None or on_device:
            put(where, values)
            return
        while len(self._writes) >= WRITES_UNDER_WAY:
            self._writes.pop(0).result()
        if self._outwards is None or values.device.type != "cuda":
            self._writes.append(self._writer.submit(_put, put, where, values, None))
            return
        self._outwards.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self._outwards):
            host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            values.record_stream(self._outwards)
            done = self._outwards.record_event()
        self._writes.append(self._writer.submit(_put, put, where, host, done))

    def flush(self) -> None:
        """Wait until everything is written."""
        while self._writes:
            self._writes.pop(0).result()

    def _load(self, reading: Reading) -> Fetched:
        with torch.inference_mode():  # which is a thread's own
            values = reading()
            if self._inwards is None:
                return {key: value.to(self.device) for key, value in values.items()}, None
            with torch.cuda.stream(self._inwards):
                moved = {
                    key: (value.pin_memory() if value.device.type == "cpu" else value).to(
                        self.device, non_blocking=True
                    )
                    for key, value in values.items()
                }
                return moved, self._inwards.record_event()


def _put(put: Callable[[Any, Tensor], None], where: Any, values: Tensor, ready: torch.cuda.Event | None) -> None:
    if ready is not None:
        ready.synchronize()
    with torch.inference_mode():
        put(where, values)
