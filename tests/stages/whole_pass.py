"""One pass over the whole image, the reference; and the same network run block by block."""

from contextlib import nullcontext
from dataclasses import replace

import torch

from nnunet_norm.receptive_field.trace import first_output
from nnunet_norm.stages import Scratch, ScratchOnDisk, make_schedule, read_network, run, scratch_folder
from nnunet_norm.stages.regions import index
from nnunet_norm.tiling import padded_shape

CPU = torch.device("cpu")


def padded_image(graph, shape, seed=0, dtype=torch.float64):
    """Noise (1, C, *shape) with a mean, zero-padded at the far end to the total stride."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn((1, graph.nodes[0].channels, *shape), generator=generator, dtype=torch.float64) + 0.5
    widths = [width for n, s in zip(shape, padded_shape(shape, graph.stride), strict=True) for width in (s - n, 0)]
    return torch.nn.functional.pad(image, widths[::-1]).to(dtype)


def one_pass(network, image):
    """The network's own result."""
    with torch.inference_mode():
        return first_output(network(image.clone()))


def collected(shape):
    """(result, sink): NaN where nothing was written, and an error where something is written twice."""
    result = []

    def sink(_, region, values):
        if not result:
            result.append(torch.full((1, values.shape[1], *shape), torch.nan, dtype=values.dtype))
        assert result[0][index(region)].isnan().all()
        result[0][index(region)] = values

    return result, sink


def by_stages(schedule, image, *, scratch=None, progress=lambda: None):
    """The result of a schedule on an image that is padded already."""
    result, sink = collected(image.shape[2:])
    with torch.inference_mode():
        run(
            schedule,
            lambda region: image[index(region)].clone(),
            sink,
            scratch=scratch or Scratch(),
            device=CPU,
            progress=progress,
        )
    return result[0]


def difference(result, expected):
    """Largest difference, over the largest expected value where that is above 1."""
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(1))


def cut(schedule, edge):
    """The schedule with blocks whose edges are at most that long."""
    shapes = tuple(tuple(min(edge, n) for n in schedule.extents[piece.target]) for piece in schedule.pieces)
    return replace(schedule, block_shapes=shapes)


def difference_of(network, shape, *, edge=None, folder=None, graph=None, seed=0, **options):
    """Largest difference between stages and one pass over an image of that shape, padded to the total stride."""
    graph = graph or read_network(network)
    image = padded_image(graph, shape, seed)
    schedule = make_schedule(graph, image.shape[2:], itemsize=8, **options)
    schedule = schedule if edge is None else cut(schedule, edge)
    with scratch_folder(folder) if folder is not None else nullcontext() as place:
        result = by_stages(schedule, image, scratch=place and ScratchOnDisk(place))
    return difference(result, one_pass(network, image))
