"""How a prediction is carried out, behind a narrow interface.

The predictor knows networks, devices and mirroring; an execution plan knows which part of the image goes through the
network when, and what of the output is kept. Neither knows the other's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_norm.prediction.journal import RunJournal
from nnunet_norm.stages.regions import block_shape, blocks, clip, slices
from nnunet_norm.stages.scratch import Scratch
from nnunet_norm.tiling import Box

Forward = Callable[[Tensor], Tensor]
"""(1, C, *spatial) -> logits (1, K, *spatial), mirrored passes averaged; spatial extents are multiples of the stride."""

STREAMED_BYTES = 16 * 2**20
"""Logits that are handed on at a time where they were added up before."""

Place = tuple[int | slice, ...]
"""Indices and slices of an image, one per axis."""


def box_of(place: Place) -> Box:
    """A place as a box with all axes of the image."""
    return tuple(slice(p, p + 1) if isinstance(p, int) else p for p in place)


class Image(Protocol):
    """An image (C, *spatial) that is read where it is needed: a tensor, or a volume on a disk."""

    @property
    def shape(self) -> Sequence[int]:
        """Extents, channels first."""

    @property
    def ndim(self) -> int:
        """Number of axes, that of channels included."""

    def __getitem__(self, index: Any, /) -> Tensor:
        """A part of it, by slices and indices."""


@dataclass(frozen=True)
class Folds:
    """The network with the weights of one fold of the model after another; by default with those that it has.

    Attributes:
        forward: the network, with the weights that it has now.
        count: how many folds are averaged.
        use: gives the network the weights of a fold, by its number.
    """

    forward: Forward
    count: int = 1
    use: Callable[[int], None] = lambda number: None

    def mean(self, batch: Tensor) -> Tensor:
        """Logits of a batch, averaged over the folds."""
        total: Tensor | None = None
        for number in range(self.count):
            self.use(number)
            logits = self.forward(batch)
            total = logits if total is None else total + logits
        assert total is not None
        return total / self.count if self.count > 1 else total


class Sink(Protocol):
    """Takes the logits of an image, box by box."""

    @property
    def overlap(self) -> Sequence[int]:
        """Per axis of the image, how many voxels after a box must come with it (fewer at the far end of the image)."""

    @property
    def adds_up(self) -> bool:
        """Whether it takes the logits of mirrored passes and folds one by one, and adds them up."""

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """Take logits.

        Args:
            place: where they lie.
            logits: (K, *box), on any device.
            weight: of this pass among those that are averaged; 1 unless the sink adds up.
            core: the box itself; ``place`` is larger by the overlap. None: they are the same.
        """


class Result:
    """Logits (K, *extents) of an image or of a part of it, added up over mirrored passes and folds."""

    adds_up = True

    def __init__(
        self,
        extents: Sequence[int],
        allocate: Callable[[Sequence[int], torch.dtype], Tensor] = lambda shape, dtype: torch.zeros(
            *shape, dtype=dtype
        ),
    ) -> None:
        """Begin with nothing.

        Args:
            extents: of the image.
            allocate: gives zeroed memory, where the result shall lie.
        """
        self.extents = tuple(extents)
        self.overlap = (0,) * len(self.extents)
        self.dtype: torch.dtype | None = None
        self._allocate = allocate
        self._sum: Tensor | None = None

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Sink.add``; logits are kept in single precision or better, and ``dtype`` tells that of the first."""
        assert core is None or core == place
        total = self._memory(logits)
        logits = logits.to(total.device, total.dtype)
        total[(slice(None), *place)] += logits if weight == 1 else logits * weight

    def put(self, place: Place, logits: Tensor) -> None:
        """Put logits in their place, whatever was there."""
        total = self._memory(logits)
        total[(slice(None), *place)] = logits.to(total.device, total.dtype)

    def _memory(self, logits: Tensor) -> Tensor:
        self.dtype = self.dtype or logits.dtype
        return self.reserve(len(logits), logits.dtype)

    def reserve(self, channels: int, dtype: torch.dtype) -> Tensor:
        """The memory, also before anything is given."""
        if self._sum is None:
            self._sum = self._allocate((channels, *self.extents), torch.promote_types(dtype, torch.float32))
        return self._sum

    @classmethod
    def reopened(cls, extents: Sequence[int], scratch: Scratch, name: str) -> Result:
        """A result that another process left in scratch."""
        result = cls(extents, scratch.zeros)
        result._sum = scratch.reopen(name, (-1, *extents))
        return result

    @property
    def logits(self) -> Tensor:
        """The sum, (K, *extents)."""
        assert self._sum is not None
        return self._sum


class PartOf:
    """The part of a sink that a plane of a stack is; see ``planes``."""

    def __init__(self, sink: Sink, index: tuple[int, ...]) -> None:
        assert not any(sink.overlap[: len(index)]), "planes of a stack are resampled one by one"
        self.sink, self.index = sink, index
        self.overlap = tuple(sink.overlap[len(index) :])
        self.adds_up = sink.adds_up

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Sink.add``."""
        self.sink.add((*self.index, *place), logits, weight, None if core is None else (*self.index, *core))


def stream(logits: Tensor, sink: Sink) -> None:
    """Give logits (K, *extents) that are added up to a sink, box by box."""
    extents = tuple(logits.shape[1:])
    most = STREAMED_BYTES / (len(logits) * logits.dtype.itemsize)
    for region in blocks(extents, block_shape(extents, most)):
        beyond = tuple((start, stop + more) for (start, stop), more in zip(region, sink.overlap, strict=True))
        place = slices(clip(beyond, extents))
        sink.add(place, logits[(slice(None), *place)], core=slices(region))


class ExecutionPlan(Protocol):
    """One way to predict one image."""

    def steps(self, folds: int) -> int:
        """How often ``progress`` is called for a number of folds."""

    def describe(self) -> str:
        """The plan for the user, in one line."""

    def as_dict(self) -> dict[str, Any]:
        """The plan for a JSON file; ``plan`` is its name."""

    def run(
        self,
        folds: Folds,
        image: Image,
        sink: Sink,
        progress: Callable[[], object],
        journal: RunJournal | None = None,
    ) -> None:
        """Predict.

        Args:
            folds: the network; takes its input from any device.
            image: (C, *spatial), or (C, Z, *spatial) for a 2d network that takes a stack slice by slice.
            sink: takes the logits.
            progress: called after every step.
            journal: takes the points from which another process can go on, and gives the one to begin at.
        """


def flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """The mirrored passes that are averaged: the axes that are flipped in each; first the one without any."""
    return [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]


def planes(image: Image, ndim: int, first: int = 0) -> Iterator[tuple[tuple[int, ...], Image]]:
    """What the network takes at a time: (index of a slice, slice) for a stack and a 2d network, else the image itself.

    Args:
        image: (C, *spatial), or (C, Z, *spatial).
        ndim: spatial axes of the network.
        first: how many are left out.
    """
    if image.ndim != ndim + 1:
        for z in range(first, image.shape[1]):
            yield (z,), image[:, z]
    elif first == 0:
        yield (), image


def read(plane: Image, box: Box) -> Tensor:
    """The box of (C, *spatial) as a batch of one, with zeros where it reaches beyond the far end of the image."""
    inside = tuple(slice(min(b.start, n), min(b.stop, n)) for b, n in zip(box, plane.shape[1:], strict=True))
    values = plane[(slice(None), *inside)]
    missing = [(b.stop - b.start) - n for b, n in zip(box, values.shape[1:], strict=True)]
    padding = [width for m in reversed(missing) for width in (0, m)]
    return functional.pad(values, padding)[None].contiguous()
