"""Whether a graph is the network: its reach is compared with the traced one, and its result with the network's own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.receptive_field.trace import eval_mode, first_output, unwrapped
from nnunet_norm.stages.graph import Graph, read_network
from nnunet_norm.stages.pieces import reach
from nnunet_norm.stages.regions import Region, index
from nnunet_norm.stages.run import run
from nnunet_norm.stages.schedule import Schedule, make_schedule
from nnunet_norm.stages.scratch import Scratch

TOLERANCE = 1e-3
"""Of the largest output. Rounding stays far below it, and a graph that is wired otherwise far above."""


def read_verified(network: nn.Module, field: ReceptiveField) -> Graph:
    """The graph of a network, checked against the module itself.

    Strides, reach and norms are compared with what was traced, and a small image is run in both ways.

    Args:
        network: see ``read_network``.
        field: its traced receptive field.

    Raises:
        ArchitectureError: see ``read_network``; or the graph is not the network.
    """
    if field.unbounded is not None:
        raise ArchitectureError(f"{field.unbounded} sees the whole image")
    if field.normalizes_tiles:
        raise ArchitectureError("it normalizes every tile by its own quantiles (input_normalization tile_quantile)")
    graph = read_network(network)
    norms = len({id(norm.module) for norm in graph.norms.values()})
    declared = (graph.stride, reach(graph, aligned=True), reach(graph, aligned=False), norms)
    traced = (field.stride, field.aligned, field.any_voxel, len(field.tile_statistics))
    if declared != traced:
        raise ArchitectureError(f"its stages have stride, reach and norms {declared}, and it has {traced}")
    difference = _difference(unwrapped(network), graph)
    if (
        difference > TOLERANCE
    ):  # and not NaN: weights that are not finite can be compared in no way, and show in every image
        raise ArchitectureError(f"run stage by stage it gives another result (difference {difference:.2g})")
    return graph


def _difference(network: nn.Module, graph: Graph) -> float:
    """Largest difference of the two results for noise, over the largest output."""
    weight = next(p for p in network.parameters() if p.is_floating_point())
    shape = (*graph.stride[:-2], *(2 * s for s in graph.stride[-2:]))  # InstanceNorm amplifies rounding over few voxels
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, graph.nodes[0].channels, *shape), generator=generator).to(weight.device, weight.dtype)
    schedule = make_schedule(graph, shape, itemsize=weight.dtype.itemsize)
    schedule = replace(schedule, block_shapes=_halved(schedule))
    result: list[Tensor] = []

    def sink(_: Region, region: Region, values: Tensor) -> None:
        if not result:
            result.append(values.new_empty((1, values.shape[1], *shape), device="cpu"))
        result[0][index(region)] = values.cpu()

    with eval_mode(network), torch.inference_mode(), _exact_convolutions():
        try:
            expected = first_output(network(image.clone())).cpu()
            run(
                schedule, lambda region: image[index(region)].clone(), sink,
                scratch=Scratch(weight.device), device=weight.device,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:  # torch's words for maps that do not fit together
            raise ArchitectureError(f"it cannot be run stage by stage ({str(error).splitlines()[0]})") from error
    return float((result[0] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _halved(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Blocks of half a map on every axis, so that halos are seen."""
    return tuple(tuple(-(-n // 2) for n in schedule.extents[piece.target]) for piece in schedule.pieces)


def _exact_convolutions() -> AbstractContextManager[Any]:
    """No TF32, and the same algorithm for both results."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
