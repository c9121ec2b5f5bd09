"""Networks that are no U-Net: a convolution before and one after what a test is about, and an encoder with options."""

import torch
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from stage_networks import Design, randomized
from torch import nn

D2 = ((1, 1), (2, 2), (2, 2))


class Forward(nn.Module):
    """A network of a convolution before and one after what a test is about."""

    def __init__(self, between, channels=2):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.between = between
        self.last = nn.Conv2d(channels, 2, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.reflecting = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout2d()
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, 1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


def with_encoder(**options):
    """A residual encoder with options that the U-Net does not hand on."""
    network = Design(D2, kind="residual encoder", norm="InstanceNorm").build()
    encoder = ResidualEncoder(
        1,
        3,
        [2, 4, 2],
        nn.Conv2d,
        3,
        D2,
        2,
        True,
        nn.InstanceNorm2d,
        {"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
        **options,
    )
    network.encoder = network.decoder.encoder = encoder
    return randomized(network)
