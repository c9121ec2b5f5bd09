import json
import os

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.ensembling.ensemble import average_probabilities, merge_files
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from predicted import LABELS, REGIONS, dataset, draw, read, write_case, write_folder
from tiny_models import plans as tiny_plans
from tiny_models import visible

from nnunet_norm.ensembling import Merging, member_of_folder, merge_folders, merging, probabilities
from nnunet_norm.ensembling.postprocessing import Postprocessing
from nnunet_norm.errors import EnsembleError, OutputError

ONE_REGION = {"background": 0, "whole": [1, 2]}
QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Arrays of tests come in many pieces, as large ones do."""
    monkeypatch.setattr(probabilities, "VOXELS", 100)
    monkeypatch.setattr(merging, "VOXELS", 100)


def merge(folders, output, before=None, **options):
    members = [member_of_folder(*each) for each in zip(folders, before or [None] * len(folders), strict=True)]
    return merge_folders(members, output, Merging(**QUIET, **options))


def theirs(folders, case, output, described):
    """nnU-Net's own function that merges a case."""
    output.mkdir(exist_ok=True)
    manager = member_of_folder(folders[0]).label_manager
    files = [str(folder / f"{case}.npz") for folder in folders]
    merge_files(files, str(output / case), described["file_ending"], SimpleITKIO(), manager, save_probabilities=True)


@pytest.mark.parametrize("labels", [LABELS, REGIONS, ONE_REGION])
@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float16, np.float64, np.float32), (np.float64,)])
def test_the_files_are_nnunets(tmp_path, labels, dtypes):
    """Voxels, geometry and probabilities, for labels, regions and one region, in any precision, to the last bit."""
    described = dataset(labels)
    folders = [write_folder(tmp_path / str(i), i, labels=labels, dtype=dtype) for i, dtype in enumerate(dtypes)]
    if len(labels) == 2:  # one channel, of which numpy may write the axes in reverse
        write_case(folders[0], "y", np.asfortranarray(draw(9, described)), described)
    assert merge(folders, tmp_path / "out", save_probabilities=True) == ["x", "y"]
    for case in ("x", "y"):
        theirs(folders, case, tmp_path / "theirs", described)
        files = [tmp_path / name / f"{case}.nii.gz" for name in ("out", "theirs")]
        assert files[0].read_bytes() == files[1].read_bytes()
        ours = np.load(tmp_path / "out" / f"{case}.npz")["probabilities"]
        expected = np.load(tmp_path / "theirs" / f"{case}.npz")["probabilities"]
        assert ours.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_equal(*(load_pickle(str(tmp_path / name / f"{case}.pkl")) for name in ("out", "theirs")))
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == described
    assert not [name for name in visible(tmp_path / "out") if name.startswith(".")]


def test_finished_cases_are_kept_and_changed_ones_made_again(tmp_path):
    """A case is made again if its probabilities, its output, the members or the options changed, and only then."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    out = tmp_path / "out"
    assert merge(folders, out) == ["x", "y"]
    assert merge(folders, out) == []
    write_case(folders[1], "y", draw(77, dataset()), dataset())
    assert merge(folders, out) == ["y"]
    theirs(folders, "y", tmp_path / "theirs", dataset())
    np.testing.assert_array_equal(read(out / "y.nii.gz"), read(tmp_path / "theirs" / "y.nii.gz"))
    (out / "x.nii.gz").unlink()
    assert merge(folders, out) == ["x"]
    os.utime(out / "x.nii.gz", (1, 1))  # somebody has put another file there
    assert merge(folders, out) == ["x"]
    assert merge(folders, out, save_probabilities=True) == ["x", "y"]
    assert merge(folders, out) == ["x", "y"]  # the record tells all files of a case
    assert merge(folders[:1], out) == ["x", "y"]
    (out / "made_from.json").write_text("{")
    assert merge(folders[:1], out) == ["x", "y"]


def test_all_that_a_case_is_made_of_counts(tmp_path):
    """Its geometry, the segmentation that a model's own postprocessing reads, and the descriptions."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    out, post = tmp_path / "out", Postprocessing(tmp_path, ({"labels_or_regions": 1},))
    assert merge(folders, out, [post, None]) == ["x", "y"]
    assert merge(folders, out, [post, None]) == []
    os.utime(folders[1] / "x.pkl", (1, 1))
    assert merge(folders, out, [post, None]) == ["x"]
    os.utime(folders[0] / "y.nii.gz", (1, 1))
    assert merge(folders, out, [post, None]) == ["y"]
    os.utime(folders[1] / "y.nii.gz", (1, 1))  # nobody reads it
    assert merge(folders, out, [post, None]) == []
    for name in ("dataset.json", "plans.json"):
        path = folders[1] / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"description": "another"}))
        assert merge(folders, out, [post, None]) == ["x", "y"]
    (folders[1] / "x.pkl").unlink()
    with pytest.raises(EnsembleError, match=r"x\.pkl cannot be read"):
        merge(folders, out, [post, None])


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    """While the first one is at work; afterwards nothing of the lock is left. The folder's name may be as long as any."""
    folders, out = [write_folder(tmp_path / str(i), i) for i in range(2)], tmp_path / ("o" * 255)
    with merging.alone_in(out), pytest.raises(OutputError, match=r"another process is writing .*ooo"):
        merge(folders, out)
    assert merge(folders, out) == ["x", "y"]
    assert not list(out.glob(".*"))


