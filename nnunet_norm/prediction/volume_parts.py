"""A part of a volume: what must be read for it, which of the network's output is its own, and what tells that it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from nnunet_norm.errors import OutputError
from nnunet_norm.prediction.execution import Image, Place, Sink, box_of
from nnunet_norm.receptive_field import ReceptiveField
from nnunet_norm.stages.regions import Region, extent_of, slices
from nnunet_norm.tiling import intersection, relative
from nnunet_norm.volumes import LabelVolume
from nnunet_norm.writing import write_json

FOLDER = ".parts"
"""Where the marks of finished parts lie, in the output before it has its name."""


def surroundings(core: Region, extents: Sequence[int], field: ReceptiveField, mirror_axes: Sequence[int]) -> Region:
    """The region that the network must see so that its output in ``core`` is that of the whole volume.

    It begins on the grid of the total stride. Where it does not end at an end of the volume, what the network makes of its
    own padding there does not reach the core.

    Args:
        core: on the axes of the network's input, those of a stack included.
        extents: of the volume.
        field: the network's receptive field, bounded.
        mirror_axes: spatial axes of the network that are mirrored.
    """
    free = len(extents) - len(field.stride)  # the axis of a stack, for a 2d network
    found = list(core)
    for axis, (stride, (before, after)) in enumerate(zip(field.stride, field.any_voxel, strict=True)):
        if axis in mirror_axes:
            before = after = max(before, after)
        start, stop = core[axis + free]
        found[axis + free] = max(start - before, 0) // stride * stride, min(stop + after, extents[axis + free])
    return tuple(found)


class SubImage:
    """A region of an image, as an image."""

    def __init__(self, image: Image, region: Region) -> None:
        self.image, self.region = image, region
        self.shape = Size((image.shape[0], *extent_of(region)))
        self.ndim = len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """A part of it; spatial axes by slices with a start and a stop, by numbers, or whole."""
        channels, *spatial = index if isinstance(index, tuple) else (index,)
        spatial += [slice(None)] * (len(self.region) - len(spatial))
        moved = []
        for wanted, (start, stop) in zip(spatial, self.region, strict=True):
            if isinstance(wanted, slice):
                first, last, _ = wanted.indices(stop - start)
                moved.append(slice(start + first, start + max(first, last)))
            else:
                moved.append(start + wanted)
        return self.image[(channels, *moved)]


class CoreOf:
    """Hands on what lies in the core of a region, in the core's own coordinates."""

    adds_up = False

    def __init__(self, sink: Sink, core: Region, region: Region) -> None:
        self.sink, self.overlap = sink, (0,) * len(core)
        assert not any(sink.overlap), "a part of a volume is not resampled"
        origin = [start for start, _ in region]
        self.core = slices(core, origin)

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Sink.add``."""
        assert core is None or core == place
        box = box_of(place)
        own = intersection(box, self.core)
        if own is None:
            return
        values = logits.reshape(len(logits), *(side.stop - side.start for side in box))
        self.sink.add(relative(own, self.core), values[(slice(None), *relative(own, box))], weight)


class Parts:
    """Which parts of an output are finished. A mark is written only after what it stands for."""

    def __init__(self, labels: LabelVolume, boxes: Sequence[Region]) -> None:
        """Look at an output that has not its final name yet.

        Args:
            labels: the output.
            boxes: of all its parts.
        """
        self.labels, self.boxes = labels, boxes
        self.folder = labels.unfinished / FOLDER
        self.folder.mkdir(exist_ok=True)

    def mark(self, number: int, files: Mapping[str, int]) -> None:
        """Tell that a part is finished, with the files that were written and their sizes."""
        write_json(self._file(number), {"box": self.boxes[number], "files": dict(files)}, indent=None)

    def unmark(self, number: int) -> None:
        """A part is begun again."""
        self._file(number).unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """The parts that are not finished, or damaged since."""
        return [number for number in range(len(self.boxes)) if not self.is_whole(number)]

    def verify(self) -> None:
        """See that all parts are finished, and that their files are there.

        Raises:
            OutputError: with the parts that must be predicted, and how.
        """
        bad = self.missing()
        if bad:
            which = ", ".join(map(str, bad[:10])) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
            raise OutputError(
                f"{self.labels.path.name}: part {which} of {len(self.boxes)} is not finished: predict it with -num_parts "
                f"{len(self.boxes)} -part_id {bad[0]} (the same options otherwise), then verify again"
            )

    def is_whole(self, number: int) -> bool:
        """Whether a part was told to be finished, and its files are what was told."""
        try:
            mark: Mapping[str, Any] = json.loads(self._file(number).read_text(encoding="utf-8"))
            same_box = [tuple(side) for side in mark["box"]] == list(self.boxes[number])
            return same_box and mark["files"] == self.labels.sizes(self.boxes[number])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _file(self, number: int) -> Path:
        return self.folder / f"part_{number}_of_{len(self.boxes)}.json"
