"""A trained model's folder and images as nnU-Net has them on disk, made in a second without training."""

import json
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}


def architecture(features=4, norm="torch.nn.BatchNorm3d"):
    return {
        "network_class_name": UNET,
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [features, features],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2,
            "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": norm,
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(channels=1, **kwargs):
    resampling = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture(**kwargs),
        "batch_dice": False,
    }
    for what in ("data", "seg", "probabilities"):
        configuration |= {f"resampling_fn_{what}": resampling, f"resampling_fn_{what}_kwargs": RESAMPLING}
    statistics = {"mean": 0.0, "std": 1.0, "percentile_00_5": -3.0, "percentile_99_5": 3.0}
    return {
        "dataset_name": "Dataset901_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(channels)},
        "configurations": {"3d_fullres": configuration},
    }


def write_model(folder, *, channels=1, folds=(0,), trainer="nnUNetTrainer", **kwargs):
    """A model folder with one checkpoint of random weights per fold."""
    folder.mkdir(parents=True)
    plan = plans(channels, **kwargs)
    dataset = {
        "channel_names": {str(c): f"T{c}" for c in range(channels)},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (folder / "plans.json").write_text(json.dumps(plan))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    made = plan["configurations"]["3d_fullres"]["architecture"]
    for fold in folds:
        torch.manual_seed(fold)
        network = get_network_from_plans(
            made["network_class_name"],
            made["arch_kwargs"],
            made["_kw_requires_import"],
            channels,
            3,
            deep_supervision=False,
        )
        write_checkpoint(folder / f"fold_{fold}", network.state_dict(), trainer)
    return folder


def write_checkpoint(folder, weights, trainer="nnUNetTrainer"):
    folder.mkdir(exist_ok=True)
    checkpoint = {
        "network_weights": weights,
        "trainer_name": trainer,
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0,),
    }
    torch.save(checkpoint, folder / "checkpoint_final.pth")


def write_image(folder, name, *, shape=(20, 22, 24), seed=0, value=None):
    """A NIfTI image of noise, ``name`` with its channel number; ``value`` goes into one voxel."""
    folder.mkdir(exist_ok=True)
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if value is not None:
        array[3, 4, 5] = value
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 1.0))
    SimpleITK.WriteImage(image, str(folder / f"{name}.nii.gz"))


def segmentation(path):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def visible(folder):
    """All names in a folder, hidden ones too."""
    return sorted(entry.name for entry in Path(folder).iterdir())
