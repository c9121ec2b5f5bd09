"""The block ``"nnunet_norm"`` of a configuration: what a training needs and stock plans cannot hold.

nnU-Net keeps unknown keys of a configuration and ignores them, so the block travels with the plans into every results
folder. All entries are optional; one that is absent leaves nnU-Net's own value, or this package's default, as it is::

    "3d_fullres": {
        ...,
        "nnunet_norm": {
            "num_iterations_per_epoch": 100,
            "seed": 1,
            "batch_renorm": {"r_max": 2.0}
        }
    }
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Self

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import INPUT_NORMALIZATIONS, SYNC

BLOCK = "nnunet_norm"
"""The key of the block in a configuration."""

LARGEST_SEED = 2**32 - 1
"""NumPy's legacy generator, which nnU-Net's augmentation uses, takes 32 bits."""


SLOWEST_MOMENTUM, FASTEST_MOMENTUM = 0.01, 0.1
"""Bounds of BatchRenorm's momentum where none is set: Ioffe's 0.01 (2017, section 4.2), and the default of torch."""

CHECKPOINT_MINUTES = 10
"""Age of the last checkpoint, in minutes, after which the end of an epoch writes the next; nnU-Net counts 50 epochs."""

AVERAGES_PER_TRAINING = 60
"""A training is at least so many times as long as what its running statistics average over."""


_COUNTS = (
    *("num_iterations_per_epoch", "num_val_iterations_per_epoch", "disparity_batches"),
    *("population_samples", "reestimate_every", "normalization_batch_size"),
    "micro_batch_size",
)


def _refuse(key: str, value: object, wanted: str) -> PlansError:
    return PlansError(f"plans: {BLOCK}.{key} is {value!r}; it must be {wanted}")


def _require_integer(key: str, value: object, smallest: int, largest: int | None = None) -> None:
    """Refuse whatever is no whole number of the range (True is an int in Python, and a mistake here)."""
    wanted = f"a whole number of at least {smallest}" + ("" if largest is None else f" and at most {largest}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(key, value, wanted)
    if value < smallest or (largest is not None and value > largest):
        raise _refuse(key, value, wanted)


def _require_number(key: str, value: object, wanted: str) -> float:
    """The value as a finite float, or a refusal."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refuse(key, value, wanted)
    return float(value)


def _names(key: str, value: object) -> tuple[str, ...]:
    """Different names, in the order in which they are given."""
    wanted = "a list of different names"
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        raise _refuse(key, value, wanted)
    if len(set(value)) < len(value):
        raise _refuse(key, value, wanted)
    return tuple(value)


def _require_known(prefix: str, block: Mapping[str, Any], known: list[str]) -> None:
    for key in block:
        if key not in known:
            raise PlansError(f"plans: {prefix}.{key} is not a setting; valid ones are {', '.join(known)}")


def _require_mapping(key: str, block: object) -> None:
    if not isinstance(block, Mapping):
        raise PlansError(f"plans: {key} is {block!r}; it must be an object of settings")


