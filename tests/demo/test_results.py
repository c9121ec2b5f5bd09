import json

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from nnunet_norm.demo import figure, table, tilings


@pytest.fixture
def grid():
    return tilings.Grid((128, 112))


def make_picture(probability=1 / 3):
    """Two tilings of equal probabilities; in the second one class has ``probability`` in one spot."""
    shape = (160, 144)
    first = np.zeros((3, *shape), dtype=np.float32)
    second = first.copy()
    second[1, 60:64, 70:74] = np.log(2 * probability / (1 - probability))
    tilings_of = {"InstanceNorm": np.stack([first, second]), "BatchRenorm": np.stack([first, first])}
    zeros = np.zeros(shape, dtype=np.float32)
    return figure.Picture(zeros, zeros.astype(np.uint8), tilings_of, {"InstanceNorm": "0.9", "BatchRenorm": "no"})


# --- tilings ---


def test_the_second_grid_is_the_first_one_shifted(grid):
    """Equal windows have equal grids: the tiles move by half a core, and nothing else changes."""
    for first, second in zip(grid.cores(0), grid.cores(tilings.SHIFT), strict=True):
        assert all(b.start - a.start == tilings.SHIFT for a, b in zip(first, second, strict=True))
        assert all(b.stop - a.stop == tilings.SHIFT for a, b in zip(first, second, strict=True))


def test_the_grid_lies_on_the_networks_stride():
    """Otherwise not even a network with fixed statistics would predict the same."""
    assert all(n % tilings.STRIDE == 0 for n in (tilings.SHIFT, tilings.TILE_SIZE, tilings.HALO_SIZE))
    assert tilings.TILE_SIZE > 2 * tilings.HALO_SIZE


def test_boxes_cover_what_both_windows_see_once(grid):
    """Every voxel of the common part is in exactly one pair of tiles."""
    count = np.zeros(grid.shape, dtype=int)
    for box in grid.shared_boxes():
        count[box] += 1
    assert (count[grid.common] == 1).all()
    assert count.sum() == count[grid.common].size


def test_windows_are_predicted_from_their_own_voxels_alone():
    """Each window is predicted by itself, and lies where it was cut out."""

    class Pixelwise:
        def predict_sliding_window_return_logits(self, image):
            assert image.is_contiguous()
            return torch.cat([image, -image])

    image = torch.rand(1, 2, 128, 112)
    (first, second), seconds = tilings.predict_windows(Pixelwise(), image)
    s = tilings.SHIFT
    assert torch.equal(first[:1, :, :-s, :-s], image[:, :, :-s, :-s])
    assert torch.equal(second[:1, :, s:, s:], image[:, :, s:, s:])
    assert first[:, :, -s:].isnan().all()
    assert second[:, :, :s].isnan().all()
    assert seconds >= 0


def test_comparison_sees_a_single_voxel():
    """One voxel that changes its label is one part of all that are compared, and max dist is its change."""
    first = torch.zeros(3, 1, 128, 112)
    first[0] = 1
    second = first.clone()
    y, x = tilings.Grid((128, 112)).common
    second[2, 0, y.start, x.start] = 1.5
    same, unchanged = tilings.compare(first, first)
    other, changed = tilings.compare(first, second)
    assert (same.verdict, unchanged) == ("no", 0)
    assert other.max_dist == 1.5
    assert changed == pytest.approx(1 / ((y.stop - y.start) * (x.stop - x.start)))


def test_what_lies_near_a_cut_is_not_compared():
    """Nothing outside of the common part counts, NaN least of all."""
    first = torch.full((3, 1, 128, 112), torch.nan)
    y, x = tilings.Grid((128, 112)).common
    first[:, :, y, x] = 1
    assert tilings.compare(first, first)[0].max_dist == 0


# --- table ---


@pytest.fixture
def rows(tmp_path):
    report = tmp_path / "norm_report.json"
    report.write_text(json.dumps({"train_eval_disparity": {"mean": 0.0123}}))
    numbers = {
        tilings.GAUSSIAN: {"mismatch": [0.02, 0.04], "verdict": "3.21", "changed": 0.0123, "seconds": 4.04},
        tilings.HALO: {"mismatch": [0.0, 0.0], "verdict": "no", "changed": 0.0, "seconds": 6.0},
    }
    dices = {tilings.GAUSSIAN: [0.8, 0.9], tilings.HALO: [0.81, 0.91]}
    return table.rows_of("BatchRenorm", numbers, dices, report)


