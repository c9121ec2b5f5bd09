"""Theoretical and effective receptive field of any module on one page, with their words for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.receptive_field import EffectiveField, ReceptiveField, measure_effective, trace_at

AXES = ("x", "y", "z")
"""Spatial axes in the order of the tensor's."""


@dataclass(frozen=True)
class Fields:
    """How far a network sees.

    Attributes:
        network: class of the module.
        theoretical: None if it cannot be traced.
        why_no_theoretical: in one line.
        effective: None if it cannot be measured.
        why_no_effective: in one line.
        tile_norms: classes of the norms that normalize with the statistics of the tile, with their numbers.
        extent: of the tiles on which the effective field was measured.
    """

    network: str
    theoretical: ReceptiveField | None
    why_no_theoretical: str
    effective: EffectiveField | None
    why_no_effective: str
    tile_norms: dict[str, int]
    extent: tuple[int, ...]

    @property
    def unbounded(self) -> str | None:
        """The layer that sees everything, if there is one."""
        return self.theoretical.unbounded if self.theoretical is not None else None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; reaches are (before, after) per axis, in voxels."""
        field, effective = self.theoretical, self.effective
        return {
            "network": self.network,
            "axes": AXES[: len(self.extent)],
            "total_stride": field.stride if field else None,
            "theoretical": None
            if field is None
            else {
                "aligned": field.aligned,
                "any_voxel": field.any_voxel,
                "unbounded": field.unbounded,
            },
            "why_no_theoretical": self.why_no_theoretical or None,
            "effective": effective.halo if effective else None,
            "effective_gradients": effective.num_gradients if effective else None,
            "effective_measured_within": self.extent,
            "why_no_effective": self.why_no_effective or None,
            "tile_statistics": {
                "norms": self.tile_norms,
                "layers": field.tile_statistics if field else [],
            },
        }


def receptive_fields(network: nn.Module, inputs: Tensor) -> Fields:
    """Both receptive fields of a network, or why there is none.

    Args:
        network: any module from (N, C, *spatial) to (N, classes, *spatial); nnU-Net's, MONAI's, your own.
        inputs: real tiles (N, C, *spatial), preprocessed, of an extent that the network can take.
    """
    extent = tuple(inputs.shape[2:])
    field: ReceptiveField | None = None
    effective: EffectiveField | None = None
    why_no_theoretical = why_no_effective = ""
    try:
        field = trace_at(network, extent, inputs.shape[1])
    except ArchitectureError as error:
        why_no_theoretical = str(error)
    try:
        stride = field.stride if field is not None else (1,) * len(extent)
        effective = measure_effective(network, inputs, stride=stride)
    except ArchitectureError as error:
        why_no_effective = str(error)
    except torch.OutOfMemoryError:
        why_no_effective = f"the device's memory does not hold the gradient of a tile of {extent}"
    norms = _classes(network, field.tile_statistics) if field is not None else {}
    return Fields(type(network).__name__, field, why_no_theoretical, effective, why_no_effective, norms, extent)


def describe_fields(described: dict[str, Any]) -> list[str]:
    """Lines for a terminal, from ``Fields.as_dict``."""
    axes = described["axes"]
    lines = [f"network: {described['network']}"]
    theoretical = described["theoretical"]
    if theoretical is None:
        lines.append(f"theoretical receptive field: not known: {described['why_no_theoretical']}")
    else:
        lines.append(f"total stride: {_per_axis(axes, described['total_stride'])}")
        if theoretical["unbounded"]:
            lines.append(f"theoretical receptive field: unbounded, because of {theoretical['unbounded']}")
        else:
            lines.append(
                f"theoretical receptive field, of cores on the stride's grid: {reach(axes, theoretical['aligned'])}"
            )
            lines.append(f"theoretical receptive field, of any voxel: {reach(axes, theoretical['any_voxel'])}")
    if described["effective"] is None:
        lines.append(f"effective receptive field: not measured: {described['why_no_effective']}")
    else:
        lines.append(
            f"effective receptive field (3 sigma): {reach(axes, described['effective'])}; from "
            f"{described['effective_gradients']} gradients in tiles of "
            f"{' x '.join(map(str, described['effective_measured_within']))}"
        )
    lines.append(f"normalizes with statistics of the tile: {tile_norms(described)}")
    return lines


def tile_norms(described: dict[str, Any]) -> str:
    """What normalizes with the statistics of the tile, from ``Fields.as_dict``."""
    statistics = described["tile_statistics"]
    if described["theoretical"] is None:
        return "not known"
    if not statistics["layers"]:
        return "nothing"
    norms = ", ".join(f"{count} x {name}" for name, count in statistics["norms"].items())
    return f"{norms} (the first: {statistics['layers'][0]})"


def reach(axes: Sequence[str], sides: Sequence[Sequence[int]]) -> str:
    """Reaches per axis for the user: ``x 20/17, y 20/17 voxels before/after``."""
    per_axis = ", ".join(f"{axis} {before}/{after}" for axis, (before, after) in zip(axes, sides, strict=True))
    return f"{per_axis} voxels before/after"


def _per_axis(axes: Sequence[str], numbers: Sequence[int]) -> str:
    return ", ".join(f"{axis} {number}" for axis, number in zip(axes, numbers, strict=True))


def _classes(network: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    modules = dict(network.named_modules())
    for layer in layers:
        kind = type(modules[layer]).__name__ if layer in modules else "operator of the network"
        found[kind] = found.get(kind, 0) + 1
    return found
