"""Small networks with random weights and statistics, and predictors around them without a trained model."""

from types import SimpleNamespace

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_norm.prediction import HaloPredictor

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def unet(strides, *, norm=BATCH_NORM, residual=False, channels=1, classes=2, seed=0):
    """A U-Net with two features; ``strides`` per stage and axis, the first stage's too."""
    torch.manual_seed(seed)
    ndim, stages = len(strides[0]), len(strides)
    kind = ResidualEncoderUNet if residual else PlainConvUNet
    blocks = {"n_blocks_per_stage": 1} if residual else {"n_conv_per_stage": 1}
    network = kind(
        input_channels=channels,
        n_stages=stages,
        features_per_stage=[2] * stages,
        conv_op=CONV[ndim],
        kernel_sizes=3,
        strides=strides,
        num_classes=classes,
        n_conv_per_stage_decoder=[1] * (stages - 1),
        conv_bias=True,
        norm_op=norm[ndim],
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        **blocks,
    )
    return randomized(network)


class Chain(nn.Module):
    """Convolutions without a change of resolution: one even kernel, one dilated."""

    def __init__(self):
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 2, 0, 1))
        self.even = nn.Conv2d(1, 2, (2, 4))
        self.norm = nn.BatchNorm2d(2)
        self.dilated = nn.Conv2d(2, 2, 3, padding=2, dilation=2)

    def forward(self, x):
        return self.dilated(torch.relu(self.norm(self.even(self.pad(x)))))


def randomized(network):
    """Weights and stored statistics that make every voxel of the input count, in float64 and eval mode."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point():
            drawn = torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.5
            tensor.data.copy_(drawn)
    return network.double().eval()


def predictor(network, patch_size, *, mirror_axes=None, **options):
    """A predictor on the CPU around a network, as the trainer's final validation makes one."""
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=mirror_axes is not None, **options)
    configuration = SimpleNamespace(patch_size=patch_size)
    plans = SimpleNamespace(get_label_manager=lambda dataset_json: None)
    made.manual_initialization(network, plans, configuration, None, {}, "nnUNetTrainer", mirror_axes)
    return made
