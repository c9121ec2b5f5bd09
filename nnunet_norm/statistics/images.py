"""Population statistics of whole images: all norms in one pass over the population, stage by stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError, StatisticsError
from nnunet_norm.layers import convert_norm, find_norms, tracks_statistics
from nnunet_norm.layers.moments import Moments
from nnunet_norm.receptive_field.trace import eval_mode, trace, unwrapped
from nnunet_norm.stages import Schedule, Scratch, read_verified, run_population
from nnunet_norm.stages.run import Image
from nnunet_norm.statistics.estimate import write_statistics


class StagedEstimator:
    """Sets the running statistics of a network to those of a population of whole images, exactly and in one pass.

    All images go through the network in step: every stage over all of them, in blocks, before the next stage. So each norm
    sees the whole population before anything is normalized, and the result is that of ``estimate_population_statistics`` with
    ``exact=True`` and all images, whole, in one batch. It takes scratch for all images at a time.

    The network is a view of the one that is given: it shares its parameters, so that weights loaded later count.

    Args:
        network: Convolutional, with at least one norm that has running statistics.

    Raises:
        ArchitectureError: The network cannot be run stage by stage, or has norms that take the statistics of each image
            (InstanceNorm, GroupNorm) besides; why.
        StatisticsError: It has no norm with running statistics.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, appendix A.3 (exact population statistics).
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = unwrapped(network)
        if not self._norms:
            raise StatisticsError(
                "the network has no norm with running statistics: give it some with convert_norm(network, 'batch_norm')"
            )
        shared = {id(parameter): parameter for parameter in self.network.parameters()}
        # Without running statistics a norm takes those of what it gets: here, of the whole population.
        self.view = convert_norm(
            copy.deepcopy(self.network, shared), "batch_norm", only=tracks_statistics, track_running_stats=False
        ).eval()
        self.graph = read_verified(self.view, trace(self.view))
        modules = [operator.module for operator in self.graph.norms.values()]
        if len({id(module) for module in modules}) < len(modules):
            raise ArchitectureError("a norm is used several times in a pass, and has statistics for each")
        for name, norm in find_norms(self.view).items():
            if norm in modules and name not in self._norms:  # in step, it would take those of the population
                raise ArchitectureError(f"norm {name!r} ({type(norm).__name__}) takes the statistics of each image")

    @property
    def _norms(self) -> dict[str, nn.Module]:
        return {name: norm for name, norm in find_norms(self.network).items() if tracks_statistics(norm)}

    def estimate(
        self,
        images: Sequence[tuple[Schedule, Image]],
        *,
        scratch: Scratch,
        device: torch.device,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        """Settle the statistics, in place.

        Args:
            images: Each with its schedule, made for ``graph``; see ``nnunet_norm.stages.run``.
            scratch: Where the maps of all images lie.
            device: Where the network computes, and is.
            progress: Called after every block.

        Raises:
            StatisticsError: No images, or statistics that are not finite; the network is as it was.
            TilingError, OutputError: See ``nnunet_norm.stages.run``.
        """
        if not images:
            raise StatisticsError("the population is empty: give at least one image")
        with eval_mode(self.view), torch.inference_mode():
            run_population(images, scratch=scratch, device=device, progress=progress)
        found: dict[str, Moments] = {}
        operators = {operator.module: operator for operator in self.graph.norms.values()}
        for name, norm in find_norms(self.view).items():
            if norm in operators:  # one that the forward pass does not use keeps its statistics
                statistics = operators[norm].statistics
                assert statistics is not None
                found[name] = Moments(torch.ones(()), *(statistic.clone() for statistic in statistics))
        with torch.no_grad():
            write_statistics(self._norms, found)


def blocks_of(images: Sequence[tuple[Schedule, Callable[..., Tensor]]]) -> int:
    """How often ``progress`` is called by an estimation."""
    return sum(len(schedule.blocks_of(number)) for schedule, _ in images for number in range(schedule.settling_pieces))
