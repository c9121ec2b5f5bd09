import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nnunet_norm.diagnosis import describe_fields, draw_gradient_map, receptive_fields
from nnunet_norm.diagnosis.gradient_figure import caption, frames_of, logarithm
from nnunet_norm.pages import as_png
from nnunet_norm.receptive_field import effective, measure_effective


class GlobalContext(nn.Module):
    """A convolution, and what the whole image has in common."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        y = self.conv(x)
        return y + self.pool(y)


class OnePlace(nn.Module):
    """Takes images of one extent only, as a position embedding has it, and attends to all of it."""

    def __init__(self, extent):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.place = nn.Parameter(torch.randn(1, extent * extent, 4))
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        y = self.conv(x)
        tokens = y.flatten(2).mT + self.place
        return y + self.attention(tokens, tokens, tokens)[0].mT.reshape(y.shape)


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def test_the_map_is_the_mean_absolute_gradient():
    """Of a convolution: its kernel, mirrored, weighted as the output is."""
    weight = torch.rand(1, 1, 3, 5)
    conv = nn.Conv2d(1, 1, (3, 5), padding=(1, 2), bias=False)
    conv.weight.data.copy_(weight)
    field = measure_effective(conv, torch.rand(2, 1, 15, 17))
    y, x = field.origin
    part = field.gradient[y - 1 : y + 2, x - 2 : x + 3]
    expected = weight[0, 0].double().numpy()
    np.testing.assert_allclose(part / part.sum(), expected / expected.sum(), rtol=1e-5)
    assert np.count_nonzero(field.gradient) == 15
    assert field.num_gradients == 2


def test_the_map_is_averaged_over_phases():
    """All output voxels of one stride have the same offsets in the map, and the same halo as ``effective``."""
    net = network(nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 2, 2, 2))
    tiles = torch.rand(2, 1, 24, 24)
    field = measure_effective(net, tiles)
    assert field.num_gradients == 4
    assert field.halo == effective(net, tiles)
    assert all(n == 23 for n in field.gradient.shape)  # offsets that both phases see


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (GlobalContext(), "unbounded, because of pool (AdaptiveAvgPool2d: mean)"),
        (OnePlace(16), "unbounded, because of attention (MultiheadAttention: "),
    ],
)
def test_global_layers_are_named_and_the_effective_field_is_there(net, words):
    """Also of a network that takes one extent only."""
    torch.manual_seed(1)
    fields = receptive_fields(net.eval(), torch.randn(2, 1, 16, 16))
    lines = "\n".join(describe_fields(fields.as_dict()))
    assert words in lines
    assert fields.effective is not None
    assert "effective receptive field (3 sigma): x " in lines


def test_norms_that_see_the_tile_are_counted():
    """By their classes, with the first of them by its name."""
    net = network(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.GroupNorm(2, 4), nn.Conv3d(4, 2, 1))
    fields = receptive_fields(net, torch.randn(1, 1, 8, 8, 8))
    assert fields.tile_norms == {"InstanceNorm3d": 1, "GroupNorm": 1}
    lines = describe_fields(fields.as_dict())
    assert lines[-1].endswith("statistics of the tile: 1 x InstanceNorm3d, 1 x GroupNorm (the first: 1)")
    assert "theoretical receptive field, of any voxel: x 1/1, y 1/1, z 1/1 voxels before/after" in lines
    assert "total stride: x 1, y 1, z 1" in lines


def test_a_network_without_gradient_is_told_in_one_line():
    """The theoretical field stays, and says why there is no effective one."""
    net = network(nn.Conv2d(1, 2, 3, padding=1))
    with torch.no_grad():
        net[0].weight.zero_()
    fields = receptive_fields(net, torch.randn(1, 1, 8, 8))
    assert fields.effective is None
    assert "effective receptive field: not measured: the gradient of Sequential vanishes" in "\n".join(
        describe_fields(fields.as_dict())
    )


MONAI = {
    "UNet": (lambda n: n.UNet(2, 1, 3, (4, 8), (2,)), "theoretical receptive field, of any voxel: x 4/4"),
    "SegResNet": (
        lambda n: n.SegResNet(2, 8, 1, 3, blocks_down=(1, 1), blocks_up=(1,)),
        "theoretical receptive field, of any voxel: x ",
    ),
    "AttentionUnet": (
        lambda n: n.AttentionUnet(2, 1, 3, (4, 8), (2,)),
        "theoretical receptive field, of any voxel: x ",
    ),
    "SwinUNETR": (
        lambda n: n.SwinUNETR(1, 3, depths=(1, 1, 1, 1), feature_size=12, spatial_dims=2),
        "unbounded, because of swinViT.layers1.0.blocks.0.attn (WindowAttention: ",
    ),
    "UNETR": (
        lambda n: n.UNETR(1, 3, (32, 32), 4, 24, 48, 2, spatial_dims=2),
        "unbounded, because of vit.blocks.0.attn (SABlock: ",
    ),
}


@pytest.mark.parametrize("name", MONAI)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_networks_of_monai(name):
    """Convolutional ones have a reach; where attention sees everything, its layer is named; all have an effective one."""
    nets = pytest.importorskip("monai.networks.nets")
    build, words = MONAI[name]
    torch.manual_seed(0)
    extent = 64 if name == "SwinUNETR" else 32
    fields = receptive_fields(build(nets).eval(), torch.randn(1, 1, extent, extent))
    assert words in "\n".join(describe_fields(fields.as_dict()))
    assert fields.effective is not None


def test_the_logarithm_ends_where_colours_do():
    """Largest value at the top, zeros at the bottom, at most six decades apart."""
    values, bottom, top = logarithm(np.array([[100.0, 1.0], [1e-9, 0.0]]))
    assert (bottom, top) == (-4.0, 2.0)
    np.testing.assert_allclose(values, [[2, 0], [-4, -4]])
    assert logarithm(np.ones((2, 2)))[1:] == (-1.0, 0.0)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_figure_shows_every_plane_with_its_boxes(axes):
    """One panel per plane, the boxes at their reach from the output voxel, labelled axes, the logarithm of the map."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    fields = receptive_fields(
        network(conv(1, 2, 3, padding=1), conv(2, 2, 3, padding=1)), torch.rand(1, 1, *[16] * axes)
    )
    figure = draw_gradient_map(fields, (16,) * axes, "net")
    panels = figure.axes[:-1]
    assert len(panels) == {1: 1, 2: 1, 3: 3}[axes]
    for panel in panels:
        assert panel.get_xlabel().endswith(": voxels from the output voxel")
        theoretical = panel.patches[1]
        assert (theoretical.get_x(), theoretical.get_width()) == (-2.5, 5)
    assert figure.axes[-1].get_ylabel() == "log10 of the mean |d output / d input|"
    assert Image.open(io.BytesIO(as_png(figure))).size[0] > 500


def test_the_caption_stands_alone():
    """It says what is drawn, how it was measured, and what the boxes leave out."""
    net = network(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 31, padding=15))
    fields = receptive_fields(net, torch.rand(1, 1, 8, 8))
    text = caption(fields, (8, 8), "my net")
    assert "How far one output voxel of my net" in text
    assert "InstanceNorm2d normalizes with the statistics of the whole tile" in text
    assert "Larger than the picture, in part or wholly: theoretical receptive field" in text
    assert [frame.name for frame in frames_of(receptive_fields(GlobalContext(), torch.rand(1, 1, 8, 8)), (8, 8))] == [
        "patch around the voxel",
        "effective receptive field (3 sigma)",
    ]
