import gc
import json
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.ensembling.ensemble import average_probabilities, merge_files
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.data_iterators import PreprocessAdapter
from tiny_models import segmentation, visible, write_image, write_model

from nnunet_norm.errors import InputImageError, OutputError, SetupError, TilingError
from nnunet_norm.prediction import HaloPredictor, case_labels, journal
from nnunet_norm.prediction.work_folder import WorkFolder
from nnunet_norm.prediction.workers import Preprocessing, Workers

FILES = ["dataset.json", "halo_prediction.json", "plans.json", "predict_from_raw_data_args.json"]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", folds=(0, 1))


@pytest.fixture
def images(tmp_path):
    for number in range(3):
        write_image(tmp_path / "images", f"case_{number}_0000", seed=number)
    return tmp_path / "images"


def load(model, folds=(0,), **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(model), folds)
    return made


def predict(predictor, images, output, **options):
    return predictor.predict_from_files_sequential(str(images), str(output), **options)


def test_files_are_those_of_nnunet_and_ensembling_takes_them(model, images, tmp_path):
    """Segmentations, probabilities and properties that nnU-Net averages and merges, and how each case was predicted."""
    folds = [load(model, (fold,)) for fold in (0, 1)]
    outputs = [tmp_path / "out_0", tmp_path / "out_1"]
    for predictor, output in zip(folds, outputs, strict=True):
        predict(predictor, images, output, save_probabilities=True)
    cases = [f"case_{n}{ending}" for n in range(3) for ending in (".nii.gz", ".npz", ".pkl")]
    assert visible(outputs[0]) == sorted([*cases, *FILES])
    files = [str(output / "case_1.npz") for output in outputs]
    mean = average_probabilities(files)
    merge_files(files, str(tmp_path / "merged"), ".nii.gz", SimpleITKIO(), folds[0].label_manager)
    assert np.array_equal(segmentation(tmp_path / "merged.nii.gz"), mean.argmax(0))
    assert np.array_equal(segmentation(outputs[0] / "case_1.nii.gz"), np.load(files[0])["probabilities"].argmax(0))
    record = json.loads((outputs[0] / "halo_prediction.json").read_text())
    assert sorted(record) == ["case_0", "case_1", "case_2"]
    assert record["case_0"] == json.loads(json.dumps(folds[0].record()))
    assert record["case_0"]["image_shape"] == [20, 22, 24]


def test_workers_write_what_this_process_writes(model, images, tmp_path):
    """Spawned preprocessing and export give the same segmentations, and a case with NaN is left out and named."""
    write_image(images, "case_3_0000", value=np.nan)
    predictor = load(model)
    with pytest.raises(
        InputImageError, match=r"^1 case not predicted .*: image 'case_3_0000.nii.gz' of case 'case_3' has 1 values"
    ):
        predictor.predict_from_files(
            str(images), str(tmp_path / "a"), num_processes_preprocessing=1, num_processes_segmentation_export=1
        )
    (images / "case_3_0000.nii.gz").unlink()
    predict(predictor, images, tmp_path / "b")
    assert (
        visible(tmp_path / "a") == visible(tmp_path / "b") == sorted([*(f"case_{n}.nii.gz" for n in range(3)), *FILES])
    )
    for number in range(3):
        name = f"case_{number}.nii.gz"
        assert np.array_equal(segmentation(tmp_path / "a" / name), segmentation(tmp_path / "b" / name))


def test_results_are_returned_where_no_output_is_named(model, images, tmp_path):
    """Without an output the segmentations come back, equal to those that are written."""
    predictor = load(model)
    returned = predictor.predict_from_files_sequential(str(images), None)
    predict(predictor, images, tmp_path / "out")
    for number, array in enumerate(returned):
        assert np.array_equal(array, segmentation(tmp_path / "out" / f"case_{number}.nii.gz"))


def test_continued_prediction_leaves_out_what_is_there(model, images, tmp_path):
    """Only the missing case is predicted; the record keeps the others."""
    predictor, output = load(model), tmp_path / "out"
    predict(predictor, images, output)
    before = (output / "case_0.nii.gz").stat().st_mtime_ns
    (output / "case_1.nii.gz").unlink()
    predict(predictor, images, output, overwrite=False)
    assert (output / "case_0.nii.gz").stat().st_mtime_ns == before
    assert (output / "case_1.nii.gz").exists()
    assert sorted(json.loads((output / "halo_prediction.json").read_text())) == ["case_0", "case_1", "case_2"]


