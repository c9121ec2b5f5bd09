"""Seconds and bytes of a forward and a backward pass, for ``layers.py``."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler says nothing

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

SHORTEST = 0.02
"""Seconds that one measurement takes at least: what is shorter is run several times."""

WARM_UP = 2

MEASURED_AS = {
    "cpu": "every allocation and release of torch's allocator as the profiler records them, those inside kernels included",
    "cuda": "torch.cuda.max_memory_allocated and memory_allocated",
}


def half(device: str) -> torch.dtype:
    """What autocast computes in."""
    return torch.float16 if device == "cuda" else torch.bfloat16


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """The context of a forward pass."""
    return torch.autocast(device, half(device)) if precision == "autocast" else nullcontext()


def synchronize(device: str) -> None:
    """Wait for all that was started."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Pass:
    """A forward and a backward pass of a module on an input that stays the same.

    Attributes:
        run: The module, or what compiling it gave.
        module: The module, for its parameters.
        x: Its input.
        grad: Gradient of the output; taken over into its dtype before anything is measured.
        device: "cpu" or "cuda".
        precision: "fp32" or "autocast".
    """

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    x: Tensor
    grad: Tensor
    device: str
    precision: str
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.module.parameters())
        for number in range(WARM_UP):
            y = self.forward()
            if number == 0:
                self.grad = self.grad.to(y.dtype)
            self.backward(y)

    def forward(self) -> Tensor:
        """The output."""
        with autocast(self.device, self.precision):
            return self.run(self.x)

    def backward(self, y: Tensor) -> None:
        """Gradients of input and parameters; what they are is not kept."""
        torch.autograd.grad(y, [self.x, *self.parameters], self.grad)

    def both(self) -> None:
        """What is timed."""
        self.backward(self.forward())

    def memory(self) -> dict[str, int]:
        """Bytes above what was there before.

        ``held``: after the forward pass, output and what is kept for the backward pass; ``peak``: at any time.
        """
        return {"held": held_bytes(self.forward, self.device), "peak": peak_bytes(self.both, self.device)}


def seconds(action: Callable[[], Any], repeats: int, device: str) -> float:
    """Of one of ``repeats`` runs in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def repeats_of(action: Callable[[], Any], device: str) -> int:
    """How many runs in a row take long enough to be measured."""
    return max(1, round(SHORTEST / seconds(action, 1, device)))


def held_bytes(action: Callable[[], Any], device: str) -> int:
    """What is allocated once ``action`` has returned and what it returned is kept, above what was before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        kept = action()
        found = torch.cuda.memory_allocated() - before
    else:
        kept, totals = _running_totals(action)
        found = totals[-1]
    del kept
    return found


def peak_bytes(action: Callable[[], Any], device: str) -> int:
    """The most that is allocated while ``action`` runs, above what was before."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    return max(_running_totals(action)[1])


def _running_totals(action: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What ``action`` returns, and the bytes allocated since its start after every allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = action()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        totals.append(totals[-1] + event.nbytes())
    return kept, totals
