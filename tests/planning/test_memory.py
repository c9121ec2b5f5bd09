"""Memory of a step: nnU-Net's own estimate, what is counted on top of it, measured figures, and what would fit."""

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from monai.networks.nets import UNETR

from nnunet_norm.errors import ArchitectureError, PlansError
from nnunet_norm.living import Living
from nnunet_norm.planning import derive_plans
from nnunet_norm.planning.calibration import measured_memory
from nnunet_norm.planning.fitting import Training, check_fits
from nnunet_norm.planning.memory import GIGABYTE, Network, StepMemory, default_loss, estimated_memory
from nnunet_norm.planning.reference import Reference, reference_of

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
LABELS = {"background": 0, "a": 1, "b": 2}
DATASET = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
REGIONS = DATASET | {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
SMALL = {"patch_size": [32, 32, 32], "replan_topology": True, "base_features": 4}


def stock(name: str = "nnUNetPlans") -> dict:
    return json.loads((STOCK / f"{name}.json").read_text())


def network(configuration: str = "3d_fullres", dataset: dict = DATASET, **options) -> Network:
    plans = derive_plans(stock(), configuration, **options) if options else stock()
    return Network.of(plans, configuration, dataset)


@pytest.fixture(scope="module")
def fullres() -> dict[bool, StepMemory]:
    """Of stock 3d_fullres, without and with activation checkpointing."""
    return {checkpointed: estimated_memory(network(), checkpointed=checkpointed) for checkpointed in (False, True)}


def test_the_estimate_is_the_one_by_which_nnunet_chose_the_batch(fullres: dict[bool, StepMemory]) -> None:
    """Enforces nnU-Net's proportion, plain and residual: so many samples fill the 8 GB that its planners aim at."""
    assert round(8 / fullres[False].planned) == network().resolved["batch_size"] == 2
    for plans in ("nnUNetPlans", "nnUNetResEncUNetMPlans"):
        chosen = Network.of(stock(plans), "2d", DATASET)
        reference = reference_of(chosen.planner, chosen.resolved["architecture"]["network_class_name"], 2)
        assert round(8 / reference.estimate(chosen.feature_map_size())) == chosen.resolved["batch_size"] == 12


def test_references_are_those_of_nnunets_planners() -> None:
    """Enforces a reference for each planner of nnU-Net, by its name, or by the network where the planner is unknown."""
    residual = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    plain = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    assert reference_of("ExperimentPlanner", plain, 3) == Reference(560000000, 2, 8)
    assert reference_of("nnUNetPlannerResEncL", residual, 2) == Reference(380000000, 12, 24)
    assert reference_of("nnUNetPlannerResEncXL", residual, 3) == Reference(3600000000, 2, 40)
    assert reference_of("MyPlanner", residual, 3) == reference_of("ResEncUNetPlanner", residual, 3)
    assert reference_of("MyPlanner", "my.UNet", 2) == reference_of("ExperimentPlanner", plain, 2)
    # A planner of nnU-Net whose network was exchanged says nothing about the other one.
    assert reference_of("nnUNetPlannerResEncL", plain, 3) == Reference(560000000, 2, 8)


def test_micro_batches_take_one_part_and_the_whole_batchs_logits() -> None:
    """Enforces the two moments that can be the largest: the loss of the whole batch, and the gradient of one part."""
    memory = StepMemory(fixed=0.5, sample=4.0, waiting=0.1, loss=0.75, source="")
    assert memory.gigabytes(8, 8) == memory.gigabytes(8, 100) == 32.5
    assert memory.gigabytes(8, 2) == pytest.approx(0.5 + 8 + 0.8)
    assert memory.gigabytes(8, 1) == 6.5


def test_weights_their_copies_and_the_context_are_in_the_figure(fullres: dict[bool, StepMemory]) -> None:
    """Enforces the larger of nnU-Net's estimate and the count with what is there without samples, with the word for it."""
    chosen = network()
    weights = sum(weight.numel() for weight in chosen.build(torch.device("cpu"), deep_supervision=True).parameters())
    plain, again = fullres[False], fullres[True]
    assert plain.fixed == again.fixed == pytest.approx(14 * weights / GIGABYTE + 0.5)
    assert plain.gigabytes(2, 2) == 2 * plain.planned > plain.fixed + 2 * plain.sample
    assert (plain.source_with(2), plain.source_with(8)) == ("nnU-Net's estimate",) * 2
    assert again.planned == pytest.approx(plain.planned * again.sample / plain.sample)
    assert again.gigabytes(1, 1) == max(again.planned, again.fixed + again.sample)
    small = estimated_memory(network(**SMALL))
    assert small.gigabytes(1, 1) == small.fixed + small.sample > 0.5 > small.planned
    assert small.source_with(1) == "counted"
    both = StepMemory(fixed=1.0, sample=1.0, waiting=0.1, loss=2.0, source="", planned=2.0)
    assert [both.gigabytes(samples, samples) for samples in (1, 2, 3)] == [2.0, 4.0, 6.0]
    assert (both.gigabytes(4, 3), both.gigabytes(4, 1)) == (pytest.approx(9.0), 9.0)


def test_checkpointing_is_counted_on_this_network(fullres: dict[bool, StepMemory]) -> None:
    """Enforces the share of what lives without data, which is that of the same network with data."""
    assert fullres[True].sample < 0.7 * fullres[False].sample
    assert (fullres[True].waiting, fullres[True].loss) == (fullres[False].waiting, fullres[False].loss)
    small = network(**SMALL)
    plain, again = (estimated_memory(small, checkpointed=checkpointed).sample for checkpointed in (False, True))
    peaks = {
        (checkpointed, samples): _peak_with_data(small, samples, checkpointed)
        for checkpointed in (False, True)
        for samples in (1, 2)
    }
    share = (peaks[True, 2] - peaks[True, 1]) / (peaks[False, 2] - peaks[False, 1])
    assert again / plain == pytest.approx(share, rel=0.1)


def _peak_with_data(small: Network, samples: int, checkpointed: bool) -> int:
    module = small.build(torch.device("cpu"), deep_supervision=True, checkpointed=checkpointed)
    with Living() as living:
        outputs = module(torch.randn(samples, 1, *small.patch))
        default_loss(outputs, regions=False).backward()
    return living.peak


@pytest.mark.parametrize("norm", ["nnunet_norm.layers.BatchRenorm3d", "torch.nn.BatchNorm3d"])
def test_norms_of_the_plans_are_counted_with_checkpointing(norm: str) -> None:
    """Enforces that norms with running statistics, ours and torch's, can be run again without data."""
    assert estimated_memory(network(**SMALL, norm_op=norm), checkpointed=True).sample > 0


def test_what_waits_is_counted_by_hand() -> None:
    """Enforces the bytes of image, targets, logits and their gradient over all outputs, for labels and for regions."""
    for dataset, heads, targets in ((DATASET, 3, 1), (REGIONS, 2, 2)):
        small = network(dataset=dataset, **SMALL)
        module = small.build(torch.device("cpu"), deep_supervision=True)
        with torch.no_grad():
            voxels = sum(output[0, 0].numel() for output in module(torch.randn(1, 1, *small.patch)))
        expected = 4 * 32**3 + voxels * (2 * targets + 2 * 2 * heads)
        memory = estimated_memory(small)
        assert (small.heads, small.regions) == (heads, dataset is REGIONS)
        assert memory.waiting * GIGABYTE == pytest.approx(expected)
        # At least the logits, their copy in single precision and the probabilities live while the loss is computed.
        assert memory.loss * GIGABYTE > 4 * 32**3 + voxels * heads * (2 + 4 + 4)


def test_a_cascades_second_stage_has_the_first_ones_labels_as_channels() -> None:
    """Enforces the channels that nnU-Net's trainer builds the network with."""
    assert network("3d_cascade_fullres").channels == 1 + 2


def test_the_default_loss_is_nnunets() -> None:
    """Enforces that what is measured is Dice, -1 at its best, and cross-entropy, 0 at its best."""
    right = torch.zeros(2, 3, 4, 4, 4)
    right[:, 0] = 100
    assert default_loss([right], regions=False).item() == pytest.approx(-1)
    assert default_loss([-right], regions=False).item() > 90


def test_a_network_that_cannot_tell_is_refused() -> None:
    """Enforces one line for a network without nnU-Net's count of feature maps."""
    small = network(**SMALL)
    other = mock.patch.object(Network, "build", return_value=torch.nn.Conv3d(1, 3, 1))
    with (
        other,
        pytest.raises(PlansError, match="3d_fullres: memory cannot be estimated, Conv3d has no compute_conv_fea"),
    ):
        estimated_memory(small)


def test_a_gpu_is_measured_with_real_steps(caplog: pytest.LogCaptureFixture) -> None:
    """Enforces real steps with one and two samples, the line through them, and the estimate where too little is free."""
    small = network(**SMALL)
    estimate = StepMemory(fixed=0.0, sample=1.0, waiting=0.1, loss=0.2, source="nnU-Net's estimate", planned=1.5)
    seen: list[int] = []
    build = Network.build

    def spied(self: Network, *args, **kwargs) -> torch.nn.Module:
        module = build(self, *args, **kwargs)
        module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        return module

    with (
        mock.patch.object(torch.cuda, "mem_get_info", side_effect=[(24 * GIGABYTE,) * 2] * 2 + [(GIGABYTE,) * 2]),
        mock.patch.object(torch.cuda, "empty_cache"),
        mock.patch.object(torch.cuda, "reset_peak_memory_stats"),
        mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"),
        mock.patch.object(torch.cuda, "max_memory_allocated", side_effect=[3 * GIGABYTE, 5 * GIGABYTE] * 2),
        mock.patch.object(Network, "build", spied),
    ):
        for checkpointed in (False, True):
            measured = measured_memory(small, estimate, torch.device("cpu"), checkpointed=checkpointed)
            assert measured == StepMemory(fixed=1.5, sample=2.0, waiting=0.1, loss=0.2, source="measured on a GPU")
        assert set(seen) == {1, 2}
        assert measured_memory(small, estimate, torch.device("cpu")) == estimate
    assert "3d_fullres: memory is not measured: a GPU has too little free for steps of 2 samples" in caplog.text


def test_what_would_fit_is_found_and_fits() -> None:
    """Enforces that each choice of the refusal, derived as its flags say, fits, and that nothing larger would."""
    options = SMALL | {"batch_size": 64, "base_features": 16}
    training = Training(network(**options), 64)
    limit = training.gigabytes / 2
    with pytest.raises(PlansError) as refusal:
        check_fits(training, limit)
    line = str(refusal.value)
    assert line.startswith("configuration 3d_fullres: patch 32x32x32 with 64 samples at once takes ")
    assert f" {training.gigabytes:.1f} GB per GPU (nnU-Net's estimate), --vram is {limit:g}; what fits: " in line
    choices = {choice.flags: choice.gigabytes for choice in training.choices(limit)}
    assert [flags.split()[0] for flags in choices] == [
        "--micro-batch-size",
        "--activation-checkpointing",
        "--base-features",
    ]
    assert all(f"{flags} ({gigabytes:.1f} GB)" in line for flags, gigabytes in choices.items())
    for flags, gigabytes in choices.items():
        words = flags.split()
        more = {"activation_checkpointing": True} if words[0] == "--activation-checkpointing" else {}
        more |= {word[2:].replace("-", "_"): int(size) for word, size in itertools.pairwise(words) if size.isdecimal()}
        fitting = Training(network(**(options | more)), 64)
        assert fitting.gigabytes == pytest.approx(gigabytes)
        check_fits(fitting, limit)
    micro = int(next(iter(choices)).split()[1])
    assert training.memory().gigabytes(64, micro + 1) > limit
    assert not list(training.choices(0.001))
    with pytest.raises(PlansError, match=r"--vram is 0\.001; give a smaller --patch-size$"):
        check_fits(training, 0.001)


def test_more_gpus_are_advised_only_where_a_sample_fits_one_and_changes_are_joined_last() -> None:
    """Enforces fewer features with the smallest micro-batches where neither alone fits, and advice that would help."""
    training = Training(network(**SMALL | {"batch_size": 2, "base_features": 8}), 2)
    smaller = Training(network(**SMALL | {"batch_size": 2, "base_features": 4, "micro_batch_size": 1}), 2).gigabytes
    (joined,) = training.choices(smaller + 1e-5)
    assert joined.flags == "--micro-batch-size 1 --base-features 4"
    assert joined.gigabytes == pytest.approx(smaller)
    (joined,) = training.choices(smaller - 1e-5)
    assert joined.flags == "--activation-checkpointing --micro-batch-size 1 --base-features 4"
    # With the least of all in the network, only what waits of the batch is left, which more GPUs share.
    least = {"micro_batch_size": 1, "activation_checkpointing": True, "base_features": 4}
    training = Training(network(**SMALL | least | {"batch_size": 512}), 512)
    with pytest.raises(PlansError, match=r"give a smaller --patch-size, or more --num-gpus$"):
        check_fits(training, training.memory().gigabytes(1, 1))


def test_groups_stay_whole_and_networks_without_stages_are_not_checkpointed() -> None:
    """Enforces micro-batches of whole groups of GhostBN, and no choice that the trainer would refuse."""
    training = Training(network(**SMALL, batch_size=9, normalization_batch_size=3), 9)
    limit = training.memory().gigabytes(9, 8)
    assert next(training.choices(limit)).flags == "--micro-batch-size 6"
    with mock.patch("nnunet_norm.planning.memory.checkpoint_stages", side_effect=ArchitectureError("no stages")):
        training = Training(training.network, 9)
        assert not [choice for choice in training.choices(limit) if "checkpointing" in choice.flags]
    options = SMALL | {"base_features": None, "features_per_stage": [16] * 4}
    flags = [choice.flags.split()[0] for choice in Training(network(**options, batch_size=8), 8).choices(limit / 2)]
    assert "--base-features" not in flags  # which would contradict the features of each stage


def test_a_running_error_of_the_network_is_one_line() -> None:
    """Enforces that a network that does not run without data is refused with its reason."""
    small = network(**SMALL)
    failing = mock.patch("torch.nn.Conv3d.forward", side_effect=RuntimeError("needs\ndata"))
    with (
        failing,
        pytest.raises(PlansError, match=r"3d_fullres: memory cannot be estimated, .* without data: needs data"),
    ):
        estimated_memory(small)


def test_the_memory_of_a_unetr_is_counted_on_its_own_network() -> None:
    """Enforces MONAI's number of weights that are used, with AdamW's state, and no estimate that nnU-Net made for a U-Net."""
    sizes = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 96, "num_heads": 3}
    made = network(**SMALL, unetr=sizes)
    monais = UNETR(1, 3, (32, 32, 32), norm_name=("instance", {"affine": True}), **sizes).named_parameters()
    weights = sum(p.numel() for name, p in monais if "cross_attn" not in name)
    memory = estimated_memory(made)
    assert made.weights() == weights
    assert memory.fixed == pytest.approx((12 + 2 + 4) * weights / GIGABYTE + 0.5)
    assert (memory.planned, memory.source) == (0, "counted")
    assert memory.sample > 0
    assert estimated_memory(made, checkpointed=True).sample < memory.sample
    assert made.base_features is None


def test_a_trainers_name_says_which_network_is_counted() -> None:
    """Enforces that plans serve both networks: UNETR with _UNETR, also where they give no sizes, and else the U-Net."""
    sized = derive_plans(stock(), "3d_fullres", **SMALL, unetr={"feature_size": 4})
    plain = derive_plans(stock(), "3d_fullres", **SMALL)
    told = {
        (name, trainer): Network.of(plans, "3d_fullres", DATASET, trainer).unetr
        for name, plans in (("sized", sized), ("plain", plain))
        for trainer in (None, "nnUNetTrainerBRN_DiceTopK", "nnUNetTrainerBRN_UNETR_DiceTopK")
    }
    assert [key for key, is_unetr in told.items() if is_unetr] == [
        ("sized", None),
        ("sized", "nnUNetTrainerBRN_UNETR_DiceTopK"),
        ("plain", "nnUNetTrainerBRN_UNETR_DiceTopK"),
    ]
