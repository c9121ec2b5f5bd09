"""A case's labels and probabilities, put together box by box as nnU-Net's export makes them from all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import DTypeLike, NDArray

from nnunet_norm.prediction.resampling import BoxResampler, as_array, sub_boxes
from nnunet_norm.tiling import Box, round_up

Allocate = Callable[[str, tuple[int, ...], DTypeLike], NDArray[Any]]
"""Gives an array of zeros by name ("segmentation" or "probabilities"), shape and dtype: in memory, or mapped from a file."""

VECTOR = 64
"""A multiple of the voxels that any processor's vectors hold as float32."""

SHARED = 2**15
"""Numbers in an array beyond which torch shares pointwise functions between threads."""

LOGITS_BYTES = 32 * 2**20
"""Resampled logits that are held at a time."""


def in_memory(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros in memory; see ``Allocate``."""
    return np.zeros(shape, dtype)


class Assembly:
    """Segmentation and probabilities of one case in the image's own geometry, to which boxes are added in any order.

    Once every box has been put, they are what ``convert_predicted_logits_to_segmentation_with_correct_shape`` returns; but
    for the last bits of probabilities in the image's last voxels, where nnU-Net's own depend on the number of threads.
    What was cropped away is background.

    Attributes:
        segmentation: (x, y, z) in the axes of the reader; uint8, or uint16 from 255 foreground labels on.
        probabilities: (K, x, y, z), float32; None if they are not wanted.
    """

    def __init__(
        self,
        plans_manager: PlansManager,
        label_manager: LabelManager,
        properties: Mapping[str, Any],
        *,
        probabilities: bool = False,
        allocate: Allocate = in_memory,
    ) -> None:
        """Allocate what is put together.

        Arrays that hold boxes already, because they were mapped from the files of an interrupted run, keep them.

        Args:
            plans_manager: the model's plans.
            label_manager: how logits become labels.
            properties: what preprocessing told about the image.
            probabilities: whether they are wanted as well.
            allocate: makes the arrays; they are zero where nothing has been put.
        """
        backward = [int(axis) for axis in plans_manager.transpose_backward]
        forward = [int(axis) for axis in np.argsort(backward)]
        shape = tuple(int(properties["shape_before_cropping"][axis]) for axis in backward)
        self._labels = label_manager
        self._crop = [(int(start), int(stop)) for start, stop in properties["bbox_used_for_cropping"]]
        dtype = np.uint8 if len(label_manager.foreground_labels) < 255 else np.uint16
        self.segmentation: NDArray[Any] = allocate("segmentation", shape, dtype)
        self.probabilities: NDArray[np.float32] | None = None
        self._segmentation = self.segmentation.transpose(forward)
        if probabilities:
            heads = label_manager.num_segmentation_heads
            self.probabilities = allocate("probabilities", (heads, *shape), np.float32)
            self._probabilities = self.probabilities.transpose([0, *(axis + 1 for axis in forward)])
            if not label_manager.has_regions:
                self._fill_outside(self._probabilities[0])

    def put(self, out: Box, logits: NDArray[np.float32]) -> None:
        """Add a box; a box that is added again replaces itself.

        Args:
            out: the box in the cropped image before it was resampled, axes in the order of ``transpose_forward``.
            logits: (K, *out), resampled.
        """
        if not logits.size:
            return
        place = [[start + s.start, start + s.stop] for (start, _), s in zip(self._crop, out, strict=True)]
        if self.probabilities is None and not self._labels.has_regions:
            segmentation = self._labels.convert_logits_to_segmentation(logits)
        else:
            probabilities = self._nonlinearity(logits)
            segmentation = self._labels.convert_probabilities_to_segmentation(probabilities)
            if self.probabilities is not None:
                insert_crop_into_image(self._probabilities, probabilities, place)
        insert_crop_into_image(self._segmentation, segmentation, place)

    def _nonlinearity(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probabilities (K, *box), the same for a voxel whatever box it comes in and whatever the number of threads.

        Torch computes vectors of voxels and, with other last bits, what is left over at the end of an array or of a thread's
        share. Here nothing is left over. Of softmax every thread has an equal share of the voxels; other functions, those of
        regions, are not shared in arrays as small as these.
        """
        channels, *extent = logits.shape
        voxels = math.prod(extent)
        given = logits.reshape(channels, voxels)
        result = np.empty_like(given)
        unit = VECTOR * (1 if self._labels.has_regions else torch.get_num_threads())
        step = max(SHARED // (channels * unit), 1) * unit
        for start in range(0, voxels, step):
            piece = given[:, start : start + step]
            length = piece.shape[1]
            padded = np.zeros((channels, round_up(length, unit)), dtype=np.float32)
            padded[:, :length] = piece
            result[:, start : start + length] = self._labels.apply_inference_nonlin(padded).numpy()[:, :length]
        return result.reshape(logits.shape)

    def _fill_outside(self, background: NDArray[np.float32]) -> None:
        """Give probability 1 to the background wherever the image was cropped away, and only there."""
        box = [slice(None)] * background.ndim
        for axis, (start, stop) in enumerate(self._crop):
            for outside in (slice(0, max(start, 0)), slice(stop, None)):
                background[(*box[:axis], outside, *box[axis + 1 :])] = 1
            box[axis] = slice(max(start, 0), stop)


@dataclass(frozen=True)
class LogitsToLabels:
    """From boxes of a case's logits to its labels, without ever holding more than one box of them.

    Attributes:
        resampler: how the case is resampled.
        assembly: where its labels go.
        at_most_bytes: resampled logits that are held at a time; at least one voxel's.
    """

    resampler: BoxResampler
    assembly: Assembly
    at_most_bytes: float = LOGITS_BYTES

    def add(self, core: Box, region: Box, logits: torch.Tensor | NDArray[Any]) -> None:
        """Resample what belongs to a box and put it into the assembly; a box that is added again replaces itself.

        Boxes that do not share voxels of their cores may be added from several threads at once.

        Args:
            core: the box of the preprocessed image.
            region: the box that ``logits`` cover: the core and, within the image, the resampler's ``overlap`` after it.
            logits: (K, *region), see ``BoxResampler``.

        Raises:
            TilingError: the logits do not reach as far as the core's output needs.
        """
        values = as_array(logits)
        for out in sub_boxes(self.resampler.out_box(core), len(values), self.at_most_bytes):
            self.assembly.put(out, self.resampler(values, region, out))
