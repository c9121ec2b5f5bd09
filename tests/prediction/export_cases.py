"""Cases as nnU-Net's export gets them, small: plans, properties and random logits; and boxes that divide an image."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter
from tiny_models import plans

LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


@dataclass
class ExportCase:
    """What nnU-Net's export of one case is called with."""

    plans_manager: Any
    configuration_manager: Any
    label_manager: Any
    properties: dict
    logits: torch.Tensor

    def expected(self, *, probabilities=False):
        """What nnU-Net makes of all logits at once."""
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            self.logits,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            self.properties,
            return_probabilities=probabilities,
            num_threads_torch=1,
        )


def export_case(
    shape,
    cropped,
    *,
    spacing=(1.0, 1.0, 1.0),
    target=None,
    labels=LABELS,
    class_order=None,
    crop=((0, 0),) * 3,
    forward=(0, 1, 2),
    seed=0,
    configuration=None,
    resampling_options=None,
):
    """A case whose logits of ``shape`` are resampled to ``cropped``, the image without the margins ``crop``.

    Shapes, margins and spacings are in the plans' axes. ``spacing`` is the configuration's, ``target`` the image's, by
    default the one that belongs to the shapes. ``resampling_options`` change the arguments of the resampling function,
    ``configuration`` the plans' configuration.
    """
    plan = plans()
    plan["transpose_forward"] = list(forward)
    backward = [int(axis) for axis in np.argsort(forward)]
    plan["transpose_backward"] = backward
    changed = plan["configurations"]["3d_fullres"]
    key = "resampling_fn_probabilities_kwargs"
    changed |= {"spacing": list(spacing), key: {**changed[key], **(resampling_options or {})}, **(configuration or {})}
    dataset = {"labels": labels, "channel_names": {"0": "T"}, "file_ending": ".nii.gz"}
    if class_order:
        dataset["regions_class_order"] = list(class_order)
    if target is None:
        first = (1.0,) * (len(shape) - len(spacing))
        target = [s * n / m for s, n, m in zip((*first, *spacing), shape, cropped, strict=True)]
    manager = PlansManager(plan)
    label_manager = manager.get_label_manager(dataset)
    properties = {
        "spacing": [target[axis] for axis in backward],
        "shape_before_cropping": tuple(a + n + b for (a, b), n in zip(crop, cropped, strict=True)),
        "bbox_used_for_cropping": [[a, a + n] for (a, _), n in zip(crop, cropped, strict=True)],
        "shape_after_cropping_and_before_resampling": tuple(cropped),
    }
    logits = random_logits(label_manager.num_segmentation_heads, shape, seed)
    return ExportCase(manager, manager.get_configuration("3d_fullres"), label_manager, properties, logits)


def random_logits(channels, shape, seed=0):
    """Smooth shapes with noise on them, so that every class has voxels and many are near to a border between two."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((channels, *shape))
    smooth = np.stack([gaussian_filter(channel, 2.0, mode="nearest") for channel in noise])
    return torch.from_numpy((8 * smooth + 0.3 * generator.standard_normal(noise.shape)).astype(np.float32))


def random_partition(shape, generator, pieces=7):
    """Boxes that divide an image, not on a grid: the largest is cut at a random place until there are enough."""
    boxes = [tuple(slice(0, n) for n in shape)]
    while len(boxes) < pieces:
        boxes.sort(key=lambda box: np.prod([s.stop - s.start for s in box]))
        box = boxes.pop()
        axis = generator.choice([a for a, s in enumerate(box) if s.stop - s.start > 1])
        cut = int(generator.integers(box[axis].start + 1, box[axis].stop))
        boxes += [
            (*box[:axis], half, *box[axis + 1 :]) for half in (slice(box[axis].start, cut), slice(cut, box[axis].stop))
        ]
    return [boxes[i] for i in generator.permutation(len(boxes))]


def with_overlap(core, overlap, shape):
    """The box with the overlap after it that lies in the image."""
    return tuple(slice(s.start, min(s.stop + more, n)) for s, more, n in zip(core, overlap, shape, strict=True))
