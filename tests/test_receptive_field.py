import math
from functools import partial

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.layers import BatchRenorm2d
from nnunet_norm.receptive_field import effective, theoretical, trace


def unet(
    kind=PlainConvUNet, *, conv=nn.Conv2d, stages=3, features=2, kernels=3, strides=None, norm=nn.BatchNorm2d, **options
):
    """A small U-Net of dynamic_network_architectures with one input channel and two classes."""
    blocks = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"
    decoder = {ResidualUNet: 1, ResidualEncoderUNet: 1}.get(kind, 2)
    return kind(
        input_channels=1,
        n_stages=stages,
        features_per_stage=features,
        conv_op=conv,
        kernel_sizes=kernels,
        strides=strides or [1] + [2] * (stages - 1),
        num_classes=2,
        n_conv_per_stage_decoder=options.pop("decoder", decoder),
        norm_op=norm,
        norm_op_kwargs={},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **{blocks: options.pop("blocks", 2 if kind is PlainConvUNet else 1)},
        **options,
    )


class PooledUNet(nn.Module):
    """A plain U-Net that pools instead of striding."""

    def __init__(self, pool):
        super().__init__()
        self.encoder = PlainConvEncoder(
            1, 3, 2, nn.Conv2d, 3, [1, 2, 2], 1, nonlin=nn.LeakyReLU, return_skips=True, pool=pool
        )
        self.decoder = UNetDecoder(self.encoder, 2, 1, False)

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Interpolating(nn.Module):
    """Down by a convolution and an average, up by interpolation, with dilation, padding modes and a joined skip."""

    def __init__(self, mode):
        super().__init__()
        self.down = nn.Conv2d(1, 2, 5, stride=2, padding=2, padding_mode="reflect")
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)
        self.dilated = nn.Conv2d(2, 2, 3, padding=4, dilation=4, groups=2)
        self.up = nn.Upsample(scale_factor=4, mode=mode)
        self.out = nn.Conv2d(3, 1, (1, 3), padding="same")

    def forward(self, x):
        return self.out(torch.cat([x, self.up(self.dilated(self.pool(self.down(x))))], dim=1))


def transposed(kernel, padding, output_padding):
    """Stride 3 down, and up by a transposed convolution whose windows overlap."""
    up = nn.ConvTranspose2d(2, 1, kernel, stride=3, padding=padding, output_padding=output_padding)
    return nn.Sequential(nn.Conv2d(1, 2, 4, stride=3, padding=1), nn.Conv2d(2, 2, 3, padding=1), up)


class ChannelsLast(nn.Module):
    """Permutes to put a LayerNorm over the channels, slices and splits channels, crops what it padded."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=2)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)[:, :, 1:-1, 1:-1]
        a, b = y.softmax(1).chunk(2, dim=1)
        return self.last(a * b.mean(1, keepdim=True).expand(-1, 2, -1, -1).contiguous())


class Shifted(nn.Module):
    """Shifts the image by one voxel and convolves: the last voxel of a tile is needed though its value is not read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (1, 0, 1, 0))[:, :, :-1, :-1])


def positive(network):
    """Weights in (0, 1] in float64: no contributions cancel, so that the gradient shows every dependence."""
    network = network.double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                module.weight.uniform_(0.5, 1).div_(module.weight[0].numel())
                if module.bias is not None:
                    module.bias.zero_()
    return network


