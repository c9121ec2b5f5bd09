"""What nnU-Net's planners hold to fit a GPU: how large the feature maps of a network of so many gigabytes are."""

import functools
import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import nnunetv2
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class


@dataclass(frozen=True)
class Reference:
    """A training that a planner holds to fit.

    Attributes:
        feature_map_size: of one sample, as the network's ``compute_conv_feature_map_size`` counts.
        batch_size: samples in the network.
        gigabytes: of the GPU on which this fits.
    """

    feature_map_size: float
    batch_size: int
    gigabytes: float

    def estimate(self, feature_map_size: float, samples: float = 1) -> float:
        """Gigabytes of a GPU for so many samples, by the proportion with which planners choose the batch size."""
        return self.gigabytes * samples * feature_map_size / (self.feature_map_size * self.batch_size)


def reference_of(planner_used: str, network_class_name: str, ndim: int) -> Reference:
    """The reference of the planner that wrote the plans, if nnU-Net has it and it plans such networks; else of the network's.

    Args:
        planner_used: ``experiment_planner_used`` of the plans.
        network_class_name: of the configuration's architecture; the networks of nnU-Net's residual encoder have their own
            reference, all others that of the plain U-Net.
        ndim: spatial axes of the patch, 2 or 3.
    """
    own = _planner(planner_used) if planner_used else None
    network = network_class_name.rsplit(".", 1)[-1]
    if own is None or own.UNet_class.__name__ != network:
        residual = _constructed(ResEncUNetPlanner)
        own = residual if residual.UNet_class.__name__ == network else _constructed(ExperimentPlanner)
    return Reference(
        getattr(own, f"UNet_reference_val_{ndim}d"),
        getattr(own, f"UNet_reference_val_corresp_bs_{ndim}d"),
        own.UNet_reference_val_corresp_GB,
    )


@functools.cache
def _planner(name: str) -> Any:
    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
    return None if found is None else _constructed(found)


@functools.cache
def _constructed(planner: type) -> Any:
    """A planner as its constructor leaves it, which is where nnU-Net keeps these numbers; it sees no dataset."""
    without_data: dict[str, Any] = {
        "maybe_convert_to_dataset_name": str,
        "load_json": lambda path: {},
        "get_filenames_of_train_images_and_targets": lambda *folder_and_json: {},
        "isfile": lambda path: path.endswith("dataset_fingerprint.json"),
        "nnUNet_raw": "",
        "nnUNet_preprocessed": "",
    }
    with patch.multiple(default_experiment_planner, **without_data):
        return planner("")
