"""How much memory of a GPU a training step takes, before anything is trained.

What is in the network at once is estimated by nnU-Net's own planners: gigabytes in proportion to the feature maps of the
network and to the samples. What they do not know is counted: the network's passes are run without data, on the device
``meta``, and the storages that live at a time are followed (:mod:`nnunet_norm.living`). So the share of activation
checkpointing is that of this very network, and the whole batch's logits and loss are those of its outputs. Where the count
and what does not depend on samples (weights and their copies, CUDA's context) come to more than the estimate, they hold.
"""

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_norm.architectures import build_unetr, trains_unetr
from nnunet_norm.errors import PlansError
from nnunet_norm.layers import fit_for_steps, one_step
from nnunet_norm.layers.activation_checkpointing import checkpoint_stages
from nnunet_norm.living import Living
from nnunet_norm.planning.configurations import Configuration, Plans, require_architecture, resolve_configuration
from nnunet_norm.planning.reference import reference_of
from nnunet_norm.planning.topology import with_features
from nnunet_norm.settings import NormSettings

GIGABYTE = 2**30

WEIGHT_BYTES = 12 + 2
"""Of one weight: it, its gradient and its momentum in single precision, and autocast's copy of it in half precision."""

SECOND_MOMENT_BYTES = 4
"""Of one weight, what AdamW keeps on top of that."""

CONTEXT = 0.5
"""GiB of a GPU that CUDA's context and its libraries take before the first tensor."""

COUNTED_SAMPLES = (8, 16)
"""Samples of the passes that are counted: so many that what grows with them is at the peak. They cost nothing."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step as a function of the samples, in GiB.

    Attributes:
        fixed: whatever the number of samples.
        sample: for each sample that is in the network, counted or measured.
        waiting: for each sample of the batch, where micro-batches are smaller: image, target, logits and their gradient.
        loss: for each sample of the batch while the loss is computed from logits that are there already.
        source: where the figures are from, for people.
        planned: nnU-Net's estimate of all for each sample that is in the network; 0 where it plays no part.
    """

    fixed: float
    sample: float
    waiting: float
    loss: float
    source: str
    planned: float = 0.0

    def gigabytes(self, samples: int, at_once: int) -> float:
        """Memory for a process with ``samples`` of the batch, of which ``at_once`` are in the network."""
        if at_once >= samples:
            return self._in_network(samples)
        # The loss is computed while no activations are kept, and the gradient of its logits is kept during the rest.
        return max(self._in_network(at_once) + self.waiting * samples, self.fixed + self.loss * samples)

    def _in_network(self, samples: int) -> float:
        return max(self.planned * samples, self.fixed + self.sample * samples)

    def source_with(self, at_once: int) -> str:
        """``source``, or "counted" where the count holds because it is more than nnU-Net's estimate."""
        return "counted" if 0 < self.planned * at_once < self._in_network(at_once) else self.source


