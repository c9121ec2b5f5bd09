"""Weights of a trained model as a start for another training, whatever the norm of either."""

from __future__ import annotations

from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_norm.architectures import build_unetr, trains_unetr
from nnunet_norm.errors import ModelFolderError
from nnunet_norm.layers import convert_norm, find_norms
from nnunet_norm.prediction.model_writing import write_checkpoint
from nnunet_norm.prediction.safe_loading import check_architecture, load_checkpoint


def pretrained_weights(
    model_folder: str | Path, fold: int | str, checkpoint_name: str, *, trust_checkpoint: bool = False
) -> dict[str, Tensor]:
    """The weights of one fold with everything that any norm of this package could ask for.

    ``nnUNetv2_train -pretrained_weights`` refuses a file in which a key of the new network is missing, so a model trained
    with InstanceNorm could not start one with BatchRenorm. Affine parameters are kept, or start as ones and zeros after a
    training without norm. Running statistics are kept where the model has them and start afresh where not; the count of
    batches starts at 0, and with it BatchRenorm's schedule.

    Args:
        model_folder: ``<trainer>__<plans>__<configuration>``, as nnU-Net leaves it.
        fold: A fold's number, or "all".
        checkpoint_name: The checkpoint in the fold's folder.
        trust_checkpoint: Whether the model may run code of its own when it is read.

    Raises:
        ModelFolderError: If a weight of the network that the plans describe is missing, or of another shape; or if the model
            would run code.
    """
    path = Path(model_folder) / f"fold_{fold}" / checkpoint_name
    if not trust_checkpoint:
        check_architecture(model_folder)
    checkpoint = load_checkpoint(path, trust=trust_checkpoint)
    weights: dict[str, Tensor] = dict(checkpoint["network_weights"])
    expected = _batch_norm_state(
        Path(model_folder), checkpoint["init_args"]["configuration"], checkpoint.get("trainer_name", "")
    )
    for key, (is_of_norm, default) in expected.items():
        if key.endswith("num_batches_tracked") or (is_of_norm and key not in weights):
            weights[key] = default
        elif key not in weights or weights[key].shape != default.shape:
            found = tuple(weights[key].shape) if key in weights else "missing"
            raise ModelFolderError(
                f"{path}: {key} is {found} and should be {tuple(default.shape)} by the model's plans"
            )
    return weights


def _batch_norm_state(model_folder: Path, configuration: str, trainer: str) -> dict[str, tuple[bool, Tensor]]:
    """Every key of the model's network with BatchNorm: whether it belongs to a norm, and its initial value."""
    plans = PlansManager(load_json(str(model_folder / "plans.json")))
    dataset_json = load_json(str(model_folder / "dataset.json"))
    manager = plans.get_configuration(configuration)
    channels = determine_num_input_channels(plans, manager, dataset_json)
    heads = plans.get_label_manager(dataset_json).num_segmentation_heads
    network: nn.Module = (
        build_unetr(manager.configuration, channels, heads)
        if trains_unetr(trainer)
        else nnUNetTrainer.build_network_architecture(plans, manager, channels, heads, False)
    )
    norms = set(find_norms(convert_norm(network, "batch_norm")).values())
    for norm in norms:
        norm.reset_parameters()  # type: ignore[operator]
    prefixes = tuple(f"{name}." for name, m in network.named_modules(remove_duplicate=False) if m in norms)
    return {key: (key.startswith(prefixes), value) for key, value in network.state_dict().items()}


def export_pretrained(
    model_folder: str | Path,
    fold: int | str,
    checkpoint_name: str,
    output: str | Path,
    *,
    trust_checkpoint: bool = False,
) -> None:
    """Write :func:`pretrained_weights` as a checkpoint for ``nnUNetv2_train -pretrained_weights``.

    Raises:
        ModelFolderError: As :func:`pretrained_weights`.
        OutputError: If the file cannot be written; nothing is left behind.
    """
    weights = pretrained_weights(model_folder, fold, checkpoint_name, trust_checkpoint=trust_checkpoint)
    write_checkpoint(output, {"network_weights": weights})