def test_rows_say_what_was_measured(rows):
    """Numbers stand under their heading; a mismatch of exactly 0 is written as such."""
    cells = [dict(zip(table.HEADER, row.cells(), strict=True)) for row in rows]
    assert (cells[0]["tile mismatch"], cells[0]["labels changed"]) == ("0.0300", "1.23%")
    assert cells[1] == {
        "norm": "BatchRenorm",
        "prediction": "halo",
        "Dice grey": "0.810",
        "Dice white": "0.910",
        "train/eval disparity": "0.0123",
        "tile mismatch": "0",
        "max dist": "no",
        "labels changed": "none",
        "seconds": "6.0",
    }


def test_the_written_table_is_the_printed_one(rows, tmp_path):
    """The file carries the same table, what is simulated, and what the numbers mean."""
    path = tmp_path / "table.md"
    table.write_table(rows, path)
    text = path.read_text()
    assert table.table_of(path) == table.as_markdown(rows)
    assert table.SIMULATED in text
    assert table.EXPLANATION in text
    assert len({len(line) for line in table.as_markdown(rows).splitlines()}) == 1


def test_dice_per_tissue_reads_label_images(tmp_path):
    """Grey matter: one of two voxels found, Dice 2/3; white matter: exactly right."""
    for name, labels in (("a", [[[1, 0, 2]]]), ("b", [[[1, 1, 2]]])):
        sitk.WriteImage(sitk.GetImageFromArray(np.array(labels, dtype=np.uint8)), str(tmp_path / f"{name}.nii.gz"))
    assert table.dice_per_tissue(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz") == pytest.approx([2 / 3, 1])


# --- figure ---


def test_the_difference_is_that_of_the_probabilities():
    """The largest change over the classes; what the two windows do not both see is left out."""
    picture = make_picture(2 / 3)
    difference = picture.difference("InstanceNorm")
    assert np.nanmax(difference) == pytest.approx(1 / 3, rel=1e-5)
    assert np.nansum(difference > 0) == 16
    assert np.nanmax(picture.difference("BatchRenorm")) == 0
    assert np.isfinite(difference[picture.grid.common]).all()
    assert np.isnan(difference).sum() == difference.size - difference[picture.grid.common].size


def test_a_seam_is_a_jump_that_the_other_tiling_does_not_have():
    """An edge of the anatomy, in both tilings, is no seam; a jump at a border of the first tiling alone is one."""
    picture = make_picture()
    rows, _ = figure.boundaries(picture.grid.cores(0), picture.grid.common)
    first, second = picture.tilings["InstanceNorm"]
    first[1, rows[1] :] = second[1, rows[1] :] = 2
    assert not picture.seams("InstanceNorm").any()
    first[1, rows[0] : rows[1]] = 1
    seams = picture.seams("InstanceNorm")
    assert list(np.flatnonzero(seams.any(1))) == [rows[0]]


def test_the_enlarged_part_is_where_the_seams_are():
    """The box with the largest sum, found by brute force."""
    values = np.random.default_rng(0).random((16, 19)).astype(np.float32)
    sums = {(y, x): values[y : y + 4, x : x + 3].sum() for y in range(2, 11) for x in range(1, 15)}
    y, x = max(sums, key=sums.get)
    assert figure.worst_place(values, (slice(2, 14), slice(1, 17)), (4, 3)) == (slice(y, y + 4), slice(x, x + 3))


def test_boundaries_lie_inside():
    """The border of the picture is no place where tiles meet."""
    cores = [(slice(y, y + 8), slice(x, x + 8)) for y in (0, 8, 16) for x in (4, 12)]
    assert figure.boundaries(cores, (slice(8, 24), slice(4, 20))) == ([16], [12])


def test_the_figure_is_labelled_and_says_what_it_shows(tmp_path):
    """Axes in mm, both norms named, the numbers of the verdicts in the caption; nothing half-written beside it."""
    drawn = figure.draw(make_picture(0.5))
    figure.save(drawn, tmp_path / "seams.png")
    titles = [axis.get_title() for axis in drawn.axes]
    assert any("InstanceNorm" in title for title in titles)
    assert any("BatchRenorm" in title for title in titles)
    assert {axis.get_xlabel() for axis in drawn.axes} >= {"x in mm"}
    words = [text.get_text() for axis in drawn.axes for text in axis.texts]
    assert "0 everywhere" in words
    assert "InstanceNorm: 0.9; BatchRenorm: no" in drawn.texts[0].get_text().replace("\n", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["seams.png"]