def probed(network, stride, length, *, inputs=1):
    """(aligned, any voxel) reach per axis from the non-zero gradient of one output voxel of every phase."""
    start = [length // 2 // s * s for s in stride]
    before, after = [[] for _ in stride], [[] for _ in stride]
    for _ in range(inputs):
        x = torch.rand((1, 1, *[length] * len(stride)), dtype=torch.float64, requires_grad=True)
        y = network(x)
        y = y[0] if isinstance(y, list) else y
        for k in range(max(stride)):
            voxel = [a + k % s for a, s in zip(start, stride, strict=True)]
            (gradient,) = torch.autograd.grad(y[(0, 0, *voxel)], x, retain_graph=True)
            seen = gradient[0, 0].abs() > 0
            for axis, v in enumerate(voxel):
                (places,) = torch.nonzero(seen.transpose(0, axis).flatten(1).any(1), as_tuple=True)
                assert 0 < places.min() <= places.max() < length - 1
                before[axis].append((v - places.min().item(), v - start[axis]))
                after[axis].append((places.max().item() - v, v - start[axis]))
    any_voxel = tuple((max(b for b, _ in bs), max(a for a, _ in az)) for bs, az in zip(before, after, strict=True))
    aligned = tuple(
        (max(b - p for b, p in bs), max(a - (s - 1 - p) for a, p in az))
        for bs, az, s in zip(before, after, stride, strict=True)
    )
    return aligned, any_voxel


@pytest.mark.parametrize(
    ("stages", "any_voxel", "aligned"),
    [(3, (20, 17), (19, 16)), (4, (44, 37), (39, 32)), (5, (92, 77), (79, 64)), (6, (188, 157), (159, 128))],
)
def test_reach_of_the_standard_unet_is_the_published_one(stages, any_voxel, aligned):
    """3-wide kernels, two convolutions per stage, stride 2: the figures found by brute force."""
    field = trace(unet(stages=stages))
    assert field.stride == (2 ** (stages - 1),) * 2
    assert field.any_voxel == (any_voxel,) * 2
    assert field.aligned == (aligned,) * 2
    assert field.tile_statistics == ()
    assert field.unbounded is None


NETWORKS = {
    "plain": (partial(unet), 64),
    "supervised": (partial(unet, stages=2, deep_supervision=True), 40),
    "5-wide, stride 3": (partial(unet, stages=2, kernels=5, strides=[1, 3], blocks=1, decoder=1), 48),
    "input strided": (partial(unet, stages=2, strides=[1, 2], kernels=[[7, 3], [3, 5]]), 48),
    "residual encoder": (partial(unet, ResidualEncoderUNet, blocks=[1, 2, 1]), 96),
    "residual": (partial(unet, ResidualUNet), 96),
    "anisotropic": (
        partial(
            unet,
            conv=nn.Conv3d,
            norm=nn.BatchNorm3d,
            features=1,
            kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            strides=[[1, 1, 1], [1, 2, 2], [2, 2, 1]],
            blocks=1,
            decoder=1,
        ),
        36,
    ),
    "average pooling": (partial(PooledUNet, "avg"), 48),
    "nearest": (partial(Interpolating, "nearest"), 96),
    "bilinear": (partial(Interpolating, "bilinear"), 96),
    "transposed 3": (partial(transposed, 3, 0, 0), 48),
    "transposed 5": (partial(transposed, 5, 1, 0), 48),
    "transposed 4": (partial(transposed, 4, 1, 1), 48),
    "channels last": (ChannelsLast, 24),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_reach_is_that_of_the_gradient(name):
    """The traced reach is the extent of the gradient of a network in which nothing cancels, to the voxel."""
    torch.manual_seed(0)
    build, length = NETWORKS[name]
    network = positive(build())
    field = trace(network)
    length -= length % math.lcm(*field.stride)
    assert (field.aligned, field.any_voxel) == probed(network, field.stride, length)


def test_reach_through_max_pooling_is_that_of_many_gradients():
    """A maximum passes the gradient to one of its voxels; over many inputs every one has its turn."""
    torch.manual_seed(0)
    network = positive(PooledUNet("max"))
    field = trace(network)
    assert (field.aligned, field.any_voxel) == probed(network, field.stride, 40, inputs=8)


def test_voxels_that_a_tile_lacks_count_as_read():
    """A shifted image: position T of the whole image reads voxel T - 1 alone, but a tile of T voxels lacks it."""
    assert trace(Shifted()).any_voxel == ((2, 1), (2, 1))  # the gradient alone would say 2 and 0


def test_total_stride_is_the_least_common_multiple():
    """Strides 3 and 2 on different paths repeat every 6 voxels, and odd strides find an extent that fits."""

    class TwoPaths(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = nn.Sequential(nn.Conv2d(1, 1, 2, 2), nn.ConvTranspose2d(1, 1, 2, 2))
            self.three = nn.Sequential(nn.Conv2d(1, 1, 3, 3), nn.ConvTranspose2d(1, 1, 3, 3))

        def forward(self, x):
            return self.two(x) + self.three(x)

    field = trace(TwoPaths())
    assert field.stride == (6, 6)
    assert field.any_voxel == ((2, 2), (2, 2))
    assert field.aligned == ((0, 0), (0, 0))


def test_a_reach_beyond_the_first_extent_is_found():
    """The axis grows until the middle does not notice its ends."""
    network = nn.Sequential(*[nn.Conv2d(1, 1, 3, dilation=d, padding=d) for d in (900, 800, 1)])
    assert trace(network).any_voxel == ((1701, 1701),) * 2


@pytest.mark.parametrize(
    ("norm", "depends"),
    [
        (nn.InstanceNorm2d, True),
        (partial(nn.InstanceNorm2d, track_running_stats=True), False),
        (nn.BatchNorm2d, False),
        (partial(nn.BatchNorm2d, track_running_stats=False), True),
        (partial(nn.GroupNorm, 1), True),
    ],
)
def test_layers_with_statistics_of_the_tile_are_named(norm, depends):
    """Norms without stored statistics are listed in order of execution; the reach is that of the convolutions."""
    field = trace(unet(stages=2, norm=lambda channels: norm(channels)))
    expected = ["encoder.stages.0.0.convs.0.norm", "encoder.stages.0.0.convs.1.norm", "encoder.stages.1.0.convs.0.norm"]
    assert list(field.tile_statistics[:3]) == (expected if depends else [])
    assert len(field.tile_statistics) == (6 if depends else 0)
    assert field.any_voxel == trace(unet(stages=2)).any_voxel


class Head(nn.Module):
    """A convolution and an operation after it."""

    def __init__(self, operation):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.operation = operation

    def forward(self, x):
        return self.operation(self.conv(x))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return x * self.fc(nn.functional.adaptive_avg_pool2d(x, 1)).sigmoid()


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("operation", "description"),
    [
        (Gate(), r"operation \(Gate: mean\)"),
        (Lambda(lambda x: x.flip(2)), r"operation \(Lambda: flip\)"),
        (Lambda(lambda x: x.roll(1, 3)), r"operation \(Lambda: roll\)"),
        (Lambda(lambda x: x.softmax(3)), r"operation \(Lambda: _softmax\)"),
        (Lambda(lambda x: x - x.amax()), r"operation \(Lambda: amax\)|operation \(Lambda: max\)"),
        (Lambda(lambda x: x.view(1, 1, -1).cumsum(1).view_as(x)), r"operation \(Lambda: view\)"),
        (Lambda(lambda x: torch.cat([x, x], 2)[:, :, ::2]), r"operation \(Lambda: cat\)"),
        (Lambda(lambda x: nn.functional.conv2d(x, x[:, :, :1, :1])), r"operation \(Lambda: convolution\)"),
        (
            nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
            r"operation \(Conv2d: copy_ into a part of a tensor\)",
        ),
        (
            nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
            r"operation\.1 \(Upsample: upsample_bilinear2d\)",
        ),
    ],
)
def test_unbounded_reach_names_layer_and_operator(operation, description):
    """Whatever reads the whole image, or is not known, is named and has no exact halo."""
    with pytest.raises(ArchitectureError, match=f"reach of Head is not bounded, because of (?:{description})"):
        theoretical(Head(operation))


def test_what_does_not_lead_to_the_output_does_not_count():
    """A global head beside the segmentation leaves the segmentation's reach alone."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return y, y.mean((2, 3))

    assert theoretical(TwoHeads()) == ((1, 1), (1, 1))


def test_operations_in_place_reach_every_view():
    """A channel written through a slice is part of the whole tensor."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(1, 1, 5, padding=2), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            y = self.narrow(x)
            y[:, :1] += self.wide(x)
            return y

    assert theoretical(InPlace()) == ((2, 2), (2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    """The reach does not depend on the precision of the weights."""
    assert trace(unet().to(dtype)) == trace(unet())


def test_wrappers_are_taken_off():
    """torch.compile's and DataParallel's wrappers do not show in the result."""
    network = unet(norm=nn.InstanceNorm2d)
    assert trace(torch.compile(network)) == trace(nn.DataParallel(network)) == trace(network)


def test_the_network_is_left_as_it_was():
    """Training flags, weights, buffers, gradients, hooks and the random state survive, also when the trace fails."""
    network = unet(stages=2, dropout_op=nn.Dropout2d, dropout_op_kwargs={"p": 0.5})
    network.encoder.eval()
    network.encoder.stages[0][0].convs[0].norm.train()
    flags = [m.training for m in network.modules()]
    state = {k: v.clone() for k, v in network.state_dict().items()}
    random = torch.get_rng_state()
    trace(network)
    with pytest.raises(ArchitectureError, match=r"PlainConvUNet cannot be run on an input of \(1, 5, 2048, 2048\)"):
        trace(network, input_channels=5)
    assert [m.training for m in network.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_batch_renorm_has_fixed_statistics():
    """This package's own norm is traced as it runs in eval mode, also when the network is in training."""
    network = unet(norm=BatchRenorm2d).train()
    assert trace(network) == trace(unet())
    assert all(module.training for module in network.modules())


def test_trace_inside_inference_mode():
    """A predictor may ask inside torch.inference_mode."""
    with torch.inference_mode():
        assert trace(unet()).any_voxel == ((20, 17),) * 2


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.Conv2d(1, 1, 3), {}, r"Conv2d turns an extent of \(2048, 2048\) into \(2046, 2046\)"),
        (nn.Conv2d(1, 1, 2, stride=2), {}, r"Conv2d turns an extent of \(2048, 2048\) into \(1024, 1024\)"),
        (
            Lambda(lambda x: x + torch.zeros(1, 1, 1, 64)),
            {"input_channels": 1, "ndim": 2},
            r"Lambda cannot be run on an input of \(1, 1, 2048, 2048\): .*64",
        ),
        (nn.ReLU(), {}, "ReLU has no convolution to tell its input by: give input_channels and ndim"),
        (Lambda(lambda x: torch.zeros(x.shape)), {"input_channels": 1, "ndim": 2}, "output of Lambda does not depend"),
        (Lambda(lambda x: {"logits": x}), {"input_channels": 1, "ndim": 2}, "the network returns dict"),
        (nn.Conv2d(1, 1, 3, padding=90000, dilation=90000), {}, "of Conv2d exceeds 65536 voxels"),
    ],
)
def test_what_cannot_be_traced_is_refused(network, options, message, capfd):
    """Every refusal names the network and what is wrong, and torch adds nothing on stderr."""
    with pytest.raises(ArchitectureError, match=message):
        trace(network, **options)
    assert capfd.readouterr().err == ""


def smoothing(kernels, repeats):
    """Repeated convolutions with one fixed separable kernel, in float64."""
    weight = torch.outer(*(torch.tensor(k, dtype=torch.float64) for k in kernels))[None, None]
    layers = [nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64) for _ in range(repeats)]
    for layer in layers:
        layer.weight.data = (weight / weight.sum()).clone()
    return nn.Sequential(*layers)


def test_effective_field_of_repeated_smoothing():
    """n passes of (1, 2, 1) and (1, 1, 1) have variances n/2 and 2n/3; their gradient is a Gaussian to a per cent."""
    n = 9
    halo = effective(smoothing([(1.0, 2.0, 1.0), (1.0, 1.0, 1.0)], n), torch.rand(2, 1, 48, 64))
    assert halo == tuple((math.ceil(3 * sigma),) * 2 for sigma in (math.sqrt(n / 2), math.sqrt(2 * n / 3)))


def test_effective_field_that_is_off_centre():
    """n passes of (0, 1, 1) have mean n/2 and variance n/4: the interval is 3 sigma around that mean."""
    n = 18
    before, after = effective(smoothing([(0.0, 1.0, 1.0), (0.0, 1.0, 0.0)], n), torch.rand(1, 1, 64, 64))
    assert before == (0, math.ceil(3 * math.sqrt(n / 4) + n / 2))
    assert after == (0, 0)


def test_effective_field_is_averaged_over_phases():
    """Pooling and repeating by 4 adds a variance of (16 - 1) / 6 over all phases; one alone would be off centre."""
    n = 16
    pooled = nn.Sequential(nn.AvgPool2d((4, 1)), nn.Upsample(scale_factor=(4, 1)))
    along, across = effective(
        nn.Sequential(smoothing([(1.0, 2.0, 1.0)] * 2, n), pooled), torch.rand(1, 1, 64, 64, dtype=torch.float64)
    )
    assert along == (math.ceil(3 * math.sqrt(n / 2 + 15 / 6)),) * 2
    assert across == (math.ceil(3 * math.sqrt(n / 2)),) * 2


def test_effective_field_where_classes_cancel():
    """Logits that sum to zero, as a softmax allows, still show their gradient."""
    network = smoothing([(1.0, 2.0, 1.0), (1.0, 2.0, 1.0)], 9)
    head = nn.Conv2d(1, 2, 1, bias=False, dtype=torch.float64)
    head.weight.data = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)
    tiles = torch.rand(1, 1, 48, 48)
    assert effective(nn.Sequential(*network, head), tiles) == effective(network, tiles)


def test_effective_leaves_the_network_as_it_was():
    """No gradient is accumulated, and no flag, buffer or input changes, inside no_grad too."""
    network = unet(stages=2, norm=nn.BatchNorm2d)
    frozen = next(network.parameters()).requires_grad_(False)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    tiles = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        first = effective(network, tiles)
    with torch.inference_mode():
        assert effective(network, tiles) == first
    assert all(m.training for m in network.modules())
    assert not frozen.requires_grad
    assert all(p.grad is None for p in network.parameters())
    assert not tiles.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("weight", "value", "message"),
    [
        (0.0, 1.0, r"gradient of Sequential vanishes in the middle of all 1 inputs of \(8, 8\)"),
        (float("nan"), 1.0, r"gradient of Sequential is not finite for an input of \(8, 8\)"),
    ],
)
def test_effective_refuses_a_gradient_that_says_nothing(weight, value, message):
    """A gradient that is zero or not finite has no extent."""
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    nn.init.constant_(network[0].weight, weight)
    with pytest.raises(ArchitectureError, match=message):
        effective(network, torch.full((1, 1, 8, 8), value))
