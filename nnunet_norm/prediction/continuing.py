"""What the result of a prediction depends on to the last bit, and the plan that was made before, made again from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from nnunet_norm import __version__
from nnunet_norm.prediction.choice import Task, staged
from nnunet_norm.prediction.halo import Decision
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.prediction.tiles_plan import TilesPlan
from nnunet_norm.prediction.ways import Way, Wishes, itemsize_of
from nnunet_norm.stages import Graph, make_schedule
from nnunet_norm.tiling import padded_shape


def pins_of(plan: StagesPlan | TilesPlan) -> dict[str, Any]:
    """What ``pinned_plan`` makes the same plan from, with the number of threads: it decides the order of sums."""
    threads = {"threads": torch.get_num_threads()}
    if isinstance(plan, TilesPlan):
        decision = {**asdict(plan.decision)}
        return threads | {"plan": "tiles", "decision": decision, "shape": plan.shape, "reason": plan.reason}
    return threads | {
        "plan": "stages",
        "population": plan.population,
        "place": plan.place,
        "first_level": plan.first_level,
        "block_bytes": plan.block_bytes,
        "memory_bytes": plan.memory_bytes,
    }


def pinned_plan(pins: Mapping[str, Any], task: Task, graph: Graph | str, wishes: Wishes) -> StagesPlan | TilesPlan:
    """The plan of a prediction that is continued.

    Args:
        pins: from ``pins_of``, by way of JSON.
        task: the image.
        graph: the network.
        wishes: what the user asked for; it was checked to be the same.
    """
    if pins["plan"] == "tiles":
        values = {name: _tuples(value) for name, value in pins["decision"].items()}
        return TilesPlan(Decision(**values), tuple(pins["shape"]), pins["reason"], task.device)
    assert isinstance(graph, Graph), graph
    padded = padded_shape(task.image_shape, graph.stride)
    schedule = make_schedule(
        graph,
        padded,
        itemsize=itemsize_of(task.device, task.dtype),
        store_first_level=pins["first_level"] == "stored",
        block_bytes=pins["block_bytes"],
        in_place=False,
    )
    way = Way(
        {padded: schedule},
        pins["place"],
        schedule.scratch_bytes,
        pins["memory_bytes"],
        pins["first_level"],
        pins["block_bytes"],
    )
    return staged(pins["population"], task, way, padded, wishes.scratch)


def identity_of_model(list_of_parameters: Sequence[Mapping[str, Any]]) -> str:
    """A digest of the weights of all folds."""
    digest = sha256()
    for weights in list_of_parameters:
        for name, value in weights.items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity_of_software() -> dict[str, str]:
    """The versions that compute; another one may round otherwise."""
    return {"nnunet_norm": __version__, "torch": torch.__version__}


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with that many threads inside; None: as many as now."""
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
