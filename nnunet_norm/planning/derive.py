"""Plans in, new validated plans out.

What changes and where it is kept: batch size, patch size and the architecture in nnU-Net's own keys; micro-batches,
checkpointing, iterations, learning rate, seed, disparity and the schedule of BatchRenorm in the block ``"nnunet_norm"``
(:mod:`nnunet_norm.settings`). ``data_identifier`` never changes, so the preprocessed data are reused; ``plans_name`` always
does, since it names the results folder.
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import topology
from nnunet_norm.planning.batches import check_batches
from nnunet_norm.planning.configurations import (
    Configuration,
    Plans,
    cascade,
    check_configuration,
    check_norm,
    heirs,
    locate,
    require_architecture,
    resolve_configuration,
)
from nnunet_norm.planning.naming import new_name
from nnunet_norm.planning.options import NAMED_ONLY, OPTIONS, SETTINGS, asked_for
from nnunet_norm.planning.schedule import scaled_settings
from nnunet_norm.settings import BLOCK, NESTED, BatchRenormSettings, NormSettings, UnetrSettings

LOGGER = logging.getLogger(__name__)


def derive_plans(
    plans: Plans,
    configuration: str | Sequence[str],
    *,
    plans_name: str | None = None,
    batch_size: int | None = None,
    batch_dice: bool | None = None,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool | None = None,
    patch_size: Sequence[int] | None = None,
    replan_topology: bool = False,
    num_stages: int | None = None,
    base_features: int | None = None,
    features_per_stage: Sequence[int] | None = None,
    norm_op: str | None = None,
    norm_op_kwargs: Mapping[str, Any] | None = None,
    iterations_per_epoch: int | None = None,
    val_iterations_per_epoch: int | None = None,
    keep_samples: bool = False,
    initial_lr: float | None = None,
    lr_scaling: str | None = None,
    warmup_epochs: int | None = None,
    checkpoint_minutes: float | None = None,
    seed: int | None = None,
    disparity_batches: int | None = None,
    population_samples: int | None = None,
    reestimate_every: int | None = None,
    frozen_share: float | None = None,
    normalization_batch_size: int | None = None,
    domain_statistics: Sequence[str] | None = None,
    input_normalization: str | None = None,
    batch_renorm: BatchRenormSettings | Mapping[str, Any] | None = None,
    unetr: UnetrSettings | Mapping[str, Any] | None = None,
) -> Plans:
    """Derive new plans; the input is left as it is, and so is every configuration that is not named.

    Changed keys are written at the configuration itself, over what it inherits. Configurations that inherit *from* it
    follow, as they do in nnU-Net, and are validated too. Every stage of a **cascade** is derived together, whichever is
    named: the norm, the number of stages, the features and the block ``"nnunet_norm"`` go to each of them; what is bound to
    one resolution (:data:`~nnunet_norm.planning.options.NAMED_ONLY`: batch, micro-batches, checkpointing, patch, and what
    follows the batch size) changes the named one only. A stage that has fewer than ``num_stages`` keeps its own.

    Args:
        plans: as nnU-Net's planner wrote them.
        configuration: one name, or several that all get the same changes.
        plans_name: of the result; by default the old name with what was asked for, e.g.
            ``nnUNetPlans_b16_p64x160x160_s4_f8_it10_seed1``.
        batch_size: samples per optimizer step, over all GPUs.
        batch_dice: whether the Dice loss is that of the whole batch (True) or the mean over its samples (False).
        micro_batch_size: samples of one process that go through the network at once; their gradients are added up.
        activation_checkpointing: compute activations again for the gradient instead of keeping them; False turns it off.
        patch_size: voxels per axis, in the order of the plans (after nnU-Net's transposition). The strides are kept; a
            patch that they do not divide is enlarged to the next multiple of their product, with a warning. The result may
            not be below :func:`~nnunet_norm.planning.topology.smallest_patch` of the strides, after ``num_stages``: fewer
            stages allow smaller patches. With ``unetr`` it stays as it is: whole tokens are all that network asks for.
        replan_topology: recompute strides, kernels and all lists per stage as nnU-Net would for this patch.
        num_stages: keep this many of the finest stages.
        base_features: of the first stage; doubled per stage up to the plan's own cap.
        features_per_stage: one number per stage, instead of ``base_features``.
        norm_op: dotted path of a norm that is called as ``norm_op(channels, **norm_op_kwargs)``.
        norm_op_kwargs: its arguments; by default those of the plans.
        iterations_per_epoch: optimizer steps per epoch.
        val_iterations_per_epoch: validation batches per epoch.
        keep_samples: scale the iterations per epoch by old batch / new batch, so that as many samples are seen; those of
            validation too, unless they are given.
        initial_lr: learning rate at the start.
        lr_scaling: instead, scale it with the batch: ``"linear"``, ``"sqrt"`` or ``"none"``, see
            :func:`~nnunet_norm.planning.schedule.scaled_lr`.
        warmup_epochs: epochs over which the learning rate rises linearly from near 0; 0 takes a warm-up back.
        checkpoint_minutes: age of the last checkpoint after which the end of an epoch writes the next; 0 for every epoch.
        seed: of weights, sampling and augmentation.
        disparity_batches: validation batches on which train/eval disparity is measured.
        population_samples: training patches from which PreciseBN and FrozenBN re-estimate the running statistics.
        reestimate_every: epochs after which PreciseBN re-estimates them, besides the end of the training.
        frozen_share: share of the epochs that FrozenBN trains with frozen statistics, at the end.
        normalization_batch_size: samples that GhostBN normalizes together.
        domain_statistics: experimental batches of which BEN keeps running statistics each, by name.
        input_normalization: whose quantiles normalize the input: ``"image_quantile"`` or ``"tile_quantile"``.
        batch_renorm: the whole schedule, or those of its entries that change.
        unetr: all sizes of UNETR, or those that change, for trainers with ``_UNETR`` in their names.

    Raises:
        PlansError: no such configuration, nothing to change, a value out of range, a patch below the network's minimum, a
            dotted path that leads nowhere, a cascade that is not mapped both ways, or plans of the old format.
    """
    # Only the parameters are local yet; OPTIONS takes those that are changes.
    asked = asked_for({name: value for name, value in dict(locals()).items() if name in OPTIONS})
    named = list(dict.fromkeys([configuration] if isinstance(configuration, str) else configuration))
    everyone = list(dict.fromkeys(stage for name in named for stage in cascade(plans, name)))
    changes: dict[str, Configuration] = {}
    for name in everyone:
        own = asked if name in named else {key: value for key, value in asked.items() if key not in NAMED_ONLY}
        if own:
            changes[name] = _changes(resolve_configuration(plans, name), name, own, name in named)
    derived = copy.deepcopy(plans)
    for name, keys in changes.items():
        derived["configurations"][name].update(keys)
    if "patch_size" in asked:  # its name says what it became
        asked["patch_size"] = list(resolve_configuration(derived, named[0])["patch_size"])
    derived["plans_name"] = new_name(plans["plans_name"], plans_name, asked)
    following = list(dict.fromkeys(heir for name in changes for heir in heirs(derived, name) if heir not in changes))
    for name in [*changes, *following]:
        check_configuration(derived, name)
        check_batches(resolve_configuration(derived, name), name)
    if len(changes) > len(named):
        LOGGER.info("Stages of one cascade are derived together: %s", ", ".join(changes))
    if following:
        LOGGER.info("%s inherit(s) from what was changed, and follow(s)", ", ".join(following))
    return derived


def _changes(resolved: Configuration, name: str, asked: dict[str, Any], is_named: bool) -> Configuration:
    """The keys to be written at one configuration."""
    changes: Configuration = {}
    architecture = require_architecture(resolved, name)
    locate(architecture["network_class_name"], "network_class_name", name)
    changes |= {key: asked[key] for key in ("batch_size", "batch_dice") if key in asked}
    patch: list[int] = asked["patch_size"] if "patch_size" in asked else resolved["patch_size"]
    ndim = len(resolved["patch_size"])
    if len(patch) != ndim:
        raise PlansError(
            f"configuration {name}: patch size {topology.as_text(patch)} has {len(patch)} axes; this configuration has {ndim}"
        )
    if "replan_topology" in asked:
        architecture = topology.replan(architecture, resolved["spacing"], patch, name)
    if "num_stages" in asked:
        architecture = _with_stages(architecture, asked["num_stages"], name, is_named)
    if {"base_features", "features_per_stage"} & asked.keys():
        base, each = asked.get("base_features"), asked.get("features_per_stage")
        architecture = topology.with_features(architecture, ndim, name, base=base, each=each)
    if {"norm_op", "norm_op_kwargs"} & asked.keys():
        architecture = _with_norm(architecture, ndim, name, asked)
    if architecture != resolved["architecture"]:
        changes["architecture"] = architecture
    if {"patch_size", "replan_topology", "num_stages"} & asked.keys():
        unetr = "unetr" in asked or NormSettings.from_configuration(resolved).unetr is not None
        fitting = list(patch) if unetr else _fitting_patch(architecture, patch, name)
        if fitting != list(resolved["patch_size"]):
            changes["patch_size"] = fitting
    settings = {SETTINGS[key]: value for key, value in asked.items() if key in SETTINGS}
    settings |= scaled_settings(resolved, asked, name)
    if settings:
        changes[BLOCK] = _with_settings(NormSettings.from_configuration(resolved), settings).to_block()
    return changes


def _with_stages(
    architecture: topology.Architecture, num_stages: int, name: str, is_named: bool
) -> topology.Architecture:
    own = topology.kwargs_of(architecture, name)["n_stages"]
    if not is_named and own < num_stages:
        LOGGER.info("%s keeps its %d stages: it has fewer than %d", name, own, num_stages)
        return architecture
    return topology.cut(architecture, num_stages, name)


def _with_norm(
    architecture: topology.Architecture, ndim: int, name: str, asked: dict[str, Any]
) -> topology.Architecture:
    result = copy.deepcopy(architecture)
    kwargs = result["arch_kwargs"]
    if "norm_op" not in kwargs:
        raise PlansError(f"configuration {name}: {result['network_class_name']} takes no norm_op")
    kwargs.update({key: asked[key] for key in ("norm_op", "norm_op_kwargs") if key in asked})
    if "norm_op" not in result["_kw_requires_import"]:
        result["_kw_requires_import"] = [*result["_kw_requires_import"], "norm_op"]
    check_norm(result, ndim, name)
    return result


def _fitting_patch(architecture: topology.Architecture, patch: Sequence[int], name: str) -> list[int]:
    """The patch, enlarged where the strides do not divide it, with a warning.

    Raises:
        PlansError: it is below the network's minimum even then.
    """
    stride = topology.total_stride(architecture, len(patch), name)
    fitting = topology.divisible_patch(patch, stride)
    smallest = topology.smallest_patch(stride)
    if any(size < least for size, least in zip(fitting, smallest, strict=True)):
        raise PlansError(
            f"configuration {name}: patch size {topology.as_text(patch)} is below the network's minimum of "
            f"{topology.as_text(smallest)} (total stride {topology.as_text(stride)}); give a larger patch, or fewer stages "
            "with --num-stages or --replan-topology"
        )
    if fitting != tuple(patch):
        LOGGER.warning(
            "%s: patch size %s is not divisible by the total stride %s and was enlarged to %s",
            name,
            topology.as_text(patch),
            topology.as_text(stride),
            topology.as_text(fitting),
        )
    return list(fitting)


def _with_settings(settings: NormSettings, values: dict[str, Any]) -> NormSettings:
    for nested in NESTED:
        given = values.get(nested.key)
        if isinstance(given, Mapping):
            before = getattr(settings, nested.key)
            merged = nested.from_block({**(dataclasses.asdict(before) if before is not None else {}), **given})
            values = {**values, nested.key: merged}
    return dataclasses.replace(settings, **values)