def test_a_bad_case_does_not_stop_the_others(tmp_path):
    """It is named with file and class; nothing of it is written, and once it is mended it alone is made."""
    folders = [write_folder(tmp_path / str(i), i, cases=("x", "y", "z")) for i in range(2)]
    bad = draw(5, dataset())
    bad[2, 1, 1, 1] = np.nan
    np.savez_compressed(folders[1] / "y.npz", probabilities=bad)
    with pytest.raises(
        EnsembleError, match=r"1 case not averaged \(the others are\): case 'y': .*1/y\.npz has 1 values.*class 2"
    ):
        merge(folders, tmp_path / "out", save_probabilities=True)
    assert {name.split(".")[0] for name in visible(tmp_path / "out")} == {"x", "z", "dataset", "plans", "made_from"}
    np.savez_compressed(folders[1] / "y.npz", probabilities=draw(5, dataset()))
    assert merge(folders, tmp_path / "out", save_probabilities=True) == ["y"]


def test_background_takes_the_place_of_what_a_models_own_postprocessing_removes(tmp_path):
    """Voxel by voxel: probability 1 for the background, before the average; regions: 0 for all."""
    step = {"labels_or_regions": [1, 2]}
    for labels in (LABELS, REGIONS):
        described = dataset(labels)
        folders = [write_folder(tmp_path / f"{len(labels)}{i}{'whole' in labels}", i, labels=labels) for i in range(2)]
        far = np.zeros((6, 7, 8), bool)
        far[:2, :2, :2] = True  # a component of its own, smaller than the other
        for folder in folders:
            probabilities_of = draw(3, described)
            probabilities_of[:, ~far] = 0
            probabilities_of[0, 3:] = 1 if "whole" in labels else 0
            probabilities_of[1, 3:] = 0 if "whole" in labels else 1
            if labels is LABELS:
                probabilities_of[0, ~far] = 1 - probabilities_of[1, ~far]
            write_case(folder, "x", probabilities_of, described)
            write_case(folder, "y", probabilities_of, described)
        out = tmp_path / f"out{'whole' in labels}"
        merge(folders, out, [Postprocessing(tmp_path, (step,)), None], save_probabilities=True)
        first, second = (np.load(folder / "x.npz")["probabilities"] for folder in folders)
        removed = far & (read(folders[0] / "x.nii.gz") != 0)
        assert removed.any()
        expected = first.copy()
        expected[:, removed] = 0
        if labels is LABELS:
            expected[0, removed] = 1
        np.testing.assert_array_equal(np.load(out / "x.npz")["probabilities"], (expected + second) / np.float32(2))


