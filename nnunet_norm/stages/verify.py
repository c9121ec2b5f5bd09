"""Whether a graph is the network: its reach is compared with the traced one, and its result with the network's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.receptive_field.trace import eval_mode, first_output, unwrapped
from nnunet_norm.stages.graph import Graph, read_network
from nnunet_norm.stages.pieces import reach
from nnunet_norm.stages.regions import Region, index
from nnunet_norm.stages.run import run
from nnunet_norm.stages.schedule import make_schedule
from nnunet_norm.stages.scratch import Scratch

TOLERANCE = 0.01
"""Of the largest output. Rounding stays far below it, and a graph that is wired otherwise far above."""

BLOCK_BYTES = 2**21
"""Makes a few blocks of the small image, so that halos are seen."""


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
    graph = read_network(network)
    norms = len({id(norm.module) for norm in graph.norms.values()})
    declared = (graph.stride, reach(graph, aligned=True), reach(graph, aligned=False), norms)
    traced = (field.stride, field.aligned, field.any_voxel, len(field.tile_statistics))
    if declared != traced:
        raise ArchitectureError(f"its stages have stride, reach and norms {declared}, and it has {traced}")
    difference = _difference(unwrapped(network), graph)
    if not difference <= TOLERANCE:
        raise ArchitectureError(f"run stage by stage it gives another result (difference {difference:.2g})")
    return graph


def _difference(network: nn.Module, graph: Graph) -> float:
    """Largest difference of the two results for noise, over the largest output."""
    weight = next(p for p in network.parameters() if p.is_floating_point())
    shape = (*graph.stride[:-1], 2 * graph.stride[-1])  # InstanceNorm wants two voxels at the bottom
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, graph.nodes[0].channels, *shape), generator=generator).to(weight.device, weight.dtype)
    schedule = make_schedule(graph, shape, itemsize=weight.dtype.itemsize, block_bytes=BLOCK_BYTES)
    result: list[Tensor] = []

    def sink(region: Region, values: Tensor) -> None:
        if not result:
            result.append(values.new_empty((1, values.shape[1], *shape), device="cpu"))
        result[0][index(region)] = values.cpu()

    with eval_mode(network), torch.inference_mode():
        expected = first_output(network(image.clone())).cpu()
        try:
            run(
                schedule, lambda region: image[index(region)].clone(), sink,
                scratch=Scratch(weight.device), device=weight.device,
            )  # fmt: skip
        except RuntimeError as error:  # torch's word for maps that do not fit together
            raise ArchitectureError(f"it cannot be run stage by stage ({str(error).splitlines()[0]})") from error
        if not torch.isfinite(expected).all():
            return 0.0  # weights that are not finite: the prediction will say so
        return float((result[0] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
