"""A batch that goes through the network in parts, with the loss and the gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from nnunet_norm.layers.stepping import repeated, require_steps


class MicroBatches(nn.Module):
    """Stands in for a network in one training step, and runs it on micro-batches.

    With gradients, a forward first computes the logits of all micro-batches without them; then whoever calls it computes the
    loss of the whole batch, so that losses that look across the batch (batch Dice, TopK, ignored voxels) stay exact; and
    the backward pass, given dL/dlogits, runs each micro-batch again, with gradients, which add up in the parameters. What is
    in memory is the logits of the whole batch and the activations of one micro-batch, for one more forward pass. Dropout
    draws the same in both passes, and autocast is as it was in the first.

    For norms that do not look across samples the gradients are those of the whole batch, to rounding. Norms that do normalize
    a micro-batch at a time; run the step inside :func:`nnunet_norm.layers.one_step`, and their running statistics
    take in the whole batch, once. Under DistributedDataParallel gradients are shared once, with the last micro-batch.
    If norms normalize with the batches of all processes (``sync="full"``), all must have equally many micro-batches.

    A batch of at most ``size`` samples goes through the network as if it were not here.

    Args:
        network: From ``(N, C, *spatial)`` to one tensor of logits, or a list or tuple of them, each ``(N, K, *spatial)``;
            with any wrappers. Its parameters and mode are those of this module.
        size: Samples that go through the network at once; the last micro-batch may have fewer.

    Raises:
        LayerError: A norm takes in every forward (see :func:`nnunet_norm.layers.fit_for_steps`), or there is no step.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        assert size >= 1, size
        self.network, self.size = network, size

    def forward(self, data: Tensor) -> Any:
        """The logits of the whole batch, as the network returns them."""
        if len(data) <= self.size:
            return self.network(data)
        run = _Run(self.network, data.split(self.size))
        if not torch.is_grad_enabled():
            logits: Sequence[Tensor] = run.logits()
        else:
            assert not data.requires_grad, "no gradient flows to the data"
            require_steps(self.network)
            # Because of an input that needs a gradient, the logits have a graph; the parameters get theirs on the way.
            logits = _Accumulation.apply(data.new_empty(0, requires_grad=True), run)
        return logits[0] if run.kind is None else run.kind(logits)


class _Run:
    """One batch in parts: first its logits, afterwards the gradients of the parameters."""

    def __init__(self, network: nn.Module, parts: Sequence[Tensor]) -> None:
        self.network, self.parts = network, parts
        self.kind: type | None = None
        self._random: list[tuple[Tensor, tuple[Any, Any]]] = []
        self._precision = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted({parts[0].device.type, "cpu"})
        ]

    @torch.no_grad()
    def logits(self) -> list[Tensor]:
        """Of all parts, in one tensor per output of the network."""
        # Without gradients there is nothing to share, and processes may have different numbers of parts.
        network = self.network if self._distributed is None else self._distributed.module
        whole: list[Tensor] = []
        samples, start = sum(map(len, self.parts)), 0
        for part in self.parts:
            self._random.append((torch.get_rng_state(), get_device_states(part)))
            with self._as_it_was():
                returned = network(part)
            self.kind = type(returned) if isinstance(returned, list | tuple) else None
            outputs = _listed(returned)
            whole = whole or [output.new_empty((samples, *output.shape[1:])) for output in outputs]
            for all_samples, output in zip(whole, outputs, strict=True):
                all_samples[start : start + len(part)] = output
            start += len(part)
        return whole

    def accumulate(self, gradients: Sequence[Tensor | None]) -> None:
        """Run each part again and add to the gradients of the parameters what ``gradients`` of the logits make of it."""
        shares = [
            [None] * len(self.parts) if of_all is None else of_all.split(len(self.parts[0])) for of_all in gradients
        ]
        for number, part in enumerate(self.parts):
            last = number + 1 == len(self.parts)
            waits = nullcontext() if self._distributed is None or last else self._distributed.no_sync()
            with repeated(self.network), waits:
                with torch.enable_grad(), self._as_it_was(), self._with_randomness_of(number):
                    outputs = _listed(self.network(part))
                own = [share[number] for share in shares]
                if self._distributed is not None:
                    # It waits for a gradient of every parameter, also of those that an output without a loss has alone.
                    own = [
                        torch.zeros_like(y) if share is None else share for y, share in zip(outputs, own, strict=True)
                    ]
                pairs = [(y, share) for y, share in zip(outputs, own, strict=True) if share is not None]
                torch.autograd.backward([y for y, _ in pairs], [share for _, share in pairs])

    @property
    def _distributed(self) -> DistributedDataParallel | None:
        return self.network if isinstance(self.network, DistributedDataParallel) else None

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Inside, autocast is as it was when the batch came in."""
        with ExitStack() as stack:
            for device, dtype, enabled in self._precision:
                # Without its cache of weights, so that none that was cast without gradients is used where they are needed.
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def _with_randomness_of(self, number: int) -> Iterator[None]:
        """Inside, random numbers are those that the part got first; afterwards they go on from where they were."""
        of_cpu, (devices, states) = self._random[number]
        kind = self.parts[number].device.type
        with torch.random.fork_rng(devices=devices, device_type=kind):
            torch.set_rng_state(of_cpu)
            set_device_states(devices, states, device_type=kind)
            yield


class _Accumulation(torch.autograd.Function):
    """Logits of a run; their gradients go to the parameters by themselves, none to the inputs."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: _Run) -> tuple[Tensor, ...]:
        del anchor
        ctx.run = run
        ctx.set_materialize_grads(False)  # an output without a loss has no gradient
        return tuple(run.logits())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.run.accumulate(gradients)
        return None, None


def _listed(returned: Any) -> list[Tensor]:
    return [*returned] if isinstance(returned, list | tuple) else [returned]
