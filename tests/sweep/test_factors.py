import pytest

from nnunet_norm.sweep.factors import factors_of, spoken

AXES = "dataset: 4\nconfiguration: 3d_fullres\naxes: "


def test_levels_are_in_the_order_in_which_people_read_them(pretended) -> None:
    """Enforces that sizes rise whatever the grid's order, and that words stay in it; one that does not vary is no factor."""
    sweep = pretended(
        AXES + "{norm: [BRN, GN], loss: [DiceFocal, DiceCE], batch: [16, 2], patch: [[80, 192, 192], [80, 160, 160]], "
        "epochs: [5]}"
    )
    found = factors_of(sweep.grid())
    assert found.levels == {
        "norm": ("BRN", "GN"),
        "loss": ("DiceFocal", "DiceCE"),
        "batch_size": ("2", "16"),
        "patch_size": ("80x160x160", "80x192x192"),
    }
    assert spoken("batch_size") == "batch size"
    first = sweep.grid().points[0]
    assert found.of(first) == {"norm": "BRN", "loss": "DiceFocal", "batch_size": "16", "patch_size": "80x192x192"}


@pytest.mark.parametrize(
    "axes",
    [
        "{norm: [BRN, GN], setting: [p160, b16]}\nrecipe: amos",
        "{norm: [BRN, GN], size: [{batch: 2, patch: [80, 160, 160]}, {batch: 16}]}",
    ],
)
def test_patch_and_batch_are_those_of_the_plans(pretended, axes: str) -> None:
    """Enforces that tables are by patch and batch also where one axis says both, by a recipe's name or as a mapping."""
    found = factors_of(pretended(AXES + axes).grid())
    assert found.levels["batch_size"] == ("2", "16")
    assert set(found.levels) == {"norm", "batch_size"}


def test_groups_have_all_in_common_but_what_is_left_out(pretended) -> None:
    """Enforces that what is compared differs in the factors that are compared, and in no other."""
    grid = pretended(AXES + "{norm: [BRN, GN], loss: [DiceFocal, DiceCE], batch: [2, 16]}").grid()
    found = factors_of(grid)
    groups = found.groups(grid.points, "batch_size", "loss")
    assert list(groups) == [("BRN",), ("GN",)]
    assert [len(points) for points in groups.values()] == [4, 4]
    assert all(found.of(point)["norm"] == key[0] for key, points in groups.items() for point in points)


def test_one_model_has_no_factors(pretended) -> None:
    """Enforces that a grid of a single point is one without factors."""
    assert factors_of(pretended(AXES + "{norm: [BRN]}").grid()).levels == {}