@dataclass(frozen=True, kw_only=True)
class _NestedSettings:
    """Settings that are an entry of the block themselves, under ``key``."""

    key: ClassVar[str]

    @classmethod
    def from_block(cls, block: Mapping[str, Any]) -> Self:
        """Read the entry; what is absent has its default.

        Raises:
            PlansError: a key that is no setting, or a value of the wrong type or out of range.
        """
        _require_mapping(f"{BLOCK}.{cls.key}", block)
        _require_known(f"{BLOCK}.{cls.key}", block, [item.name for item in fields(cls)])
        return cls(**block)

    def to_block(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {
            item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default
        }


@dataclass(frozen=True, kw_only=True)
class BatchRenormSettings(_NestedSettings):
    """How the limits of BatchRenorm open during a training.

    Training begins as plain BatchNorm (r_max = 1, d_max = 0) for the share ``warmup`` of all planned iterations; over the
    share ``ramp`` after it the limits grow gradually to ``r_max`` and ``d_max``, and stay there.

    Attributes:
        momentum: weight of the newest batch in the running statistics, in (0, 1]; None: by the length of the training, see
            ``momentum_over``.
        r_max: final limit of the ratio of standard deviations, at least 1.
        d_max: final limit of the shift in standard deviations, at least 0.
        warmup: share of all planned iterations with plain BatchNorm.
        ramp: share of all planned iterations over which the limits grow; warmup + ramp is at most 1.
        sync: what processes of one training share, see ``nnunet_norm.layers.BatchRenorm2d``: "running", "full" or "none".

    Raises:
        PlansError: a value of the wrong type or out of range.

    References:
        Ioffe 2017, arXiv:1702.03275, section 4.1, for the end points 3 and 5 and the gradual growth.
    """

    key: ClassVar[str] = "batch_renorm"

    momentum: float | None = None
    r_max: float = 3.0
    d_max: float = 5.0
    warmup: float = 0.4
    ramp: float = 0.3
    sync: str = "running"

    def __post_init__(self) -> None:
        wanted = {
            "momentum": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
            "r_max": ("a finite number of at least 1", lambda value: value >= 1),
            "d_max": ("a finite number of at least 0", lambda value: value >= 0),
            "warmup": ("a share from 0 to 1", lambda value: 0 <= value <= 1),
            "ramp": ("a share from 0 to 1", lambda value: 0 <= value <= 1),
        }
        for key, (words, holds) in wanted.items():
            if getattr(self, key) is None and key == "momentum":
                continue
            value = _require_number(f"batch_renorm.{key}", getattr(self, key), words)
            if not holds(value):
                raise _refuse(f"batch_renorm.{key}", getattr(self, key), words)
            object.__setattr__(self, key, value)
        if self.sync not in SYNC:
            raise _refuse("batch_renorm.sync", self.sync, f"one of {', '.join(SYNC)}")
        # The tolerance lets shares such as 0.7 + 0.3, whose float sum may exceed 1, be what they mean.
        if self.warmup + self.ramp > 1 + 1e-9:
            shares = f"{self.warmup} + {self.ramp}"
            raise PlansError(f"plans: {BLOCK}.batch_renorm: warmup + ramp is {shares}; together they are at most 1")

    def momentum_over(self, planned: int) -> float:
        """``momentum`` for a training of ``planned`` iterations.

        If none is set: 0.01, and in trainings of fewer than 6000 iterations more, up to torch's 0.1 at 600 and below. The
        statistics are an average over about 1 / momentum iterations; if the weights move far meanwhile, they lag behind,
        and a short training ends with statistics that fit none of its networks.
        """
        if self.momentum is not None:
            return self.momentum
        return min(max(SLOWEST_MOMENTUM, AVERAGES_PER_TRAINING / planned), FASTEST_MOMENTUM)


@dataclass(frozen=True, kw_only=True)
class UnetrSettings(_NestedSettings):
    """The sizes of a UNETR, by the names and with the defaults of MONAI, which are the paper's (ViT-B16).

    Attributes:
        feature_size: channels of the finest convolutional block; coarser ones have 2, 4 and 8 times as many.
        hidden_size: numbers that make up a token; a multiple of ``num_heads``.
        mlp_dim: hidden units of the transformer's feed-forward layers.
        num_heads: of the attention.

    Raises:
        PlansError: a value of the wrong type or out of range.

    References:
        Hatamizadeh et al. 2022, arXiv:2103.10504, section 4.2.
    """

    key: ClassVar[str] = "unetr"

    feature_size: int = 16
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_heads: int = 12

    def __post_init__(self) -> None:
        for item in fields(self):
            _require_integer(f"{self.key}.{item.name}", getattr(self, item.name), 1)
        if self.hidden_size % self.num_heads:
            raise _refuse(
                "unetr.hidden_size", self.hidden_size, f"a multiple of unetr.num_heads, which is {self.num_heads}"
            )


NESTED: tuple[type[BatchRenormSettings] | type[UnetrSettings], ...] = (BatchRenormSettings, UnetrSettings)
"""Settings of the block that are objects of settings themselves."""


@dataclass(frozen=True, kw_only=True)
class NormSettings:
    """What a configuration says beyond stock plans; None leaves the trainer's own value.

    Attributes:
        num_iterations_per_epoch: optimizer steps per epoch (nnU-Net: 250).
        num_val_iterations_per_epoch: validation batches per epoch (nnU-Net: 50).
        initial_lr: learning rate at the start (nnU-Net: 0.01).
        seed: of the weights, and of sampling and augmentation where they run in the training process
            (``nnUNet_n_proc_DA=0``; nnU-Net's workers seed themselves); None leaves runs unseeded, as nnU-Net does.
        disparity_batches: validation batches on which train/eval disparity is measured.
        population_samples: training patches from which PreciseBN and FrozenBN re-estimate the running statistics.
        reestimate_every: epochs after which PreciseBN re-estimates them, besides the end of the training.
        frozen_share: share of the epochs that FrozenBN trains with frozen statistics, at the end.
        normalization_batch_size: samples that GhostBN normalizes together; it has no default.
        domain_statistics: experimental batches of which BEN keeps running statistics each, by name.
        micro_batch_size: samples of one process that go through the network at once; the gradients of a batch are added up.
        activation_checkpointing: whether activations are computed again for the gradient instead of kept.
        warmup_epochs: epochs over which the learning rate rises linearly to what nnU-Net's schedule says.
        checkpoint_minutes: a checkpoint to continue from is written at the end of an epoch if the last one is so many minutes
            old; 0 for every epoch, None for :data:`CHECKPOINT_MINUTES`.
        input_normalization: "image_quantile" or "tile_quantile": images, or every tile, are normalized by their quantiles.
        batch_renorm: the schedule of BatchRenorm.
        unetr: the sizes of the network, for trainers with ``_UNETR`` in their names; None for MONAI's own.

    Raises:
        PlansError: a value of the wrong type or out of range.
    """

    num_iterations_per_epoch: int | None = None
    num_val_iterations_per_epoch: int | None = None
    initial_lr: float | None = None
    seed: int | None = None
    disparity_batches: int | None = None
    population_samples: int | None = None
    reestimate_every: int | None = None
    frozen_share: float | None = None
    normalization_batch_size: int | None = None
    domain_statistics: tuple[str, ...] | None = None
    micro_batch_size: int | None = None
    activation_checkpointing: bool | None = None
    warmup_epochs: int | None = None
    checkpoint_minutes: float | None = None
    input_normalization: str | None = None
    batch_renorm: BatchRenormSettings = field(default_factory=BatchRenormSettings)
    unetr: UnetrSettings | None = None

    def __post_init__(self) -> None:
        for key in _COUNTS:
            if getattr(self, key) is not None:
                _require_integer(key, getattr(self, key), 1)
        if self.warmup_epochs is not None:
            _require_integer("warmup_epochs", self.warmup_epochs, 0)
        if self.seed is not None:
            _require_integer("seed", self.seed, 0, LARGEST_SEED)
        if self.initial_lr is not None:
            wanted = "a finite number above 0"
            value = _require_number("initial_lr", self.initial_lr, wanted)
            if value <= 0:
                raise _refuse("initial_lr", self.initial_lr, wanted)
            object.__setattr__(self, "initial_lr", value)
        if self.frozen_share is not None:
            wanted = "a share above 0 and below 1"
            if not 0 < _require_number("frozen_share", self.frozen_share, wanted) < 1:
                raise _refuse("frozen_share", self.frozen_share, wanted)
        if not isinstance(self.activation_checkpointing, bool | None):
            raise _refuse("activation_checkpointing", self.activation_checkpointing, "true or false")
        if self.checkpoint_minutes is not None:
            wanted = "a finite number of at least 0"
            if _require_number("checkpoint_minutes", self.checkpoint_minutes, wanted) < 0:
                raise _refuse("checkpoint_minutes", self.checkpoint_minutes, wanted)
        if self.input_normalization is not None and self.input_normalization not in INPUT_NORMALIZATIONS:
            raise _refuse("input_normalization", self.input_normalization, f"one of {', '.join(INPUT_NORMALIZATIONS)}")
        if self.domain_statistics is not None:
            object.__setattr__(self, "domain_statistics", _names("domain_statistics", self.domain_statistics))

    @classmethod
    def from_configuration(cls, configuration: Mapping[str, Any]) -> Self:
        """Read the block of a configuration, as ``ConfigurationManager.configuration`` holds it (inheritance resolved).

        Raises:
            PlansError: a key that is no setting, or a value of the wrong type or out of range.
        """
        block = configuration.get(BLOCK, {})
        _require_mapping(BLOCK, block)
        if "num_epochs" in block:
            raise PlansError(
                f"plans: {BLOCK}.num_epochs is {block['num_epochs']!r}, but the number of epochs has its home in the "
                "trainer's name, e.g. -tr nnUNetTrainerBRN_250epochs"
            )
        _require_known(BLOCK, block, [item.name for item in fields(cls)])
        values = dict(block)
        for nested in NESTED:
            if nested.key in values:
                values[nested.key] = nested.from_block(values[nested.key])
        return cls(**values)

    def to_block(self) -> dict[str, Any]:
        """Only what is set; ``from_configuration({"nnunet_norm": settings.to_block()})`` gives the settings back."""
        block = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.default is not MISSING and getattr(self, item.name) is not None
        }
        if self.domain_statistics is not None:
            block["domain_statistics"] = list(self.domain_statistics)
        if self.unetr is not None:
            block["unetr"] = self.unetr.to_block()
        batch_renorm = self.batch_renorm.to_block()
        return {**block, "batch_renorm": batch_renorm} if batch_renorm else block
