"""What becomes of a case's logits: labels in the image's own geometry, box by box where nnU-Net's resampling allows it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray
from torch import Tensor

from nnunet_norm.prediction.assembly import Allocate, Assembly, LogitsToLabels, in_memory
from nnunet_norm.prediction.execution import Place, Result, Sink, box_of
from nnunet_norm.prediction.resampling import box_resampler

logger = logging.getLogger(__name__)


class CaseLabels:
    """The labels of one case, and the sink that takes its logits.

    Attributes:
        sink: takes the logits of the preprocessed image.
        streams: whether labels are made box by box; else all logits are held, since only nnU-Net's own function can resample
            them as the plans want it, in one piece.
    """

    def __init__(
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        label_manager: LabelManager,
        properties: Mapping[str, Any],
        shape: Sequence[int],
        *,
        probabilities: bool = False,
        allocate: Allocate = in_memory,
    ) -> None:
        """Allocate what is put together.

        Args:
            plans_manager: the model's plans.
            configuration_manager: the model's configuration.
            label_manager: how logits become labels.
            properties: what preprocessing told about the image.
            shape: spatial shape of the preprocessed image.
            probabilities: whether they are wanted beside the labels.
            allocate: makes the arrays; see ``Assembly``.
        """
        self._all = (plans_manager, configuration_manager, label_manager, dict(properties))
        self._probabilities, self._allocate = probabilities, allocate
        self._arrays: Any = None
        resampler = box_resampler(plans_manager, configuration_manager, properties, (1, *shape))
        self.streams = resampler is not None
        self.sink: Sink
        if resampler is None:
            logger.info(
                f"all logits are kept in memory until they are resampled: {_name(configuration_manager)} works on one piece"
            )
            self.sink = Result(shape)
        else:
            self._assembly = Assembly(
                plans_manager, label_manager, properties, probabilities=probabilities, allocate=allocate
            )
            self.sink = LabelSink(LogitsToLabels(resampler, self._assembly))

    def finish(self) -> None:
        """Make the labels of what was held back."""
        if not isinstance(self.sink, Result):
            self._arrays = (self._assembly.segmentation, self._assembly.probabilities)
            return
        made = convert_predicted_logits_to_segmentation_with_correct_shape(
            self.sink.logits.numpy(), *self._all, return_probabilities=self._probabilities
        )
        self._arrays = made if self._probabilities else (made, None)
        for name, array in zip(("segmentation", "probabilities"), self._arrays, strict=True):
            if array is not None:
                self._allocate(name, array.shape, array.dtype)[...] = array

    @property
    def arrays(self) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
        """What nnU-Net's export returns: the segmentation, with probabilities both; after ``finish``."""
        return self._arrays if self._probabilities else self._arrays[0]


class LabelSink:
    """Makes labels of logits as they come."""

    adds_up = False

    def __init__(self, labels: LogitsToLabels) -> None:
        self.labels, self.overlap = labels, labels.resampler.overlap

    def add(self, place: Place, logits: Tensor, weight: float = 1.0, core: Place | None = None) -> None:
        """See ``Sink.add``."""
        assert weight == 1
        region = box_of(place)
        self.labels.add(box_of(core or place), region, logits.reshape(len(logits), *(s.stop - s.start for s in region)))


def _name(configuration_manager: ConfigurationManager) -> str:
    function = configuration_manager.resampling_fn_probabilities
    return getattr(getattr(function, "func", function), "__name__", str(function))
