"""Populations of cases whose images' statistics normalize: which there are, and networks with places for their statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_norm.errors import ExperimentalBatchesError, StatisticsError
from nnunet_norm.experimental_batches import ExperimentalBatches
from nnunet_norm.layers import convert_norm, find_norms, tracks_statistics

Files = tuple[str, ...]
"""The files of a case, one per channel."""

Statistics = dict[str, Tensor]
"""Running means and variances by their keys in a state dict, every name of a norm among them."""


@dataclass(frozen=True)
class Population:
    """Cases that are normalized with the same statistics.

    Attributes:
        name: of the experimental batch, or of the only case; None: the folder.
        kind: "folder", "experimental batch" or "case".
        cases: name and files of every case that is normalized with the statistics.
        images: name and files of the cases on whose images they are estimated.
        controls: whether these are the controls alone.
    """

    name: str | None
    kind: str
    cases: Mapping[str, Files]
    images: Mapping[str, Files]
    controls: bool = False

    def __str__(self) -> str:
        what = "control" if self.controls else "image"
        name = "" if self.name is None else f" {self.name!r}"
        return f"{self.kind}{name}, {len(self.images)} {what}{'s' * (len(self.images) != 1)}"


def the_folder(cases: Mapping[str, Files]) -> list[Population]:
    """All cases as one population.

    Args:
        cases: name and files of every case.
    """
    return [Population(None, "folder", cases, cases)]


def each_case(cases: Mapping[str, Files]) -> list[Population]:
    """Every case as a population of its own."""
    return [Population(name, "case", {name: files}, {name: files}) for name, files in cases.items()]


def each_batch(cases: Mapping[str, Files], batches: ExperimentalBatches, *, controls: bool = False) -> list[Population]:
    """Every experimental batch that has a case among ``cases`` as a population of its own.

    Args:
        cases: name and files of every case.
        batches: which case belongs to which.
        controls: estimate on the controls of an experimental batch alone.

    Raises:
        ExperimentalBatchesError: cases that have no experimental batch, or, with ``controls``, an experimental batch that has
            none among ``cases``.
    """
    found = []
    for name, members in batches.grouped(cases).items():
        images = [case for case in members if not controls or case in batches.controls]
        if not images:
            raise ExperimentalBatchesError(
                f"{batches.source}: experimental batch {name!r} has no control among its {len(members)} images here: name "
                'one under "controls", or leave --controls out'
            )
        mine, estimated_on = ({case: cases[case] for case in names} for names in (members, images))
        found.append(Population(name, "experimental batch", mine, estimated_on, controls))
    return found


def network_for(network: nn.Module, population: str | None, *, in_place: bool) -> nn.Module:
    """A network whose norms take the statistics that a population means; it shares the parameters.

    For "image" and "tile" norms with stored statistics lose them, and take those of what they get; for "batch" InstanceNorm
    gets places for some. For anything else, and where that changes nothing, it is the network itself.

    Args:
        network: without wrappers.
        population: see ``HaloPredictor``.
        in_place: change the network, and do not copy what is not shared.
    """
    only = {"image": tracks_statistics, "tile": tracks_statistics, "batch": _is_plain_instance_norm}.get(
        population or ""
    )
    if only is None or not any(only(norm) for norm in find_norms(network).values()):
        return network
    if not in_place:
        network = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    return convert_norm(network, "batch_norm", only=only, track_running_stats=population == "batch")


def weights_for(network: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights with the keys that the network has after ``network_for``: statistics are left out, or are initial ones."""
    return {key: weights.get(key, initial) for key, initial in network.state_dict().items()}


def require_places(network: nn.Module) -> None:
    """Refuse a network of which a norm has no place for stored statistics, or that has no norm.

    Raises:
        StatisticsError: as said.
    """
    norms = find_norms(network)
    if not norms:
        raise StatisticsError("this network has no norm, so a population makes no difference: leave --population out")
    for name, norm in norms.items():
        if not tracks_statistics(norm):
            raise StatisticsError(
                f"{name} ({type(norm).__name__}) cannot have stored statistics, so not those of a population: nnunet-norm "
                "predict --population image takes those of every image"
            )


def statistics_of(network: nn.Module) -> Statistics:
    """Copies of all running means and variances, on the CPU."""
    keys = {
        f"{name}.{buffer}"
        for name, module in network.named_modules(remove_duplicate=False)
        if tracks_statistics(module)
        for buffer in ("running_mean", "running_var")
    }
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items() if key in keys}


def by_name(cases: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, Files]:
    """Cases by their names.

    Raises:
        StatisticsError: two of them have the same name.
    """
    found = {name: tuple(files) for name, files in zip(names, cases, strict=True)}
    if len(found) < len(cases):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise StatisticsError(f"case {twice!r} is there more than once: a population has every image once")
    return found


def _is_plain_instance_norm(norm: nn.Module) -> bool:
    return isinstance(norm, _InstanceNorm) and not tracks_statistics(norm)
