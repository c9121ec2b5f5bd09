"""Population statistics of a network's norms from mini-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_norm.errors import StatisticsError
from nnunet_norm.layers import find_norms, plain_batch_statistics, tracks_statistics
from nnunet_norm.layers.moments import Moments, across_processes, num_processes
from nnunet_norm.receptive_field.trace import eval_mode, unwrapped
from nnunet_norm.stages.moments import ChannelMoments
from nnunet_norm.statistics.modes import norms_in_train_mode

Gathered = dict[str, ChannelMoments]
"""By the name of the norm, the moments of its inputs."""


def estimate_population_statistics(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    num_iters: int | None = None,
    exact: bool = False,
    synchronized: bool = False,
    progress: bool = True,
) -> None:
    """Set the running statistics of every norm to those of a population, in place.

    For a channel and mini-batches B with mean m_B and biased variance v_B::

        mean = E[m_B]        var = E[m_B^2 + v_B] - E[m_B]^2

    weighted by element counts, so that batches may have any sizes, and merged in float64 without the cancellation of that
    formula. While a batch runs, norms normalize with its own statistics (BatchRenorm without its correction); everything else
    is in eval mode and no gradient is kept. So the inputs of a deeper norm depend on how the population is cut into batches.

    With ``exact=True`` they do not: norms are settled one after another in the order of the forward pass, each with the norms
    before it normalizing by their final statistics. The result is that of the whole population in one batch, at the price of
    one pass over the population per norm, each only as far as that norm.

    Every norm that has running statistics takes part, once, however many names it has: BatchNorm, SyncBatchNorm, BatchRenorm,
    GhostBatchNorm, FrozenBatchNorm, tracked InstanceNorm. Give others some first: ``convert_norm(network, "batch_norm")``. A
    norm that the forward pass does not reach keeps its statistics. ``num_batches_tracked`` stays as it is.

    Under ``torch.distributed`` each process brings its own shard of the population, of any size; all processes must call, and
    all get the same statistics. Wrappers of DistributedDataParallel and ``torch.compile`` are taken off. Run inside
    ``torch.autocast``, if the network is to run so; statistics are taken in single precision at least.

    Args:
        network: Any module.
        batches: Inputs ``(N, C, *spatial)`` of the network, or mappings with one under ``"data"``, on any device. For
            ``exact=True`` something that can be iterated again and gives the same (a list, no generator).
        num_iters: Take at most so many of them; None for all.
        exact: Whether norms are settled one after another.
        synchronized: Whether norms that normalize with the batches of all processes in training do so here, too; all
            processes must then bring equally many batches. Of no meaning with ``exact=True``.
        progress: Show a progress bar.

    Raises:
        StatisticsError: The population is empty or leads to values that are not finite, a batch has one value per channel
            somewhere, or the network has no norm with running statistics; ``exact=True`` with batches that can be iterated
            only once, or with a norm that is used several times in a pass. The network is then as it was.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, section 3.2 and appendices A.2 (batches) and A.3 (exact).

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> batches = [torch.full((1, 1, 2, 2), 1.0), torch.full((3, 1, 2, 2), 5.0)]
        >>> estimate_population_statistics(norm, batches, progress=False)
        >>> norm.running_mean.item(), norm.running_var.item()
        (4.0, 3.0)
    """
    bare = unwrapped(network)
    norms = {name: norm for name, norm in find_norms(bare).items() if tracks_statistics(norm)}
    if not norms:
        raise StatisticsError(
            "the network has no norm with running statistics: give it some with convert_norm(network, 'batch_norm')"
        )
    population = _Population(batches, bare, num_iters)
    with eval_mode(bare), torch.no_grad():
        if exact:
            _settle_one_after_another(bare, norms, population, progress)
        else:
            write_statistics(norms, _in_one_pass(bare, norms, population, synchronized, progress))


def write_statistics(norms: Mapping[str, nn.Module], found: Mapping[str, Moments]) -> None:
    """Write running statistics into norms, in place; all or none.

    Raises:
        StatisticsError: An empty population, or statistics that are not finite.
    """
    found = {name: moments for name, moments in found.items() if int(moments.number)}
    if not found:
        raise StatisticsError("the population is empty: give at least one batch with at least one sample")
    for name, moments in found.items():
        for what, value, buffer in zip(("mean", "variance"), moments[1:], _running(norms[name]), strict=True):
            bad = int((~torch.isfinite(value.to(buffer.dtype))).sum())
            if bad:
                raise StatisticsError(
                    f"the {what} of {bad} channels before norm {name!r} is not finite: look for NaN, infinity and overflow "
                    "in the data and the weights; the running statistics stay as they were"
                )
    for name, moments in found.items():
        for value, buffer in zip(moments[1:], _running(norms[name]), strict=True):
            buffer.copy_(value)


def _running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    return norm.running_mean, norm.running_var


class _Population:
    """The batches as tensors on the network's device."""

    def __init__(self, batches: Iterable[Any], network: nn.Module, num_iters: int | None) -> None:
        self.batches, self.num_iters = batches, num_iters
        like = next((p for p in network.parameters() if p.is_floating_point()), None)
        self.like = next(network.buffers()) if like is None else like

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.batches):
            if number == self.num_iters:
                return
            data = batch.get("data") if isinstance(batch, Mapping) else batch
            if not isinstance(data, Tensor):
                raise StatisticsError(
                    f"batch {number} is {type(batch).__name__}: give tensors (N, C, *spatial), or mappings with one as 'data'"
                )
            if data.numel():
                yield data.to(self.like.device, self.like.dtype)
            if number + 1 == self.num_iters:  # do not draw a batch that is not used
                return

    def __len__(self) -> int:
        there = len(self.batches) if isinstance(self.batches, Sized) else None
        numbers = [number for number in (there, self.num_iters) if number is not None]
        return min(numbers) if numbers else 0

    def require_again(self) -> None:
        if iter(self.batches) is self.batches:
            raise StatisticsError(
                f"exact=True goes over the population once per norm, and batches is a {type(self.batches).__name__}, which "
                "can be iterated once: give a list, or an object whose __iter__ begins anew"
            )