@dataclass(frozen=True)
class Network:
    """A configuration's network without data, as its trainer builds it.

    Attributes:
        resolved: the configuration.
        channels: of the input, those of a cascade's previous stage included.
        heads: channels of the logits.
        regions: whether labels are regions, each with a logit of its own, and no softmax.
        planner: ``experiment_planner_used`` of the plans.
        name: of the configuration, for messages.
        unetr: whether it is a UNETR, and not what the plans describe.
    """

    resolved: Configuration
    channels: int
    heads: int
    regions: bool
    planner: str
    name: str
    unetr: bool = False

    @classmethod
    def of(
        cls, plans: Plans, configuration: str, dataset_json: dict[str, Any], trainer: str | None = None
    ) -> "Network":
        """The network of a configuration for a dataset.

        Args:
            plans: with the configuration.
            configuration: its name.
            dataset_json: the dataset's description.
            trainer: the name of the trainer; None: what the plans are for, a UNETR if they give its sizes.
        """
        resolved = resolve_configuration(plans, configuration)
        of_plans = NormSettings.from_configuration(resolved).unetr is not None
        manager = PlansManager(copy.deepcopy(plans))
        labels = manager.get_label_manager(dataset_json)
        return cls(
            resolved,
            determine_num_input_channels(manager, configuration, dataset_json),
            labels.num_segmentation_heads,
            labels.has_regions,
            plans.get("experiment_planner_used", ""),
            configuration,
            of_plans if trainer is None else trains_unetr(trainer),
        )

    @property
    def patch(self) -> tuple[int, ...]:
        """Voxels per axis."""
        return tuple(self.resolved["patch_size"])

    @property
    def base_features(self) -> int | None:
        """Features of the first stage; None where they are not described stage by stage."""
        if self.unetr:
            return None
        features = self.resolved["architecture"]["arch_kwargs"].get("features_per_stage")
        return features[0] if isinstance(features, list | tuple) else features

    def with_base_features(self, base: int) -> "Network":
        """The same with other features, as ``derive_plans(base_features=...)`` would make them."""
        architecture = require_architecture(self.resolved, self.name)
        changed = with_features(architecture, len(self.patch), self.name, base=base)
        return Network(
            self.resolved | {"architecture": changed}, self.channels, self.heads, self.regions, self.planner, self.name
        )

    def build(self, device: torch.device, *, deep_supervision: bool, checkpointed: bool = False) -> nn.Module:
        """The network on a device, in train mode; on ``meta`` it has no weights.

        Raises:
            ArchitectureError: it has no stages that could be checkpointed.
        """
        with device:
            network = self._unetr() if self.unetr else self._of_plans(deep_supervision=deep_supervision)
        if checkpointed:
            checkpoint_stages(network)
            fit_for_steps(network)
        return network

    def _unetr(self) -> nn.Module:
        return build_unetr(self.resolved, self.channels, self.heads, where=f"configuration {self.name}")

    def _of_plans(self, *, deep_supervision: bool) -> nn.Module:
        architecture = require_architecture(self.resolved, self.name)
        network: nn.Module = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            self.channels,
            self.heads,
            allow_init=False,
            # nnU-Net's planners leave this to the network; its trainers ask for it.
            deep_supervision=True if deep_supervision else None,
        )
        return network

    def weights(self) -> int:
        """How many there are."""
        module = self.build(torch.device("meta"), deep_supervision=True)
        return sum(parameter.numel() for parameter in module.parameters())

    def feature_map_size(self) -> float:
        """Of one sample, as nnU-Net's planners count it.

        Raises:
            PlansError: the network cannot tell.
        """
        network = self.build(torch.device("meta"), deep_supervision=False)
        count = getattr(network, "compute_conv_feature_map_size", None)
        if not callable(count):
            raise PlansError(
                f"configuration {self.name}: memory cannot be estimated, {type(network).__name__} has no "
                "compute_conv_feature_map_size"
            )
        return float(count(self.patch))


def estimated_memory(network: Network, *, checkpointed: bool = False) -> StepMemory:
    """The memory of a step by nnU-Net's estimate and what is counted on top of it.

    Args:
        network: see :meth:`Network.of`.
        checkpointed: whether activations are computed again instead of kept.

    Raises:
        PlansError: the network does not tell its feature maps, or does not run without data.
        ArchitectureError: the network has no stages that could be checkpointed.
    """
    planned, source = _planned(network)
    shapes = _output_shapes(network)
    counted = _bytes_of_a_sample(network, checkpointed=checkpointed)
    if checkpointed:
        planned *= counted / _bytes_of_a_sample(network, checkpointed=False)
        source += ", checkpointing counted" if planned else ""
    waiting, loss = _bytes_without_network(shapes, network.regions)
    # nnU-Net's loader hands over images in single precision.
    image = math.prod(network.patch) * network.channels * torch.float32.itemsize
    return StepMemory(
        network.weights() * (WEIGHT_BYTES + (SECOND_MOMENT_BYTES if network.unetr else 0)) / GIGABYTE + CONTEXT,
        counted / GIGABYTE,
        (image + waiting) / GIGABYTE,
        (image + loss) / GIGABYTE,
        source,
        planned,
    )


