"""Images as large as nnU-Net's preprocessor makes them, and patches that are larger."""

import json
from pathlib import Path

import pytest

from nnunet_norm.errors import PlansError
from nnunet_norm.planning import derive_plans
from nnunet_norm.planning.images import check_patch, largest_image

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"


@pytest.fixture
def plans() -> dict:
    return json.loads((STOCK / "nnUNetPlans.json").read_text())


def test_images_are_transposed_and_resampled(plans: dict) -> None:
    """Enforces the largest extent per axis at the configuration's spacing, within slices only in 2d, in the plans' order."""
    plans["transpose_forward"] = [2, 0, 1]
    fingerprint = {"shapes_after_crop": [[100, 200, 30], [150, 90, 40]], "spacings": [[1.4, 0.7, 4.0], [0.7, 0.7, 1.0]]}
    # In the order of the plans: 30x100x200 at (4, 1.4, 0.7) and 40x150x90 at (1, 0.7, 0.7).
    assert largest_image(plans, "3d_fullres", fingerprint) == (60, 200, 200)
    assert largest_image(plans, "2d", fingerprint) == (200, 200)
    plans["configurations"]["3d_fullres"]["resampling_fn_data"] = "no_resampling_hack"
    assert largest_image(plans, "3d_fullres", fingerprint) == (40, 150, 200)


def test_a_patch_may_exceed_the_images_by_what_divisibility_asks_for(plans: dict) -> None:
    """Enforces a refusal that names the largest sensible patch, which then is accepted."""
    fingerprint = {"shapes_after_crop": [[70, 300, 310]], "spacings": [[2.0, 0.7, 0.7]]}
    large = derive_plans(plans, "3d_fullres", patch_size=[96, 384, 160])
    with pytest.raises(
        PlansError, match=r"96x384x160 is larger than every image on axes 0, 1 \(.*70x300x310\)"
    ) as refusal:
        check_patch(large, "3d_fullres", fingerprint)
    assert str(refusal.value).endswith("give at most 80x320x160")
    check_patch(derive_plans(plans, "3d_fullres", patch_size=[80, 320, 320]), "3d_fullres", fingerprint)
    # Images below the network's minimum are padded: that patch is the smallest there is.
    fingerprint = {"shapes_after_crop": [[20, 30, 30]], "spacings": [[2.0, 0.7, 0.7]]}
    check_patch(derive_plans(plans, "3d_fullres", patch_size=[64, 128, 128]), "3d_fullres", fingerprint)
    with pytest.raises(PlansError, match=r"on axis 0 .*give at most 64x128x128"):
        check_patch(derive_plans(plans, "3d_fullres", patch_size=[80, 128, 128]), "3d_fullres", fingerprint)


def test_a_patch_for_unetr_may_exceed_the_images_by_what_tokens_ask_for(plans: dict) -> None:
    """Enforces the next multiple of 16 and no other of the strides."""
    fingerprint = {"shapes_after_crop": [[10, 300, 310]], "spacings": [[2.0, 0.7, 0.7]]}
    sizes = {"num_heads": 6}
    with pytest.raises(PlansError, match=r"larger than every image on axis 0 \(.*give at most 16x304x320$"):
        check_patch(
            derive_plans(plans, "3d_fullres", patch_size=[32, 304, 320], unetr=sizes), "3d_fullres", fingerprint
        )
    check_patch(derive_plans(plans, "3d_fullres", patch_size=[16, 304, 320], unetr=sizes), "3d_fullres", fingerprint)
