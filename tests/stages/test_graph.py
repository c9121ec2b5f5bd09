"""What is read from a network, whatever it is: its operators, in eval mode, with its own weights."""

import pytest
import torch
from other_networks import D2, Forward, with_encoder
from stage_networks import Design, randomized
from torch import nn
from torch.nn import functional
from whole_pass import by_stages, difference, difference_of, one_pass, padded_image

from nnunet_norm.errors import ArchitectureError
from nnunet_norm.receptive_field import trace
from nnunet_norm.stages import make_schedule, read_network, read_verified
from nnunet_norm.stages.operators import ImageNorm


def pooled_before(network, x):
    small = network.pool(x)
    large = network.relu(x)
    return large + functional.interpolate(small, scale_factor=2.0, mode="nearest")


def summed(network, x):
    y = functional.leaky_relu(x, 0.5)
    y += x
    return network.relu(y)


@pytest.mark.parametrize("between", [pooled_before, summed])
def test_a_change_in_place_that_nobody_sees_is_exact(between):
    """A map may be changed in place by the last one that reads it."""
    network = randomized(Forward(between))
    assert difference_of(network, (29, 31), edge=7) < 1e-12


@pytest.mark.parametrize("pool_type", ["conv", "avg", "max"])
def test_stochastic_depth_is_inert(pool_type):
    """In eval mode no path is dropped: the result is that of one pass."""
    network = with_encoder(stochastic_depth_p=0.5, pool_type=pool_type)
    network.train()
    graph = read_network(network)
    assert network.encoder.stages[0].training
    assert difference_of(network.eval(), (33, 38), graph=graph, edge=7) < 1e-9


def test_only_the_first_output_is_computed():
    """Of deep supervision's outputs the first, at full resolution, is meant; the others cost nothing."""
    with_all, with_one = (read_network(Design(D2, deep_supervision=deep).build()) for deep in (True, False))
    names = [[node.name for node in graph.nodes] for graph in (with_all, with_one)]
    assert names[0] == names[1]
    assert names[0][-1] == "decoder.seg_layers.1"


@pytest.mark.parametrize("between", [None, lambda n, x: x * x], ids=["known", "refused"])
def test_reading_leaves_every_training_flag(between):
    """Each module has its own flag back, also when the network is refused."""
    network = Forward(between or (lambda n, x: n.relu(x)))
    network.train()
    network.first.eval()
    before = [module.training for module in network.modules()]
    if between is None:
        read_network(network)
    else:
        with pytest.raises(ArchitectureError):
            read_network(network)
    assert [module.training for module in network.modules()] == before


@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_weights_are_not_copied(norm):
    """Weights and statistics that change after the network was read change the result, as they do the network's."""
    network = Design(D2, norm=norm, kind="residual encoder").build()
    graph = read_network(network)
    image = padded_image(graph, (24, 20))
    schedule = make_schedule(graph, image.shape[2:], itemsize=8)
    before = by_stages(schedule, image)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    after = one_pass(network, image)
    assert difference(before, after) > 1e-2
    assert difference(by_stages(schedule, image), after) < 1e-9


def test_a_module_that_is_called_twice_has_statistics_for_each_call():
    """One norm in two places: one set of weights, two maps, two pairs of moments."""
    norm = nn.InstanceNorm2d(2, affine=True)
    network = randomized(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm, nn.Conv2d(2, 2, 3, padding=1), norm))
    graph = read_verified(network, trace(network))
    assert len(graph.norms) == 2
    assert len({id(norm.module) for norm in graph.norms.values()}) == 1
    assert all(isinstance(norm, ImageNorm) for norm in graph.norms.values())
    assert difference_of(network, (20, 17), graph=graph, edge=6) < 1e-9


def test_wrappers_are_taken_off():
    """A compiled or distributed network is read as the module inside."""
    network = Design(D2).build()
    assert difference_of(network, (13, 18), graph=read_network(torch.compile(network))) < 1e-12
    assert difference_of(network, (13, 18), graph=read_network(nn.DataParallel(network))) < 1e-12


def test_a_shape_that_the_network_cannot_take_is_refused():
    """Extents that are no multiple of the total stride leave maps that do not fit together."""
    graph = read_network(Design(D2).build())
    assert graph.extents((8, 12))[-1] == (8, 12)
    with pytest.raises(ArchitectureError, match="cannot take an image of 8x14 voxels"):
        graph.extents((8, 14))
    valid = read_network(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(ArchitectureError, match=r"extents \(6, 6\) for an image of \(8, 8\)"):
        valid.extents((8, 8))


def test_an_architecture_that_nobody_prepared():
    """MONAI's U-Nets, residual and plain, are known because their operators are; what fx misreads is refused."""
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    torch.manual_seed(0)
    for network in (
        nets.UNet(2, 1, 2, (2, 4, 4), (2, 2), num_res_units=2),
        nets.UNet(3, 1, 2, (2, 4), (2,), norm="batch"),
        nets.SegResNet(2, init_filters=8, in_channels=1),
    ):
        randomized(network)
        graph = read_verified(network, trace(network))
        assert difference_of(network, (37, 29, 11)[: graph.ndim], graph=graph, edge=7) < 1e-9
    network = nets.BasicUNet(2, 1, 2, features=(2, 2, 4, 4, 4, 2)).eval()  # asks whether its skip is a Tensor
    with pytest.raises(ArchitectureError, match="takes 6 channels and is given 2"):
        read_network(network)
