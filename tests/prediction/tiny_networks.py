"""Small networks with random weights and statistics, predictors around them without a trained model, and the reference."""

import itertools
from types import SimpleNamespace

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.nn import functional

from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.receptive_field import trace
from nnunet_norm.tiling import padded_shape

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
NO_NORM = {2: None, 3: None}


def unet(strides, *, norm=BATCH_NORM, residual=False, channels=1, classes=2, convs=1, seed=0):
    """A U-Net with two features; ``strides`` per stage and axis, the first stage's too."""
    torch.manual_seed(seed)
    ndim, stages = len(strides[0]), len(strides)
    kind = ResidualEncoderUNet if residual else PlainConvUNet
    blocks = {"n_blocks_per_stage" if residual else "n_conv_per_stage": convs}
    network = kind(
        input_channels=channels,
        n_stages=stages,
        features_per_stage=[2] * stages,
        conv_op=CONV[ndim],
        kernel_sizes=3,
        strides=strides,
        num_classes=classes,
        n_conv_per_stage_decoder=[convs] * (stages - 1),
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


class UnknownToStages(nn.Module):
    """The addition of a constant has a reach (none), and no rule for blocks; with global pooling the reach is unbounded."""

    def __init__(self, norm=nn.BatchNorm2d, *, pooled=False):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = norm(2, affine=True)
        self.second = nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1) if pooled else None

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x))) + 0.5
        return self.second(x if self.pool is None else x + self.pool(x))


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
    made.list_of_parameters = [made.bare_network.state_dict()]
    return made


def whole(network, image, mirror_axes=()):
    """The reference: one pass (per flip) over the image zero-padded at its far end to a multiple of the stride."""
    field = trace(network)
    ndim = len(field.stride)
    if image.ndim == ndim + 2:
        return torch.stack([whole(network, plane, mirror_axes) for plane in image.unbind(1)], 1)
    extents = image.shape[1:]
    padding = [p - n for n, p in zip(extents, padded_shape(extents, field.stride), strict=True)]
    padded = functional.pad(image, [width for p in reversed(padding) for width in (0, p)])[None]
    axes = [axis + 2 for axis in mirror_axes]
    flips = [flip for count in range(len(axes) + 1) for flip in itertools.combinations(axes, count)]
    with torch.no_grad():
        mean = sum(network(padded.flip(flip)).flip(flip) for flip in flips) / len(flips)
    return mean[(0, slice(None), *(slice(0, n) for n in extents))]


def noise(*shape, seed=0, dtype=torch.float64):
    """An image of noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def without_the_voxel_before(apply):
    """``Convolution.apply`` with a halo that is one voxel too small: zeros before every block that is inside the map."""

    def spoiled(self, inputs, place):
        (x,) = inputs
        for axis, (start, _) in enumerate(place.given[0]):
            if start > 0 and self.kernel[axis] > 1:
                x = x.clone()
                x.select(axis + 2, 0).zero_()
        return apply(self, [x], place)

    return spoiled
