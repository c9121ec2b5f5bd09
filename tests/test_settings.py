"""The block "nnunet_norm" of a configuration: what it accepts, what it refuses and how it is written back."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_norm.errors import PlansError
from nnunet_norm.layers import BatchRenorm2d
from nnunet_norm.settings import BatchRenormSettings, NormSettings, UnetrSettings

FULL = {
    "num_iterations_per_epoch": 10,
    "num_val_iterations_per_epoch": 2,
    "initial_lr": 0.005,
    "seed": 0,
    "disparity_batches": 3,
    "population_samples": 2000,
    "reestimate_every": 50,
    "frozen_share": 0.25,
    "normalization_batch_size": 2,
    "domain_statistics": ["plate_1", "plate_2"],
    "micro_batch_size": 4,
    "activation_checkpointing": True,
    "warmup_epochs": 5,
    "checkpoint_minutes": 0,
    "input_normalization": "image_quantile",
    "batch_renorm": {"momentum": 0.1, "r_max": 2.0, "d_max": 0.0, "warmup": 0.7, "ramp": 0.2, "sync": "full"},
}


def read(**block: object) -> NormSettings:
    return NormSettings.from_configuration({"batch_size": 2, "nnunet_norm": block})


def test_a_configuration_without_the_block_has_the_defaults() -> None:
    """Enforces that stock plans leave everything to the trainer, with Ioffe's end points 3 and 5."""
    settings = NormSettings.from_configuration({"batch_size": 2})
    assert settings == NormSettings()
    assert (settings.num_iterations_per_epoch, settings.seed, settings.initial_lr) == (None, None, None)
    assert settings.batch_renorm == BatchRenormSettings(momentum=None, r_max=3.0, d_max=5.0, warmup=0.4, ramp=0.3)
    assert settings.to_block() == {}


def test_every_entry_is_read_and_written_back() -> None:
    """Enforces that reading a full block and writing it loses nothing, seed 0 and limit 0 included."""
    settings = read(**FULL)
    assert settings.seed == 0
    assert settings.batch_renorm.d_max == 0.0
    assert settings.to_block() == FULL


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "num_iterations_per_epoch": st.integers(1, 10**6),
            "num_val_iterations_per_epoch": st.integers(1, 10**6),
            "initial_lr": st.floats(1e-9, 10),
            "seed": st.integers(0, 2**32 - 1),
            "disparity_batches": st.integers(1, 100),
            "population_samples": st.integers(1, 10**6),
            "reestimate_every": st.integers(1, 1000),
            "frozen_share": st.floats(1e-9, 1, exclude_max=True),
            "normalization_batch_size": st.integers(1, 64),
            "domain_statistics": st.lists(st.text(min_size=1), min_size=1, unique=True),
            "batch_renorm": st.fixed_dictionaries(
                {},
                optional={
                    "momentum": st.floats(1e-6, 1),
                    "r_max": st.floats(1, 100),
                    "d_max": st.floats(0, 100),
                    "warmup": st.floats(0, 0.5),
                    "ramp": st.floats(0, 0.5),
                    "sync": st.sampled_from(["running", "full", "none"]),
                },
            ),
        },
    )
)
def test_a_valid_block_survives_json_and_back(block: dict[str, object]) -> None:
    """Enforces from_configuration(to_block(settings)) == settings through a JSON file."""
    settings = read(**block)
    assert read(**json.loads(json.dumps(settings.to_block()))) == settings


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"sede": 1}, r"nnunet_norm\.sede is not a setting; valid ones are .*seed.*batch_renorm"),
        ({"num_epochs": 250}, r"nnunet_norm\.num_epochs is 250, .*nnUNetTrainerBRN_250epochs"),
        ({"num_iterations_per_epoch": 0}, r"num_iterations_per_epoch is 0; .*at least 1"),
        ({"num_iterations_per_epoch": 2.5}, r"num_iterations_per_epoch is 2\.5; .*whole number"),
        ({"num_val_iterations_per_epoch": "5"}, r"num_val_iterations_per_epoch is '5'"),
        ({"disparity_batches": True}, r"disparity_batches is True"),
        ({"seed": -1}, r"seed is -1; .*at least 0 and at most 4294967295"),
        ({"seed": 2**32}, r"seed is 4294967296"),
        ({"initial_lr": 0}, r"initial_lr is 0; .*above 0"),
        ({"initial_lr": math.nan}, r"initial_lr is nan"),
        ({"batch_renorm": 3}, r"nnunet_norm\.batch_renorm is 3; it must be an object"),
        ({"batch_renorm": None}, r"nnunet_norm\.batch_renorm is None; it must be an object"),
        ({"batch_renorm": {"rmax": 2}}, r"batch_renorm\.rmax is not a setting; valid ones are momentum, r_max"),
        ({"batch_renorm": {"r_max": 0.5}}, r"batch_renorm\.r_max is 0\.5; .*at least 1"),
        ({"batch_renorm": {"r_max": math.inf}}, r"batch_renorm\.r_max is inf; .*finite"),
        ({"batch_renorm": {"d_max": -1}}, r"batch_renorm\.d_max is -1; .*at least 0"),
        ({"batch_renorm": {"momentum": 0}}, r"batch_renorm\.momentum is 0; .*above 0"),
        ({"batch_renorm": {"momentum": 1.5}}, r"batch_renorm\.momentum is 1\.5"),
        ({"batch_renorm": {"warmup": 1.2}}, r"batch_renorm\.warmup is 1\.2; .*share from 0 to 1"),
        ({"population_samples": 0}, r"population_samples is 0; .*at least 1"),
        ({"population_samples": 1e3}, r"population_samples is 1000\.0; .*whole number"),
        ({"reestimate_every": 0}, r"reestimate_every is 0; .*at least 1"),
        ({"reestimate_every": True}, r"reestimate_every is True"),
        ({"normalization_batch_size": -2}, r"normalization_batch_size is -2; .*at least 1"),
        ({"frozen_share": 0}, r"frozen_share is 0; .*above 0 and below 1"),
        ({"frozen_share": 1.0}, r"frozen_share is 1\.0; .*above 0 and below 1"),
        ({"frozen_share": "0.2"}, r"frozen_share is '0\.2'"),
        ({"frozen_share": math.nan}, r"frozen_share is nan"),
        ({"domain_statistics": "plate_1"}, r"domain_statistics is 'plate_1'; .*list of different names"),
        ({"domain_statistics": []}, r"domain_statistics is \[\]; .*list of different names"),
        ({"domain_statistics": ["a", "b", "a"]}, r"domain_statistics is \['a', 'b', 'a'\]; .*different names"),
        ({"domain_statistics": ["a", 2]}, r"domain_statistics is \['a', 2\]"),
        ({"domain_statistics": ["a", ""]}, r"domain_statistics is \['a', ''\]"),
        ({"domain_statistics": True}, r"domain_statistics is True"),
        ({"batch_renorm": {"sync": "all"}}, r"batch_renorm\.sync is 'all'; it must be one of running, full, none"),
        ({"batch_renorm": {"sync": True}}, r"batch_renorm\.sync is True"),
        ({"batch_renorm": {"sync": None}}, r"batch_renorm\.sync is None"),
        (
            {"input_normalization": "zscore"},
            r"input_normalization is 'zscore'; it must be one of image_quantile, tile_q",
        ),
        ({"input_normalization": True}, r"input_normalization is True"),
        ({"batch_renorm": {"warmup": 0.8}}, r"warmup \+ ramp is 0\.8 \+ 0\.3; together they are at most 1"),
    ],
)
def test_what_is_no_setting_is_refused_in_one_line(block: dict[str, object], message: str) -> None:
    """Enforces that a refusal names the key, the value and the choice, in one line."""
    with pytest.raises(PlansError, match=message) as refusal:
        read(**block)
    assert "\n" not in str(refusal.value)