@pytest.mark.parametrize("streams", [True, False], ids=["box by box", "in one piece"])
@pytest.mark.parametrize("execution", ["stages", "tiles"])
def test_a_stopped_prediction_is_continued_to_the_same_files(model, images, tmp_path, monkeypatch, execution, streams):
    """Wherever it was; also where all logits are held in memory until they are resampled, which no other process has."""
    monkeypatch.setattr(journal, "NOTE_EVERY", 0.0)
    if not streams:
        monkeypatch.setattr(case_labels, "box_resampler", lambda *_: None)
    for number in (1, 2):
        (images / f"case_{number}_0000.nii.gz").unlink()
    predictor, scratch = load(model, (0, 1), execution=execution, scratch=tmp_path / "scratch"), tmp_path / "scratch"
    steps, left = [0], [10**6]

    def check(workers):
        steps[0], left[0] = steps[0] + 1, left[0] - 1
        if left[0] < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "check", check)
    predict(predictor, images, tmp_path / "whole", save_probabilities=True)
    for stop in range(1, steps[0], max(steps[0] // 4, 1)):
        output = tmp_path / f"stopped at {stop}"
        left[0] = stop
        with pytest.raises(KeyboardInterrupt):
            predict(predictor, images, output, save_probabilities=True)
        assert visible(output) == sorted(set(FILES) - {"halo_prediction.json"})
        assert (len(list(scratch.rglob("manifest.json"))) == 1) == (streams and stop > 1)
        left[0] = 10**6
        predict(predictor, images, output, save_probabilities=True, overwrite=False)
        assert visible(output) == visible(tmp_path / "whole")
        assert visible(scratch) == []
        for name in ("case_0.nii.gz", "halo_prediction.json"):
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        probabilities = [np.load(folder / "case_0.npz")["probabilities"] for folder in (output, tmp_path / "whole")]
        assert np.array_equal(*probabilities)


def test_parts_divide_the_cases_and_keep_records_of_their_own(model, images, tmp_path):
    """Two calls that may run at the same time do not write the same file, but for what is equal."""
    for part in range(2):
        load(model).predict_from_files(str(images), str(tmp_path / "out"), False, True, 0, 0, None, 2, part)
    records = [json.loads((tmp_path / "out" / f"halo_prediction_part_{part}.json").read_text()) for part in range(2)]
    assert [sorted(record) for record in records] == [["case_0", "case_2"], ["case_1"]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"population": "image", "execution": "tiles"}, "tiles cannot use the whole image's statistics"),
        ({"execution": "stages", "halo": 4}, "--tile-size and --halo are for tiles: leave them out"),
    ],
)
def test_options_that_never_go_together_are_refused_before_anything_is_written(
    model, images, tmp_path, options, expected
):
    """Not after the first case was preprocessed."""
    with pytest.raises(TilingError, match=expected):
        predict(load(model, **options), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scratch_folder_that_cannot_be_used_is_refused_before_anything_is_written(model, images, tmp_path):
    """A file is in its place."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"scratch folder '.*/file' cannot be used \(File exists\): choose another"):
        predict(load(model, scratch=tmp_path / "file"), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folds_and_scratch_on_disk_give_the_files_that_memory_gives(model, images, tmp_path):
    """The result lies in a file that has no name any more; exporting it in another process does not mind."""
    for name, workers in (("scratch", 1), (None, 0)):
        predictor = load(model, (0, 1), scratch=name and tmp_path / name)
        output = str(tmp_path / f"out_{name}")
        predictor.predict_from_files(str(images), output, True, True, 0, workers)
        (tmp_path / "scratch").mkdir(exist_ok=True)
        assert visible(tmp_path / "scratch") == []
    record = json.loads((tmp_path / "out_scratch" / "halo_prediction.json").read_text())
    assert {plan["scratch"] for plan in record.values()} == {"disk"}
    for number in range(3):
        first, second = (np.load(tmp_path / out / f"case_{number}.npz") for out in ("out_scratch", "out_None"))
        assert np.array_equal(first["probabilities"], second["probabilities"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_case_that_is_not_finite_is_named_and_the_others_are_predicted(model, images, tmp_path, value):
    """The error comes at the end, when everything else is done."""
    write_image(images, "case_1_0000", value=value)
    with pytest.raises(
        InputImageError,
        match=r"^1 case not predicted .* image 'case_1_0000.nii.gz' .* has 1 values",
    ):
        predict(load(model), images, tmp_path / "out")
    assert visible(tmp_path / "out") == sorted(["case_0.nii.gz", "case_2.nii.gz", *FILES])


def test_no_others_are_claimed_where_no_case_is_predicted(model, images, tmp_path):
    """Every case is named, and none is said to be there."""
    for number in range(3):
        write_image(images, f"case_{number}_0000", value=np.nan)
    with pytest.raises(InputImageError, match=r"^3 cases not predicted: "):
        predict(load(model), images, tmp_path / "out")


def test_an_unreadable_case_is_named_and_the_others_are_predicted(model, images, tmp_path):
    """A truncated file."""
    file = images / "case_1_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(
        InputImageError, match=r"^1 case not predicted .* image 'case_1_0000.nii.gz' .* cannot be read: "
    ):
        predict(load(model), images, tmp_path / "out")
    assert visible(tmp_path / "out") == sorted(["case_0.nii.gz", "case_2.nii.gz", *FILES])


def test_missing_channels_are_refused_before_anything_is_written(tmp_path):
    """The case, what it has and what the model needs, and the missing file."""
    model = write_model(tmp_path / "model", channels=2)
    for name in ("a_0000", "a_0001", "b_0000", "c_0000"):
        write_image(tmp_path / "images", name)
    expected = r"^case 'b' has 1 channel, the model needs 2 \(T0, T1\): missing b_0001.nii.gz; also c$"
    with pytest.raises(InputImageError, match=expected):
        predict(load(model), tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preprocessing_is_nnunets_with_and_without_a_previous_stage(model, images, tmp_path):
    """The same array and properties as nnU-Net's own adapter, the previous stage's labels one-hot behind the image."""
    predictor = load(model)
    predict(predictor, images, tmp_path / "previous")
    files = [str(images / "case_0_0000.nii.gz")]
    managers = predictor.plans_manager, predictor.dataset_json, predictor.configuration_manager
    preprocessing = Preprocessing(managers[0], managers[2], managers[1], verbose=False)
    preprocessor = managers[2].preprocessor_class(verbose=False)
    for previous in (None, str(tmp_path / "previous" / "case_0.nii.gz")):
        expected = next(PreprocessAdapter([files], [previous], preprocessor, [None], *managers))
        data, properties = preprocessing(files, previous)
        assert np.array_equal(data, expected["data"].numpy())
        assert sorted(properties) == sorted(expected["data_properties"])
        assert len(data) == (3 if previous else 1)


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        pytest.param(lambda folder: None, "input folder '.*' does not exist", id="no folder"),
        pytest.param(lambda folder: folder.mkdir(), "has no image ending in '.nii.gz'", id="empty"),
        pytest.param(
            lambda folder: write_image(folder, "case"),
            "'case.nii.gz' in .* has no channel number: .* 'case_0000.nii.gz'",
        ),
    ],
)
def test_a_folder_without_cases_is_refused(model, tmp_path, prepare, expected):
    """No folder, no image, no channel number: in one line each."""
    prepare(tmp_path / "wrong")
    with pytest.raises(InputImageError, match=expected):
        predict(load(model), tmp_path / "wrong", tmp_path / "out")


def test_previous_stage_without_a_cascade_is_refused(model, images, tmp_path):
    """What would have no effect, or crash in the network, is refused."""
    with pytest.raises(InputImageError, match=r"'/previous' is of no use: .* not the second stage"):
        predict(load(model), images, tmp_path / "out", folder_with_segs_from_prev_stage="/previous")


def test_an_output_folder_that_cannot_be_made_is_refused(model, images, tmp_path):
    """Before anything is predicted."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"output folder '.*/file/out' cannot be written \(Not a directory\)"):
        predict(load(model), images, tmp_path / "file" / "out")


FULL_DISK = """
import resource, sys, torch
from nnunet_norm.errors import OutputError
from nnunet_norm.prediction import HaloPredictor, journal
from nnunet_norm.prediction.work_folder import WorkFolder

model, images, output = sys.argv[1:]
predictor = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, (0,))
predictor._write_what_ensembling_reads = lambda *args: None  # these small files come first
for limit, probabilities in ((4096, True), (100, False)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        predictor.predict_from_files_sequential(images, output, probabilities)
    except OutputError as error:
        print("refused:", error)
"""


def test_a_full_disk_leaves_nothing_behind(model, images, tmp_path):
    """A limit on file size in place of a full disk, for the probabilities and for the segmentation.

    One line each, no partial file under a final name, no temporary folder.
    """
    arguments = [str(path) for path in (model, images, tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("refused: case_0")]
    assert ["cannot be written" in line for line in lines] == [True, True], done.stdout + done.stderr
    assert visible(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full(model, images, tmp_path):
    """The same on a file system of 64 KiB, where the operating system allows one to be mounted."""
    output = tmp_path / "out"
    output.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(output)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OutputError, match=r"case_0.* cannot be written \(No space left on device\): make room"):
            predict(load(model), images, output, save_probabilities=True)
        assert set(visible(output)) <= set(FILES)
    finally:
        gc.collect()  # the error holds what was mapped
        subprocess.run(["umount", str(output)], check=True)


def test_workers_ended_from_outside_are_told():
    """A worker that the operating system kills gives one line with the flag, not a hang."""
    with Workers(1, "segmentation export", "-nps") as workers:
        future = workers.submit(os._exit, 1)
        with pytest.raises(
            SetupError, match=r"a segmentation export process was ended from outside, .* \(-nps below 1\)"
        ):
            workers.result(future)


def test_without_workers_the_task_runs_at_once():
    """The same interface, in this process."""
    with Workers(0, "preprocessing", "-npp") as workers:
        assert workers.result(workers.submit(Path, "a")) == Path("a")


def submit_until_told(workers):
    for _ in range(20):
        workers.submit(os.stat, "/nowhere")


def test_a_task_that_fails_is_told_when_the_next_is_submitted():
    """Also one that failed while a task waited for a free process."""
    with Workers(1, "segmentation export", "-nps") as workers, pytest.raises(FileNotFoundError):
        submit_until_told(workers)


def interrupted(futures):
    with Workers(1, "preprocessing", "-npp", finishes=False) as workers:
        futures += [workers.submit(time.sleep, 600) for _ in range(2)]
        raise KeyboardInterrupt


def test_what_nobody_will_use_is_not_waited_for():
    """After an error, preprocessing that is under way is ended; an export would be finished."""
    futures = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(futures)
    assert isinstance(futures[0].exception(), BrokenProcessPool)
    assert futures[1].cancelled() or isinstance(futures[1].exception(), BrokenProcessPool)


def test_continuing_removes_what_a_finished_case_left(model, images, tmp_path):
    """Its process was killed between the file's name and the end of its folder."""
    output = tmp_path / "out"
    predict(load(model), images, output)
    left = WorkFolder(output, str(output / "case_0"), resume=False)
    left.close(remove=False)
    predict(load(model), images, output, overwrite=False)
    assert not left.path.exists()
    assert not list(output.glob(".case_0*"))


def test_a_wrong_image_spoils_nothing_of_what_is_continued(model, images, tmp_path, monkeypatch):
    """It is refused before anything of the work folder is changed; then the right one gives the right labels."""
    monkeypatch.setattr(journal, "NOTE_EVERY", 0.0)
    options = {"execution": "tiles", "tile_size": [12]}
    predict(load(model, **options), images, tmp_path / "whole")
    stopped, steps = load(model, **options), []

    def check():
        steps.append(None)
        if len(steps) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(stopped), "check", property(lambda self: check, lambda self, value: None))
    with pytest.raises(KeyboardInterrupt):
        predict(stopped, images, tmp_path / "out")
    monkeypatch.undo()
    right = (images / "case_0_0000.nii.gz").read_bytes()
    for shape in ((20, 22, 24), (30, 22, 24)):
        write_image(images, "case_0_0000", shape=shape, seed=9)
        with pytest.raises(OutputError, match=r"holds what another prediction left \(other image\)"):
            predict(load(model, **options), images, tmp_path / "out", overwrite=False)
    (images / "case_0_0000.nii.gz").write_bytes(right)
    predict(load(model, **options), images, tmp_path / "out", overwrite=False)
    for number in range(3):
        files = [tmp_path / name / f"case_{number}.nii.gz" for name in ("whole", "out")]
        assert np.array_equal(*map(segmentation, files))
