"""Training on images, or tiles, that are normalized by their quantiles: ``input_normalization`` in the plans' block."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_norm.layers import IMAGE, TILE, TILE_WARNING, confirm_normalized_images, set_input_normalization
from nnunet_norm.settings import NormSettings
from nnunet_norm.training.architecture_trainer import ArchitectureTrainer
from nnunet_norm.training.normalized_cases import NormalizedCases, normalized_cases


class InputTrainer(ArchitectureTrainer):
    """The trainer of any architecture with the input normalization that the plans' block asks for, if it does.

    * ``image_quantile``: every patch, of training, validation and the final validation, is cut from a case that is normalized
      by the quantiles of its whole image. What nnU-Net has preprocessed is read as it is.
    * ``tile_quantile``: the network itself normalizes what enters it, after augmentation.
    """

    dataset_class: Any

    @classmethod
    def finish_network(cls, network: nn.Module, configuration_manager: ConfigurationManager) -> nn.Module:
        """The network, which knows how its input is normalized."""
        network = super().finish_network(network, configuration_manager)
        kind = NormSettings.from_configuration(configuration_manager.configuration).input_normalization
        if kind is not None:
            set_input_normalization(network, kind, len(configuration_manager.normalization_schemes))
        return network

    def initialize(self) -> None:
        """Build everything; cases are normalized from here on if the plans want that."""
        super().initialize()
        if self.settings.input_normalization == IMAGE:
            self.dataset_class = normalized_cases(self.dataset_class)
            confirm_normalized_images(self.bare_network)

    def get_tr_and_val_datasets(self) -> Any:
        """nnU-Net's datasets; what normalizes their cases is found before processes are started that load them."""
        datasets = super().get_tr_and_val_datasets()
        for dataset in datasets:
            if isinstance(dataset, NormalizedCases):
                dataset.find_quantiles()
        return datasets

    def get_training_transforms(self, *args: Any, use_mask_for_norm: list[bool] | None = None, **kwargs: Any) -> Any:
        """nnU-Net's augmentation; it sets what lies outside a mask to 0, which is no 0 any more in a normalized image."""
        if self.settings.input_normalization == IMAGE:
            use_mask_for_norm = None
        return super().get_training_transforms(*args, use_mask_for_norm=use_mask_for_norm, **kwargs)

    def on_train_start(self) -> None:
        """Say how the input is normalized."""
        super().on_train_start()
        if self.settings.input_normalization == IMAGE:
            self.print_to_log_file("Input normalization: every image by its quantiles (image_quantile)")
        elif self.settings.input_normalization == TILE:
            self.print_to_log_file(f"WARNING: {TILE_WARNING}")