def test_a_block_that_is_no_object_is_refused() -> None:
    """Enforces that "nnunet_norm": [] is not taken for an empty block."""
    with pytest.raises(PlansError, match=r"nnunet_norm is \[\]; it must be an object"):
        NormSettings.from_configuration({"nnunet_norm": []})


def test_settings_cannot_be_changed() -> None:
    """Enforces that settings are frozen, so that what the log says is what was used."""
    with pytest.raises(AttributeError, match="cannot assign"):
        NormSettings().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(("planned", "momentum"), [(10, 0.1), (600, 0.1), (1200, 0.05), (6000, 0.01), (250_000, 0.01)])
def test_running_statistics_average_over_a_small_part_of_the_training(planned, momentum):
    assert BatchRenormSettings().momentum_over(planned) == pytest.approx(momentum)
    assert BatchRenormSettings(momentum=0.3).momentum_over(planned) == 0.3


def test_what_processes_share_is_the_running_statistics_unless_said_otherwise():
    """Enforces the default of DistributedDataParallel training, and the layer's own words for it."""
    assert BatchRenormSettings().sync == "running"
    assert read(batch_renorm={"sync": "running"}).to_block() == {}
    for sync in ("running", "full", "none"):
        assert BatchRenorm2d(2, sync=read(batch_renorm={"sync": sync}).batch_renorm.sync).sync == sync


def test_names_of_domains_keep_their_order_and_cannot_be_changed():
    """Enforces that the order, by which statistics are stored, is that of the plans."""
    names = ["z", "a", "m"]
    settings = read(domain_statistics=names)
    names.append("later")
    assert settings.domain_statistics == ("z", "a", "m")
    assert settings.to_block() == {"domain_statistics": ["z", "a", "m"]}


@pytest.mark.parametrize(
    "key",
    ["population_samples", "reestimate_every", "frozen_share", "normalization_batch_size", "domain_statistics"],
)
def test_what_is_not_set_is_left_to_the_trainer(key):
    assert getattr(NormSettings(), key) is None
    assert key not in NormSettings().to_block()


def test_sizes_of_unetr_are_whole_numbers_by_monais_names():
    """What is given replaces MONAI's defaults, and comes back as it was given; an empty object is MONAI's own network."""
    block = {"unetr": {"hidden_size": 48, "num_heads": 3}}
    settings = NormSettings.from_configuration({"nnunet_norm": block})
    assert settings.unetr == UnetrSettings(feature_size=16, hidden_size=48, mlp_dim=3072, num_heads=3)
    assert settings.to_block() == block
    assert NormSettings.from_configuration({"nnunet_norm": {"unetr": {}}}).to_block() == {"unetr": {}}
    assert NormSettings.from_configuration({}).unetr is None


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({"hidden_size": 50}, r"unetr\.hidden_size is 50; it must be a multiple of unetr\.num_heads, which is 12$"),
        ({"mlp_dim": 0}, r"unetr\.mlp_dim is 0; it must be a whole number of at least 1$"),
        ({"feature_size": 4.0}, r"unetr\.feature_size is 4\.0; it must be a whole number"),
        ({"depth": 4}, r"unetr\.depth is not a setting; valid ones are feature_size, hidden_size, mlp_dim, num_heads$"),
        (7, r"unetr is 7; it must be an object of settings$"),
    ],
)
def test_sizes_of_unetr_out_of_range_are_refused_in_one_line(block, line):
    with pytest.raises(PlansError, match=rf"^plans: nnunet_norm\.{line}"):
        NormSettings.from_configuration({"nnunet_norm": {"unetr": block}})
