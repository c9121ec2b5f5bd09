"""convert_norm: every norm once, aliases and Parameter objects kept."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_norm.errors import LayerError
from nnunet_norm.layers import (
    NORMS,
    BatchRenorm3d,
    FrozenBatchNorm,
    GroupNorm,
    convert_norm,
    find_norms,
    replace_modules,
    tracks_statistics,
)

OPS = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}


def unet(ndim=3, residual=False):
    conv, norm = OPS[ndim]
    kwargs = {"kernel_sizes": 3, "strides": [1, 2, 2], "num_classes": 3, "n_conv_per_stage_decoder": [1, 1]}
    kwargs |= {"conv_bias": True, "norm_op": norm, "norm_op_kwargs": {"eps": 1e-3, "affine": True}}
    kwargs |= {"nonlin": nn.LeakyReLU, "deep_supervision": True}
    if residual:
        return ResidualEncoderUNet(1, 3, [4, 8, 16], conv, n_blocks_per_stage=[1, 2, 1], **kwargs)
    return PlainConvUNet(1, 3, [4, 8, 16], conv, n_conv_per_stage=[2, 1, 1], **kwargs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("norm", list(NORMS))
def test_every_norm_of_a_real_network_is_exchanged_and_it_runs(norm, ndim, residual):
    network = unet(ndim, residual)
    count = len(find_norms(network))
    assert convert_norm(network, norm) is network
    new = find_norms(network)
    assert len(new) == (0 if norm == "none" else count)
    assert {type(m) for m in new.values()} <= {NORMS[norm][ndim]}
    assert all(m.eps == 1e-3 for m in new.values())
    outputs = network.train()(torch.randn(2, 1, *[16] * ndim))
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("residual", [False, True])
def test_names_and_aliases_of_the_state_dict_are_batch_norms(residual):
    expected = unet(residual=residual)
    for parent in list(expected.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.InstanceNorm3d):
                parent._modules[name] = nn.BatchNorm3d(child.num_features)
    network = convert_norm(unet(residual=residual), "batch_renorm")
    assert set(network.state_dict()) == set(expected.state_dict())
    block = network.decoder.stages[0].convs[0]
    assert block.norm is block.all_modules[1]
    assert network.decoder.encoder is network.encoder


def test_affine_parameters_stay_the_same_objects_so_an_optimizer_keeps_them():
    network = unet()
    before = {id(p) for p in network.parameters()}
    convert_norm(network, "batch_renorm")
    assert {id(p) for p in network.parameters()} == before


def test_running_statistics_stay_the_same_tensors():
    network = convert_norm(unet(), "batch_norm")
    network(torch.randn(2, 1, 16, 16, 16))
    before = {name: (b.data_ptr(), b.clone()) for name, b in network.named_buffers()}
    convert_norm(network, "batch_renorm")
    assert {name: b.data_ptr() for name, b in network.named_buffers()} == {n: p for n, (p, _) in before.items()}
    assert all(torch.equal(b, before[name][1]) for name, b in network.named_buffers())


def test_back_and_forth_gives_the_same_function():
    torch.manual_seed(0)
    network = convert_norm(unet(), "batch_norm")
    network(torch.randn(2, 1, 16, 16, 16))
    x = torch.randn(1, 1, 16, 16, 16)
    expected = network.eval()(x)[0]
    convert_norm(network, "batch_renorm")
    assert torch.equal(network(x)[0], expected)
    assert torch.equal(convert_norm(network, "batch_norm")(x)[0], expected)


def test_a_norm_in_several_places_is_one_norm_afterwards():
    shared = nn.BatchNorm2d(4)
    network = nn.Sequential(shared, nn.Conv2d(4, 4, 1), nn.Sequential(shared))
    convert_norm(network, "group_norm")
    assert network[0] is network[2][0]
    assert len(find_norms(network)) == 1


def test_a_norm_itself_is_returned_exchanged():
    assert isinstance(convert_norm(nn.BatchNorm3d(4), "batch_renorm"), BatchRenorm3d)


def test_affine_off_dtype_and_mode_are_taken_over():
    old = nn.BatchNorm2d(4, affine=False).double().eval()
    new = convert_norm(nn.Sequential(old), "batch_renorm")[0]
    assert new.weight is None
    assert new.running_mean.dtype == torch.double
    assert not new.training


def test_group_norm_finds_its_number_of_axes_from_the_convolutions():
    network = nn.Sequential(nn.Conv3d(1, 32, 3), GroupNorm(32))
    assert isinstance(convert_norm(network, "batch_renorm")[1], BatchRenorm3d)


def test_group_norm_without_convolutions_around_is_refused_and_nothing_is_changed():
    network = nn.Sequential(nn.BatchNorm2d(4), GroupNorm(4))
    with pytest.raises(LayerError, match=r"norm '1' \(GroupNorm\) cannot be told"):
        convert_norm(network, "batch_renorm")
    assert isinstance(network[0], nn.BatchNorm2d)


def test_arguments_reach_the_constructor():
    layer = convert_norm(nn.BatchNorm3d(4), "batch_renorm", r_max=2.0, momentum=0.2)
    assert (layer.r_max, layer.momentum) == (2.0, 0.2)


def test_a_callable_makes_the_norm():
    network = convert_norm(unet(), lambda channels, eps, affine: nn.GroupNorm(1, channels, eps, affine))
    assert {m.num_groups for m in find_norms(network).values()} == {1}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(LayerError, match=r"norm='batchnorm': choose from batch_renorm, batch_norm"):
        convert_norm(unet(), "batchnorm")


def test_a_norm_that_does_not_exist_in_this_rank_is_refused():
    with pytest.raises(LayerError, match=r"norm='batch_renorm' exists for \[2, 3\] spatial axes, and '0' has 1"):
        convert_norm(nn.Sequential(nn.BatchNorm1d(3)), "batch_renorm")


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")  # torch says so once per process
def test_a_lazy_norm_is_refused():
    network = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(LayerError, match="'0' is a LazyBatchNorm2d without a number of channels"):
        convert_norm(network, "batch_renorm")


def test_layer_norm_is_left_alone():
    network = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(4))
    convert_norm(network, "none")
    assert [type(m) for m in network] == [nn.LayerNorm, nn.Identity]


def test_a_norm_without_tensors_of_its_own_takes_device_and_dtype_from_its_network():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4)).double()
    convert_norm(network, "batch_norm")
    assert network(torch.randn(2, 1, 3, 3, dtype=torch.double)).dtype == torch.double
    on_meta = convert_norm(nn.Sequential(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4)).to("meta"), "batch_renorm")
    assert on_meta[1].running_mean.device.type == "meta"


def test_a_norm_without_shift_stays_without():
    old = nn.BatchNorm2d(3)
    old.register_parameter("bias", None)
    network = convert_norm(nn.Sequential(old), "batch_renorm", warmup_steps=0, ramp_steps=0)
    assert list(network.state_dict()) == ["0.weight", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    network(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert network[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["batch_renorm", "ghost_batch_norm", "frozen_batch_norm"])
def test_between_norms_with_running_statistics_tensors_stay_and_eval_mode_is_the_same(norm):
    """There and back again: the same parameters, the same buffers, the same function."""
    torch.manual_seed(0)
    network = convert_norm(unet(2), "batch_norm")
    network(torch.randn(2, 1, 16, 16) * 3 + 1)
    x = torch.randn(1, 1, 16, 16)
    expected = network.eval()(x)[0]
    pointers = {name: value.data_ptr() for name, value in network.state_dict().items()}
    for name in (norm, "batch_norm", norm):
        convert_norm(network, name)
        assert {type(module) for module in find_norms(network).values()} == {NORMS[name][2]}
        assert {name: value.data_ptr() for name, value in network.state_dict().items()} == pointers
        torch.testing.assert_close(network(x)[0], expected, rtol=0, atol=0)


def test_arguments_of_the_new_norms_reach_them():
    assert convert_norm(nn.BatchNorm2d(4), "ghost_batch_norm", normalization_batch_size=3).normalization_batch_size == 3
    assert convert_norm(nn.BatchNorm3d(4), "batch_renorm", sync="full").sync == "full"
    with pytest.raises(LayerError, match=r"sync='all': choose from running, full, none"):
        convert_norm(nn.BatchNorm3d(4), "batch_renorm", sync="all")


def test_frozen_batch_norm_exists_for_one_axis_too():
    network = nn.Sequential(nn.BatchNorm1d(3))
    assert isinstance(convert_norm(network, "frozen_batch_norm")[0], FrozenBatchNorm)
    with pytest.raises(LayerError, match=r"norm='ghost_batch_norm' exists for \[2, 3\] spatial axes, and '0' has 1"):
        convert_norm(nn.Sequential(nn.BatchNorm1d(3)), "ghost_batch_norm")


def test_only_chosen_norms_are_exchanged():
    network = nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    convert_norm(network, "frozen_batch_norm", only=tracks_statistics)
    assert [type(norm) for norm in network] == [nn.InstanceNorm2d, FrozenBatchNorm, nn.BatchNorm2d]


def test_modules_are_replaced_under_every_name():
    """Also what is no norm; None where a child was taken out is left alone."""
    shared, new = nn.ReLU(), nn.Identity()
    network = nn.Sequential(shared, nn.Sequential(nn.Conv2d(1, 1, 1), shared))
    network.register_module("gone", None)
    assert replace_modules(network, {shared: new}) is network
    assert network[0] is network[1][1] is new
    assert replace_modules(shared, {shared: new}) is new