def _in_one_pass(
    network: nn.Module, norms: Mapping[str, nn.Module], population: _Population, synchronized: bool, progress: bool
) -> dict[str, Moments]:
    gathered: Gathered = {name: ChannelMoments() for name in norms}
    with (
        norms_in_train_mode(network, across_processes=synchronized),
        plain_batch_statistics(network),
        _observed({name: (norm, gathered[name].add) for name, norm in norms.items()}),
    ):
        for data in tqdm(population, total=len(population) or None, desc="statistics", disable=not progress):
            _run(network, data)
    return {name: _of_all_processes(norms[name], moments) for name, moments in gathered.items()}


def _settle_one_after_another(
    network: nn.Module, norms: Mapping[str, nn.Module], population: _Population, progress: bool
) -> None:
    population.require_again()
    saved = [(buffer, buffer.clone()) for norm in norms.values() for buffer in norm.buffers()]
    order = _order(network, norms, population)
    if not order:
        raise StatisticsError("the population is empty: give at least one batch with at least one sample")
    try:
        with tqdm(total=len(order) * len(population) or None, desc="statistics", disable=not progress) as bar:
            for name in order:
                moments = ChannelMoments()

                def stop(values: Tensor, moments: ChannelMoments = moments) -> None:
                    moments.add(values)
                    raise _ReachedError

                with _observed({name: (norms[name], stop)}):
                    for data in population:
                        try:
                            _run(network, data)
                        except _ReachedError:
                            bar.update()
                write_statistics(norms, {name: _of_all_processes(norms[name], moments)})
    except BaseException:
        for buffer, value in saved:
            buffer.copy_(value)
        raise


class _ReachedError(Exception):
    """The norm to be settled was reached; the rest of the forward pass is not needed."""


def _order(network: nn.Module, norms: Mapping[str, nn.Module], population: _Population) -> list[str]:
    """The norms in the order in which a forward pass uses them; nothing if no process has any data."""
    calls: list[str] = []

    def note(name: str) -> Any:
        return lambda _: calls.append(name)

    with _observed({name: (norm, note(name)) for name, norm in norms.items()}):
        for data in population:
            _run(network, data[:1])
            break
    if num_processes() > 1:  # one without data takes the order of another
        every: list[list[str]] = [[] for _ in range(num_processes())]
        dist.all_gather_object(every, calls)
        calls = next((found for found in every if found), [])
    several = [name for name, count in Counter(calls).items() if count > 1]
    if several:
        raise StatisticsError(
            f"exact=True settles norms one after another, and {several[0]!r} is used {Counter(calls)[several[0]]} times in a "
            "pass: leave exact out"
        )
    return calls


def _run(network: nn.Module, data: Tensor) -> None:
    try:
        network(data)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error) and "more than 1 spatial element" not in str(error):
            raise
        raise StatisticsError(
            f"a norm gets one value per channel from a batch of shape {tuple(data.shape)}: give larger batches, or exact=True"
        ) from error


@contextmanager
def _observed(observers: Mapping[str, tuple[nn.Module, Any]]) -> Iterator[None]:
    """Inside, each norm shows its input before it is used."""
    with ExitStack() as stack:
        for norm, observe in observers.values():
            hook = norm.register_forward_pre_hook(lambda _, inputs, observe=observe: observe(inputs[0]))
            stack.callback(hook.remove)
        yield


def _of_all_processes(norm: Any, gathered: ChannelMoments) -> Moments:
    zeros = torch.zeros(norm.num_features, dtype=torch.float64)
    on = "cpu" if norm.running_mean.device.type == "mps" else norm.running_mean.device  # MPS has no float64
    moments = gathered.moments or Moments(zeros.new_zeros((), device=on), zeros.to(on), zeros.to(on))
    if num_processes() == 1:
        return moments
    return across_processes(moments.mean, moments.var, int(moments.number))
