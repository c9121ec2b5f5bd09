"""Plans files: whole or not at all, and refusals that list what is there."""

import errno
import json
import os
from pathlib import Path

import pytest

from nnunet_norm.errors import OutputError, PlansError
from nnunet_norm.planning import load_plans, save_plans

PLANS = {"plans_name": "nnUNetPlans_b4", "configurations": {"2d": {"batch_size": 4}}}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """Enforces the round trip through <plans_name>.json, with nothing else left in the folder."""
    path = save_plans(PLANS, tmp_path)
    assert path == tmp_path / "nnUNetPlans_b4.json"
    assert load_plans(tmp_path, "nnUNetPlans_b4") == PLANS
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    """Enforces that colleagues can read plans: the umask's permissions, not those of a temporary file."""
    (tmp_path / "ordinary").write_text("")
    assert save_plans(PLANS, tmp_path).stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_plans_are_not_overwritten_unasked(tmp_path: Path) -> None:
    """Enforces a refusal that leaves the old file as it was, and overwrite=True that replaces it."""
    path = tmp_path / "nnUNetPlans_b4.json"
    path.write_text("old")
    with pytest.raises(PlansError, match=r"nnUNetPlans_b4\.json exists; .*--plans-name or give --overwrite"):
        save_plans(PLANS, tmp_path)
    assert path.read_text() == "old"
    save_plans(PLANS, tmp_path, overwrite=True)
    assert json.loads(path.read_text()) == PLANS


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    """Enforces that a full disk or a read-only folder, at whatever step, is one line and leaves nothing half-written."""
    path = save_plans(PLANS, tmp_path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match=rf"{path} cannot be written \({os.strerror(code)}\)") as refusal:
        save_plans({**PLANS, "extra": 1}, tmp_path, overwrite=True)
    assert "\n" not in str(refusal.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enforces that Ctrl-C in the middle of writing is passed on and cleaned up after."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_plans(PLANS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    """Enforces that plans are not written into a folder that nnU-Net does not know."""
    with pytest.raises(OutputError, match=r"nowhere/nnUNetPlans_b4\.json cannot be written \(No such file"):
        save_plans(PLANS, tmp_path / "nowhere")


def test_missing_plans_list_those_that_are_there(tmp_path: Path) -> None:
    """Enforces that a typo in -p is answered with the choice, without the dataset's other JSON files."""
    with pytest.raises(PlansError, match=r"nnUNetPlan are not in .*; there are none; run nnUNetv2_plan_experiment"):
        load_plans(tmp_path, "nnUNetPlan")
    save_plans(PLANS, tmp_path)
    for other in ("dataset", "dataset_fingerprint", "splits_final"):
        (tmp_path / f"{other}.json").write_text("{}")
    with pytest.raises(PlansError, match=r"nnUNetPlan are not in .*; there are nnUNetPlans_b4$"):
        load_plans(tmp_path, "nnUNetPlan")
    with pytest.raises(PlansError, match=r"there is no folder .*absent; run nnUNetv2_plan_and_preprocess"):
        load_plans(tmp_path / "absent", "nnUNetPlans")
    with pytest.raises(PlansError, match=r"'\.\./nnUNetPlans': give the name"):
        load_plans(tmp_path, "../nnUNetPlans")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"plans_name": "x", ', r"bad\.json are not JSON .*nnUNetv2_plan_experiment again"),
        (b"\xff\xfe\x00", r"bad\.json are not JSON"),
        (b"[]", r"bad\.json is not a plans file"),
        (b'{"plans_name": "x"}', r"bad\.json is not a plans file: it lacks plans_name or configurations"),
    ],
)
def test_a_file_that_is_no_plans_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Enforces one line for a truncated, binary or foreign file."""
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(PlansError, match=message) as refusal:
        load_plans(tmp_path, "bad")
    assert "\n" not in str(refusal.value)
