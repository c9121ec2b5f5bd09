"""Shares of processes, micro-batches and groups of samples, against nnU-Net's own sharing."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import dist, nnUNetTrainer

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import derive_plans, resolve_configuration
from nnunet_norm.planning.batches import check_shares, shares

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"


@pytest.fixture
def plans() -> dict:
    return json.loads((STOCK / "nnUNetPlans.json").read_text())


def nnunets_share(batch_size: int, processes: int, rank: int) -> int:
    """What nnU-Net's trainer gives a process."""
    trainer = SimpleNamespace(
        is_ddp=True,
        configuration_manager=SimpleNamespace(batch_size=batch_size),
        oversample_foreground_percent=0.33,
        print_to_log_file=lambda *args, **kwargs: None,
    )
    with (
        mock.patch.object(dist, "get_world_size", return_value=processes),
        mock.patch.object(dist, "get_rank", return_value=rank),
    ):
        nnUNetTrainer._set_batch_size_and_oversample(trainer)
    return trainer.batch_size


@pytest.mark.parametrize(("batch_size", "processes"), [(2, 2), (16, 8), (11, 4), (7, 1), (9, 8), (64, 7)])
def test_shares_are_those_of_nnunet(batch_size: int, processes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces the samples of every process, the first ones larger."""
    expected = [nnunets_share(batch_size, processes, rank) for rank in range(processes)]
    assert shares(batch_size, processes) == expected
    assert sum(expected) == batch_size
    assert expected[0] == max(expected)


def test_parts_that_do_not_fit_the_batch_are_refused(plans: dict) -> None:
    """Enforces one line for each: micro-batches too large, also after the batch shrinks and for heirs; groups; processes."""
    with pytest.raises(PlansError, match=r"3d_fullres: micro_batch_size is 3, larger than the batch of 2; .*at most 2"):
        derive_plans(plans, "3d_fullres", micro_batch_size=3)
    derived = derive_plans(plans, "3d_fullres", batch_size=16, micro_batch_size=8, normalization_batch_size=4)
    assert derived["plans_name"] == "nnUNetPlans_b16_mb8_nb4"
    with pytest.raises(PlansError, match="micro_batch_size is 8, larger than the batch of 4"):
        derive_plans(derived, "3d_fullres", batch_size=4)
    with pytest.raises(PlansError, match="micro_batch_size is 6, which normalization_batch_size 4 does not divide"):
        derive_plans(derived, "3d_fullres", micro_batch_size=6)
    derived["configurations"]["3d_small"] = {"inherits_from": "3d_fullres", "batch_size": 2}
    with pytest.raises(PlansError, match="configuration 3d_small: micro_batch_size is 8, larger than the batch of 2"):
        derive_plans(derived, "3d_fullres", seed=1)
    resolved = resolve_configuration(derived, "3d_fullres")
    assert check_shares(resolved, 4, "3d_fullres") == [4] * 4
    with pytest.raises(
        PlansError, match=r"shares of 5 or 6 samples, which .* 4 does not divide; give .*multiple of 12"
    ):
        check_shares(resolved, 3, "3d_fullres")
    with pytest.raises(
        PlansError, match=r"3d_fullres: num_gpus is 17, more than the batch of 16 .*at most 16, or batch"
    ):
        check_shares(resolved, 17, "3d_fullres")


def test_batch_dice_needs_equal_shares() -> None:
    """Enforces that unequal shares are refused where nnU-Net's loss gathers a row per sample, and nowhere else."""
    uneven = {"batch_size": 5, "batch_dice": True}
    with pytest.raises(PlansError, match=r"shares of 2 or 3 samples, and batch_dice needs equal ones.*multiple of 2"):
        check_shares(uneven, 2, "2d")
    assert check_shares(uneven | {"batch_dice": False}, 2, "2d") == [3, 2]
    assert check_shares(uneven | {"batch_size": 6}, 2, "2d") == [3, 3]


def test_norms_that_wait_for_each_other_need_equally_many_micro_batches() -> None:
    """Enforces a refusal of what would wait for ever: 2 and 1 micro-batches; equal numbers and other norms are welcome."""
    full = {"micro_batch_size": 2, "batch_renorm": {"sync": "full"}}
    uneven = {"batch_size": 5, "nnunet_norm": full}
    with pytest.raises(
        PlansError, match=r"shares of 2 or 3 samples, thus unequal numbers of micro-batches.*multiple of 2$"
    ):
        check_shares(uneven, 2, "2d")
    assert check_shares(uneven | {"batch_size": 7}, 2, "2d") == [4, 3]
    assert check_shares(uneven | {"nnunet_norm": full | {"batch_renorm": {}}}, 2, "2d") == [3, 2]
    assert check_shares(uneven | {"nnunet_norm": {"batch_renorm": {"sync": "full"}}}, 2, "2d") == [3, 2]