def test_nnunets_postprocessing_after_the_average_changes_labels_alone(tmp_path):
    """The segmentation is what the postprocessing makes of the average's; probabilities stay."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    labels = np.random.default_rng(0).choice(3, (6, 7, 8), p=[0.9, 0.05, 0.05])  # scattered voxels
    for folder in folders:
        write_case(folder, "x", np.eye(3, dtype=np.float32)[labels].transpose(3, 0, 1, 2), dataset())
    post = Postprocessing(tmp_path, ({"labels_or_regions": 1}, {"labels_or_regions": 2}))
    merge(folders, tmp_path / "plain", save_probabilities=True)
    merge(folders, tmp_path / "out", postprocessing=post, save_probabilities=True)
    before, after = read(tmp_path / "plain" / "x.nii.gz"), read(tmp_path / "out" / "x.nii.gz")
    np.testing.assert_array_equal(after, post(before))
    assert (after != before).any()
    np.testing.assert_array_equal(*(np.load(tmp_path / name / "x.npz")["probabilities"] for name in ("plain", "out")))


def test_the_average_is_nnunets_function(tmp_path):
    """``average`` itself, of three members, whose order of summation matters in single precision."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(3)]
    paths = [folder / "x.npz" for folder in folders]
    found = np.empty((3, 6, 7, 8), np.float32)
    merging.average(paths, [None] * 3, found, has_regions=False)
    np.testing.assert_array_equal(found, average_probabilities([str(path) for path in paths]))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"labels": {"background": 0, "a": 1, "c": 2}},
            r'of different datasets: labels \{"background": 0, "a": 1, "c": 2\}',
        ),
        ({"channel_names": {"0": "CT"}}, r"channels \[\"CT\"\] and \[\"T0\"\]"),
        ({"file_ending": ".nrrd"}, 'file ending ".nrrd" and ".nii.gz"'),
    ],
)
def test_predictions_of_different_datasets_are_refused(tmp_path, change, what):
    """By their labels, channels or files, before anything is written."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    (folders[1] / "dataset.json").write_text(json.dumps(dataset() | change))
    with pytest.raises(EnsembleError, match=what):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_regions_in_another_order_are_refused(tmp_path):
    """They are other channels, though the labels are the same."""
    folders = [write_folder(tmp_path / str(i), i, labels=REGIONS) for i in range(2)]
    other = dict(reversed(REGIONS.items()))
    (folders[1] / "dataset.json").write_text(json.dumps(dataset() | {"labels": other, "regions_class_order": [1, 2]}))
    with pytest.raises(EnsembleError, match="of different datasets: labels"):
        merge(folders, tmp_path / "out")


def test_readers_that_turn_axes_otherwise_are_refused(tmp_path):
    """Plans with different readers give arrays with different axes."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    (folders[1] / "plans.json").write_text(json.dumps(tiny_plans() | {"image_reader_writer": "NibabelIOWithReorient"}))
    with pytest.raises(EnsembleError, match=r"reads images with NibabelIOWithReorient and .* with SimpleITKIO"):
        merge(folders, tmp_path / "out")


def _origin(folder):
    write_case(folder, "y", draw(1, dataset()), dataset(), origin=(0.0, 1.0, 0.0))


def _spacing(folder):
    write_case(folder, "y", draw(1, dataset()), dataset(), spacing=(1.0, 2.0, 3.5))


def _shape(folder):
    write_case(folder, "y", draw(1, dataset(), (6, 7, 9)), dataset())


def _classes(folder):
    np.savez_compressed(folder / "y.npz", probabilities=draw(1, dataset())[:2])


def _missing(folder):
    (folder / "y.npz").unlink()


def _no_properties(folder):
    (folder / "y.pkl").unlink()


def _no_description(folder):
    (folder / "dataset.json").unlink()


def _no_probabilities(folder):
    for path in folder.glob("*.npz"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_origin, r"case 'y': .* differ in origin \(\[0.0, 1.0, 0.0\] and \[0.0, 0.0, 0.0\]\)"),
        (_spacing, r"case 'y': .* differ in spacing"),
        (_shape, r"case 'y': .*has shape 6 x 7 x 9 and .* 6 x 7 x 8"),
        (_classes, r"y\.npz has 2 classes, and the labels of .* are 3"),
        (_missing, r"1 lacks probabilities of 1 of 2 cases \(y\)"),
        (_no_properties, r"y\.pkl cannot be read \(No such file"),
        (_no_description, r"dataset\.json cannot be read \(No such file"),
        (_no_probabilities, r"has no probabilities \(\.npz\): predict with --save_probabilities"),
    ],
)
def test_predictions_that_do_not_go_together_are_refused(tmp_path, change, what):
    """Before any case is written, naming the file."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    change(folders[1])
    with pytest.raises(EnsembleError, match=what):
        merge(folders, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.nii.gz"))


def test_no_member_is_overwritten(tmp_path):
    """The output is none of the folders that are read."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    with pytest.raises(EnsembleError, match="is one of the folders that are averaged"):
        merge(folders, tmp_path / "2" / ".." / "1")


def test_a_killed_merge_leaves_nothing_that_is_taken_for_finished(tmp_path, monkeypatch):
    """Killed while the second case is written: the first is kept, and the next run makes the second and leaves nothing."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    write = merging.write_prediction

    def killed(segmentation, shares, told, reader, target, ending):
        if target.endswith("y"):
            raise KeyboardInterrupt
        write(segmentation, shares, told, reader, target, ending)

    monkeypatch.setattr(merging, "write_prediction", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(folders, tmp_path / "out")
    assert "y.nii.gz" not in visible(tmp_path / "out")
    monkeypatch.setattr(merging, "write_prediction", write)
    assert merge(folders, tmp_path / "out") == ["y"]
    assert not [name for name in visible(tmp_path / "out") if name.startswith(".")]
