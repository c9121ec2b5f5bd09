"""Small networks of every kind that is known, with weights and statistics that make every voxel matter."""

import math
from dataclasses import dataclass

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from torch import nn

from nnunet_norm.layers import (
    BatchRenorm2d,
    BatchRenorm3d,
    GroupNorm,
    TrackedInstanceNorm2d,
    TrackedInstanceNorm3d,
)

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def torch_group_norm(channels):
    """torch's GroupNorm with two groups, called as nnU-Net's blocks call a norm."""
    return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels)


FIXED = {
    "BatchNorm": (BATCH_NORM, {}),
    "BatchRenorm": ({2: BatchRenorm2d, 3: BatchRenorm3d}, {}),
    "tracked InstanceNorm": ({2: TrackedInstanceNorm2d, 3: TrackedInstanceNorm3d}, {}),
    "none": ({2: None, 3: None}, {}),
}
"""Norms with stored statistics: class per number of axes, and its arguments."""

IMAGE = {
    "InstanceNorm": (INSTANCE_NORM, {"affine": True}),
    "InstanceNorm without affine": (INSTANCE_NORM, {}),
    "GroupNorm": ({2: GroupNorm, 3: GroupNorm}, {"group_size": 2}),
    "torch's GroupNorm": ({2: torch_group_norm, 3: torch_group_norm}, {}),
    "BatchNorm without statistics": (BATCH_NORM, {"track_running_stats": False}),
}
"""Norms with the statistics of the image."""

NORMS = FIXED | IMAGE


@dataclass(frozen=True)
class Design:
    """A U-Net. ``strides`` per stage and axis, the first stage's too; ``kernels`` too, or one for all.

    Attributes:
        kind: "plain", "residual encoder", "residual", or "bottleneck".
        down: "conv", "avg" or "max" (plain ones only).
        up: "transposed", "nearest" or "linear".
    """

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...] | int = 3
    kind: str = "plain"
    norm: str = "BatchNorm"
    blocks: int = 1
    decoder: int = 1
    channels: int = 1
    width: int = 2
    down: str = "conv"
    up: str = "transposed"
    dropout: bool = False
    deep_supervision: bool = False
    nonlin_first: bool = False

    @property
    def ndim(self):
        return len(self.strides[0])

    @property
    def stride(self):
        return tuple(math.prod(s[axis] for s in self.strides) for axis in range(self.ndim))

    def build(self, seed=0):
        """The network, float64, in eval mode."""
        torch.manual_seed(seed)
        network = self._network()
        if self.down != "conv":
            self._pool(network)
        if self.up != "transposed":
            self._interpolate(network.decoder)
        return randomized(network)

    def _options(self):
        classes, options = NORMS[self.norm]
        return {
            "n_stages": len(self.strides),
            "features_per_stage": [self.width + 2 * (stage % 2) for stage in range(len(self.strides))],
            "conv_op": CONV[self.ndim],
            "kernel_sizes": self.kernels,
            "strides": self.strides,
            "conv_bias": True,
            "norm_op": classes[self.ndim],
            "norm_op_kwargs": options,
            "dropout_op": {2: nn.Dropout2d, 3: nn.Dropout3d}[self.ndim] if self.dropout else None,
            "dropout_op_kwargs": {"p": 0.5, "inplace": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"negative_slope": 0.2, "inplace": True},
        }

    def _network(self):
        options = self._options() | {
            "input_channels": self.channels,
            "num_classes": 2,
            "n_conv_per_stage_decoder": self.decoder,
            "deep_supervision": self.deep_supervision,
        }
        if self.kind == "plain":
            return PlainConvUNet(**options, n_conv_per_stage=self.blocks, nonlin_first=self.nonlin_first)
        bottleneck = {"block": BottleneckD, "bottleneck_channels": 2} if self.kind == "bottleneck" else {}
        kind = ResidualUNet if self.kind == "residual" else ResidualEncoderUNet
        return kind(**options, n_blocks_per_stage=self.blocks, **bottleneck)

    def _pool(self, network):
        """Another encoder in the place of the network's and its decoder's."""
        encoder = PlainConvEncoder(
            self.channels, **self._options(), n_conv_per_stage=self.blocks, return_skips=True, pool=self.down
        )
        network.encoder = network.decoder.encoder = encoder

    def _interpolate(self, decoder):
        mode = "nearest" if self.up == "nearest" else {2: "bilinear", 3: "trilinear"}[self.ndim]
        for number, old in enumerate(decoder.transpconvs):
            project = CONV[self.ndim](old.in_channels, old.out_channels, 1)
            upsample = nn.Upsample(scale_factor=tuple(float(s) for s in old.stride), mode=mode)
            decoder.transpconvs[number] = nn.Sequential(upsample, project)


def randomized(network):
    """Weights that keep the size of activations, and biases and statistics that are none of the defaults."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 2:
            fan_in = weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
                fan_in = weight.shape[0]
            weight.data.normal_(0, 1.2 / math.sqrt(fan_in))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and tensor.ndim == 1:
            drawn = torch.randn_like(tensor) * 0.3
            tensor.data.copy_(torch.rand_like(tensor) + 0.5 if "var" in name or "weight" in name else drawn)
    return network.double().eval()
