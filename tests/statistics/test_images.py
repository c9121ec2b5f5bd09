"""StagedEstimator: whole images in step, stage by stage, and the statistics are those of all of them at once."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_norm.errors import ArchitectureError, StatisticsError
from nnunet_norm.layers import convert_norm, find_norms, tracks_statistics
from nnunet_norm.stages import Scratch, ScratchOnDisk, make_schedule, scratch_folder
from nnunet_norm.stages.regions import index
from nnunet_norm.statistics import StagedEstimator, blocks_of, estimate_population_statistics

CPU = torch.device("cpu")
TRACKING = ("batch_norm", "batch_renorm", "ghost_batch_norm", "frozen_batch_norm", "instance_norm_tracked")
SHAPES = [(16, 24), (24, 8), (8, 8)]
OPS = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}


def images(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, 1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [image * (number + 0.5) + 3 * number - 2 for number, image in enumerate(drawn)]


def unet(norm="batch_norm", kind=PlainConvUNet, ndim=2):
    torch.manual_seed(0)
    conv, instance = OPS[ndim]
    network = kind(
        1,
        3,
        [3, 4, 5],
        conv,
        3,
        [1, 2, 2],
        1,
        2,
        1,
        conv_bias=True,
        norm_op=instance,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    return convert_norm(network, norm).double()


def statistics(network):
    norms = [norm for norm in find_norms(network).values() if tracks_statistics(norm)]
    return [statistic.clone() for norm in norms for statistic in (norm.running_mean, norm.running_var)]


def planned(estimator, population, edge=None):
    """Images with their schedules; small blocks where an edge is given."""
    found = []
    for image in population:
        schedule = make_schedule(estimator.graph, image.shape[2:], itemsize=8)
        if edge is not None:
            shapes = [tuple(min(edge, n) for n in schedule.extents[piece.target]) for piece in schedule.pieces]
            schedule = replace(schedule, block_shapes=tuple(shapes))
        found.append((schedule, lambda region, image=image: image[index(region)].clone()))
    return found


def by_stages(network, population, *, edge=None, scratch=None, **options):
    estimator = StagedEstimator(network)
    estimator.estimate(planned(estimator, population, edge), scratch=scratch or Scratch(), device=CPU, **options)
    return statistics(network)


def one_after_another(network, batches):
    """The other exact estimator; batches of one image each may differ in shape."""
    estimate_population_statistics(network, batches, exact=True, progress=False)
    return statistics(network)


def close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", TRACKING)
def test_images_of_one_shape_are_one_batch(norm):
    """Every norm with running statistics gets those of all images in one batch, from blocks of a few voxels."""
    population = images([(16, 24)] * 3)
    close(by_stages(unet(norm), population, edge=5), one_after_another(unet(norm), [torch.cat(population)]))


@pytest.mark.parametrize("edge", [None, 7])
@pytest.mark.parametrize(("kind", "ndim"), [(PlainConvUNet, 2), (ResidualEncoderUNet, 2), (PlainConvUNet, 3)])
def test_images_of_different_shapes_count_by_their_voxels(kind, ndim, edge):
    population = images([(*shape, 8)[:ndim] for shape in SHAPES])
    expected = one_after_another(unet(kind=kind, ndim=ndim), population)
    close(by_stages(unet(kind=kind, ndim=ndim), population, edge=edge), expected)


def test_the_first_norm_has_the_closed_form_of_all_values():
    """Mean and biased variance of what the first convolution gives, counted by voxels."""
    population, network = images(SHAPES), unet()
    by_stages(network, population)
    block = network.encoder.stages[0][0].convs[0]
    values = torch.cat([block.conv(image).detach().flatten(2) for image in population], 2)[0]
    torch.testing.assert_close(block.norm.running_mean, values.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.norm.running_var, values.var(1, correction=0), rtol=1e-12, atol=1e-12)


def test_nothing_but_the_values_of_running_statistics_changes():
    """Same tensors, same parameters, flags, counters and classes; the norms of the network are not exchanged."""
    network = unet("batch_renorm").train()
    find_norms(network)["encoder.stages.0.0.convs.0.norm"].eval()
    flags = [module.training for module in network.modules()]
    kinds = [type(module) for module in network.modules()]
    state = {name: (value.data_ptr(), value.clone()) for name, value in network.state_dict().items()}
    by_stages(network, images(SHAPES))
    assert [module.training for module in network.modules()] == flags
    assert [type(module) for module in network.modules()] == kinds
    for name, value in network.state_dict().items():
        assert value.data_ptr() == state[name][0]
        assert torch.equal(value, state[name][1]) != ("running" in name)
    assert not any(tensor.is_inference() for tensor in network.state_dict().values())


def test_weights_that_are_loaded_later_count():
    """One estimator for all folds: parameters are shared, and nothing of the fold before is left."""
    population, network = images(SHAPES), unet()
    estimator = StagedEstimator(network)
    estimator.estimate(planned(estimator, population), scratch=Scratch(), device=CPU)
    generator = torch.Generator().manual_seed(5)
    other = {
        name: torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.3
        if value.is_floating_point()
        else value
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(other)
    estimator.estimate(planned(estimator, population), scratch=Scratch(), device=CPU)
    expected = unet()
    expected.load_state_dict(other)
    close(statistics(network), one_after_another(expected, population))


class Watched(Scratch):
    """Counts the maps that are there."""

    def __init__(self):
        super().__init__()
        self.there, self.made = {}, 0

    def allocate(self, shape, dtype):
        data = super().allocate(shape, dtype)
        self.there[id(data)] = data
        self.made += 1
        return data

    def free(self, data):
        del self.there[id(data)]
        super().free(data)


@pytest.mark.parametrize("ending", ["done", "an error"])
def test_scratch_is_given_back(ending, tmp_path):
    """Every map once, in memory and on the disk, also after an error in the middle; the network is then as it was."""
    population, network = images(SHAPES), unet()
    before, watched, calls = statistics(network), Watched(), []

    def progress():
        calls.append(None)
        if ending == "an error" and len(calls) == 40:
            raise KeyError(40)

    def attempt(scratch):
        calls.clear()
        if ending == "done":
            by_stages(network, population, edge=6, scratch=scratch, progress=progress)
            return
        with pytest.raises(KeyError):
            by_stages(network, population, edge=6, scratch=scratch, progress=progress)
        assert all(torch.equal(a, b) for a, b in zip(statistics(network), before, strict=True))

    attempt(watched)
    assert watched.made >= len(population)
    assert watched.there == {}
    with scratch_folder(tmp_path) as folder:
        attempt(ScratchOnDisk(folder))
        gc.collect()
        assert list(Path(folder).iterdir()) == []


def test_progress_is_called_once_per_block():
    network, calls = unet(), []
    estimator = StagedEstimator(network)
    plan = planned(estimator, images(SHAPES), 6)
    estimator.estimate(plan, scratch=Scratch(), device=CPU, progress=lambda: calls.append(None))
    assert len(calls) == blocks_of(plan)


def test_an_empty_population_is_refused():
    network = unet()
    before = statistics(network)
    with pytest.raises(StatisticsError, match="the population is empty: give at least one image"):
        by_stages(network, [])
    assert all(torch.equal(a, b) for a, b in zip(statistics(network), before, strict=True))


def test_a_norm_that_is_not_used_keeps_its_statistics():
    population, network, expected = images(SHAPES), unet(), unet()
    network.encoder.stages[0][0].convs[0].conv.unused = nn.BatchNorm2d(7).double()
    by_stages(network, population)
    unused = find_norms(network)["encoder.stages.0.0.convs.0.conv.unused"]
    assert torch.equal(unused.running_mean, torch.zeros(7, dtype=torch.float64))
    del network.encoder.stages[0][0].convs[0].conv.unused
    close(statistics(network), one_after_another(expected, population))


@pytest.mark.parametrize("place", ["image", "weights"])
def test_values_that_are_not_finite_are_refused_and_leave_the_network_as_it_was(place):
    population, network = images(SHAPES), unet()
    estimator = StagedEstimator(network)
    if place == "image":
        population[1][0, 0, 5, 5] = torch.nan
    else:
        with torch.no_grad():
            network.decoder.stages[0].convs[0].conv.weight[0, 0, 0, 0] = torch.inf
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(StatisticsError, match=r"channels before norm '(en|de)coder.* is not finite: look for NaN"):
        estimator.estimate(planned(estimator, population), scratch=Scratch(), device=CPU)
    assert all(
        torch.equal(value.view(torch.int64), state[name].view(torch.int64))
        for name, value in network.state_dict().items()
    )


def test_networks_without_running_statistics_are_refused():
    with pytest.raises(StatisticsError, match=r"no norm with running statistics: .*convert_norm"):
        StagedEstimator(unet("instance_norm"))


def test_networks_that_cannot_be_read_are_refused():
    """With the reason, before anything is computed; the statistics of a norm that is used twice are two."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ArchitectureError, match="output and input must share a grid"):
        StagedEstimator(network)
    norm = nn.BatchNorm2d(2)
    twice = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm, nn.Conv2d(2, 2, 3, padding=1), norm)
    with pytest.raises(ArchitectureError, match="a norm is used several times"):
        StagedEstimator(twice)


def test_norms_that_take_the_statistics_of_each_image_are_refused_beside():
    """In step, they would silently get those of the whole population."""
    for norm in (nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.BatchNorm2d(2, track_running_stats=False)):
        network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), norm, nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
        with pytest.raises(
            ArchitectureError, match=rf"'1' \({type(norm).__name__}\) takes the statistics of each image"
        ):
            StagedEstimator(network)


def test_wrappers_are_taken_off():
    population, network = images(SHAPES), unet()
    close(by_stages(nn.DataParallel(network), population), one_after_another(unet(), population))