def _planned(network: Network) -> tuple[float, str]:
    """nnU-Net's estimate for each sample in the network, and what the figures rest on; it has none for a UNETR."""
    if network.unetr:
        return 0.0, "counted"
    reference = reference_of(
        network.planner, network.resolved["architecture"]["network_class_name"], len(network.patch)
    )
    return reference.estimate(network.feature_map_size()), "nnU-Net's estimate"


def as_outputs(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a network with or without deep supervision, finest first."""
    return [output] if isinstance(output, Tensor) else list(output)


def default_loss(outputs: Sequence[Tensor], regions: bool) -> Tensor:
    """nnU-Net's default loss of outputs (N, C, *spatial) for targets of background, summed over the outputs.

    Autocast computes losses in single precision.
    """
    dice = {"batch_dice": True, "do_bg": regions, "smooth": 1e-5, "ddp": False}
    compound = (
        DC_and_BCE_loss({}, dice, use_ignore_label=False, dice_class=MemoryEfficientSoftDiceLoss)
        if regions
        else DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    )
    targets = _empty_targets(outputs, regions)
    losses = [compound(output.float(), target) for output, target in zip(outputs, targets, strict=True)]
    return torch.stack(losses).sum()


def _empty_targets(outputs: Sequence[Tensor], regions: bool) -> list[Tensor]:
    """Targets of background for outputs (N, C, *spatial), as nnU-Net's loader shapes them."""
    return [
        torch.zeros(
            (len(output), output.shape[1] if regions else 1, *output.shape[2:]), dtype=torch.int16, device=output.device
        )
        for output in outputs
    ]


def _bytes_of_a_sample(network: Network, *, checkpointed: bool) -> float:
    """By how much the peak of a pass grows with each sample: the gradients of weights, which do not grow, drop out."""
    few, many = COUNTED_SAMPLES
    peaks = [_peak_of_a_pass(network, samples, checkpointed=checkpointed) for samples in (few, many)]
    return (peaks[1] - peaks[0]) / (many - few)


def _peak_of_a_pass(network: Network, samples: int, *, checkpointed: bool) -> int:
    """Most bytes that live in a pass in half precision with its loss and gradients."""
    module = network.build(torch.device("meta"), deep_supervision=True, checkpointed=checkpointed).to(torch.float16)
    with running_without_data(network), one_step(module), Living() as living:
        image = torch.empty((samples, network.channels, *network.patch), dtype=torch.float16, device="meta")
        default_loss(as_outputs(module(image)), network.regions).backward()
    return living.peak


def _output_shapes(network: Network) -> tuple[tuple[int, ...], ...]:
    """Of one sample, (C, *spatial), finest first.

    Raises:
        PlansError: the network cannot be run without data.
    """
    module = network.build(torch.device("meta"), deep_supervision=True).eval()
    with running_without_data(network), torch.no_grad():
        outputs = as_outputs(module(torch.empty((1, network.channels, *network.patch), device="meta")))
    return tuple(tuple(output.shape[1:]) for output in outputs)


@contextmanager
def running_without_data(network: Network) -> Iterator[None]:
    """Inside, a network that does not run on the device ``meta`` is refused as one that cannot be estimated."""
    try:
        yield
    except RuntimeError as error:
        kind = require_architecture(network.resolved, network.name)["network_class_name"].rsplit(".", 1)[-1]
        raise PlansError(
            f"configuration {network.name}: memory cannot be estimated, {kind} does not run without data: "
            f"{' '.join(str(error).split())}"
        ) from error


@functools.cache
def _bytes_without_network(shapes: tuple[tuple[int, ...], ...], regions: bool) -> tuple[int, int]:
    """Of one sample: targets, logits and their gradient; and most bytes while the loss is computed from logits."""
    with Living() as living:
        leaves = [torch.empty((1, *shape), dtype=torch.float16, device="meta").requires_grad_() for shape in shapes]
        default_loss(leaves, regions).backward()
    logits = sum(leaf.nelement() * leaf.itemsize for leaf in leaves)
    targets = sum(target.nelement() * target.itemsize for target in _empty_targets(leaves, regions))
    return targets + 2 * logits, living.peak
