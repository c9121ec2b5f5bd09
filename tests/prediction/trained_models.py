"""Model folders of this package's trainers, with random weights and statistics in place of trained ones."""

import contextlib
import io
import json

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_models import plans, write_checkpoint, write_model

from nnunet_norm.prediction.model_folder import trainers_on_search_path

CONFIGURATION = "3d_fullres"
STOCK = "torch.nn.modules.instancenorm.InstanceNorm3d"


def residual(plan):
    """Make the plans' network a residual encoder U-Net."""
    architecture = plan["configurations"][CONFIGURATION]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")


def flat(plan):
    """Make the plans' network two-dimensional."""
    configuration = plan["configurations"][CONFIGURATION]
    configuration["patch_size"], configuration["spacing"] = [16, 16], [1.0, 1.0]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs |= {"kernel_sizes": [[3, 3]] * 2, "strides": [[1, 1], [2, 2]], "conv_op": "torch.nn.modules.conv.Conv2d"}
    kwargs["norm_op"] = STOCK.replace("3d", "2d")


def write_trained(folder, trainer="nnUNetTrainerBRN", *, folds=(0,), eps=1e-5, norm=STOCK, change=lambda plan: None):
    """A model as that trainer leaves it, but for the training; ``change`` edits the plans before."""
    write_model(folder, folds=(), norm=norm)
    plan = plans(norm=norm)
    plan["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["norm_op_kwargs"]["eps"] = eps
    change(plan)
    (folder / "plans.json").write_text(json.dumps(plan))
    manager = PlansManager(plan)
    with trainers_on_search_path(), contextlib.redirect_stdout(io.StringIO()):
        trainer_class = recursive_find_trainer_class_by_name(trainer)
    for fold in folds:
        torch.manual_seed(100 if fold == "all" else fold)
        network = trainer_class.build_network_architecture(
            manager, manager.get_configuration(CONFIGURATION), 1, 3, enable_deep_supervision=False
        )
        write_checkpoint(folder / f"fold_{fold}", drawn(network.state_dict()), trainer)
    return folder


def drawn(state):
    """Statistics and affine parameters that are none of the defaults, in place; state dicts name a tensor several times."""
    seen = set()
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if "var" in name or ("norm" in name and name.endswith("weight")):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.ndim == 1:
            tensor.copy_(torch.randn_like(tensor) * 0.5)
    return state


def add_what_a_training_leaves(folder, fold=0):
    """The files of a fold that nnU-Net shares with the model, and an optimizer's state in the checkpoint."""
    place = folder / f"fold_{fold}"
    (place / "validation").mkdir()
    (place / "validation" / "summary.json").write_text('{"foreground_mean": {"Dice": 0.5}}')
    (place / "progress.png").write_bytes(b"a picture")
    (folder / "dataset_fingerprint.json").write_text('{"spacings": []}')
    path = place / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    moments = {key: torch.zeros_like(value) for key, value in checkpoint["network_weights"].items()}
    torch.save(checkpoint | {"optimizer_state": moments, "logging": {"a": [1.0]}, "current_epoch": 3}, path)
