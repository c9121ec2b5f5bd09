"""The operators of a convolutional network, run on any box of their output: what each needs of its input, and how.

An operator is given the part of its input that a box of its output depends on, as far as it lies within the map, and
returns exactly that box. Beyond the ends of the map it pads as the module would, so that a box at a border comes out as
in the whole map, and a box in the middle without any padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.stages.regions import Interval, Region


class Place(NamedTuple):
    """Where a call of an operator lies in its maps.

    Attributes:
        given: per input the region of the map that the tensor holds.
        wanted: the region of the output.
        extents: per input the extents of the whole map.
    """

    given: Sequence[Region]
    wanted: Region
    extents: Sequence[tuple[int, ...]]


class Operator(ABC):
    """One operator with its module or function; subclasses override what differs from a voxel-wise one."""

    @abstractmethod
    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """The wanted region (N, C, *region) of the output.

        Args:
            inputs: (N, C, *region) per input: the regions that ``needs`` names, within the map. An operator that works in
                place changes them, as in the network itself.
            place: where they lie.
        """

    def channels(self, inputs: Sequence[int]) -> int:
        """Channels of the output.

        Raises:
            ArchitectureError: inputs that do not suit; then the graph is not the network.
        """
        return inputs[0]

    def ratio(self, axis: int) -> Fraction:
        """Input voxels per output voxel."""
        del axis
        return Fraction(1)

    def length(self, axis: int, n: int) -> int:
        """Extent of the output for an input of extent ``n``."""
        del axis
        return n

    def needs(self, axis: int, interval: Interval) -> Interval:
        """Input voxels that the output voxels of the interval depend on; may reach beyond the map."""
        del axis
        return interval

    def work(self, inputs: Sequence[int]) -> int:
        """Multiplications per output voxel, for the prediction of cost."""
        return sum(inputs)


class Pointwise(Operator):
    """A function of each voxel: nonlinearity, norm with fixed statistics, addition of two maps."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def channels(self, inputs: Sequence[int]) -> int:
        """See ``Operator.channels``."""
        if len({*inputs}) != 1:
            raise ArchitectureError(f"it adds maps of {' and '.join(map(str, inputs))} channels")
        return inputs[0]

    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """See ``Operator.apply``."""
        del place
        return self.function(*inputs)


class Concatenation(Operator):
    """Maps side by side, as channels."""

    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """See ``Operator.apply``."""
        del place
        return torch.cat(list(inputs), 1)

    def channels(self, inputs: Sequence[int]) -> int:
        """See ``Operator.channels``."""
        return sum(inputs)


class ImageNorm(Operator):
    """A norm that uses the statistics of the whole map; they are gathered before, and set by ``statistics``.

    InstanceNorm, GroupNorm, and BatchNorm without running statistics (the batch being one image).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.groups = module.num_groups if isinstance(module, nn.GroupNorm) else None
        self.statistics: tuple[Tensor, Tensor] | None = None

    def settle(self, mean: Tensor, var: Tensor) -> None:
        """Take the mean and biased variance per channel, in float64; for GroupNorm they are merged over its groups."""
        if self.groups is not None:
            grouped_mean, grouped_var = mean.view(self.groups, -1), var.view(self.groups, -1)
            of_group = grouped_mean.mean(1, keepdim=True)
            spread = grouped_var.mean(1, keepdim=True) + (grouped_mean - of_group).square().mean(1, keepdim=True)
            mean, var = of_group.expand_as(grouped_mean).flatten(), spread.expand_as(grouped_var).flatten()
        # One group leaves them expanded, and torch's kernel for such statistics rounds otherwise than the one for memory.
        self.statistics = mean.contiguous(), var.contiguous()

    def apply(self, inputs: Sequence[Tensor], place: Place) -> Tensor:
        """See ``Operator.apply``."""
        del place
        assert self.statistics is not None
        (x,) = inputs
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, var = (s.to(dtype).to(x.device) for s in self.statistics)
        weight, bias = (None if p is None else p.to(dtype) for p in (self.module.weight, self.module.bias))
        return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, self.module.eps)
