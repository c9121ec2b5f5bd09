"""Volumes on disk: what is written is what the same images give as files, whole, in parts, and continued."""

import json
import shutil

import numpy as np
import pytest
import torch
import zarr
from tiny_models import segmentation, write_model

from nnunet_norm.errors import InputImageError, OutputError, PlansError, TilingError
from nnunet_norm.prediction import HaloPredictor, ways
from nnunet_norm.prediction import journal as journal_module
from nnunet_norm.prediction.volumes import VolumeOptions, VolumePrediction
from nnunet_norm.volumes import LabelVolume

SHAPE = (37, 42, 51)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", folds=(0, 1))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Volumes of a test have several shards."""
    from nnunet_norm.volumes import layout

    monkeypatch.setattr(layout, "CHUNK_VOXELS", 8**3)
    monkeypatch.setattr(layout, "SHARD_VOXELS", 16**3)


def load(model, folds=(0,), **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(model), folds)
    return made


def image_of(shape=SHAPE, seed=0, crop=True):
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if crop:
        array[:3], array[:, -5:], array[:, :, :7] = 0, 0, 0
    return array


def written(folder, array, name="case_0"):
    """The same image as NIfTI and as zarr."""
    import SimpleITK

    (folder / "images").mkdir(exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / "images" / f"{name}_0000.nii.gz"))
    path = folder / "volumes" / f"{name}.zarr"
    zarr.create_array(str(path), data=array, chunks=(16, 16, 16))
    return folder / "images", folder / "volumes"


def labels_of(path):
    return zarr.open_group(str(path), mode="r")["0"][:]


def change_plans(model, **keys):
    plans = json.loads((model / "plans.json").read_text())
    plans |= keys
    (model / "plans.json").write_text(json.dumps(plans))


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("options", [{}, {"execution": "tiles", "halo": 4, "tile_size": [16]}], ids=["stages", "tiles"])
def test_a_volume_gives_the_labels_of_the_same_image_as_a_file(model, tmp_path, transpose, options):
    """Read, cropped to what is not zero, transposed, normalized, predicted by two folds with mirroring, and put back."""
    change_plans(model, transpose_forward=list(transpose), transpose_backward=[int(i) for i in np.argsort(transpose)])
    images, volumes = written(tmp_path, image_of())
    load(model, (0, 1), **options).predict_from_files_sequential(str(images), str(tmp_path / "a"), True)
    VolumePrediction(
        load(model, (0, 1), **options), str(volumes), str(tmp_path / "b"), VolumeOptions(save_probabilities=True)
    ).run()
    group = zarr.open_group(str(tmp_path / "b" / "case_0.zarr"), mode="r")
    expected = np.load(tmp_path / "a" / "case_0.npz")["probabilities"]
    assert np.abs(group["probabilities"][:] - expected).max() < 1e-5
    differ = group["0"][:] != segmentation(tmp_path / "a" / "case_0.nii.gz")
    assert differ.mean() < 1e-4  # where two classes are equal but for rounding
    assert [path.name for path in (tmp_path / "b").glob(".*")] == []


@pytest.mark.parametrize("options", [{}, {"execution": "tiles"}], ids=["stages", "tiles"])
@pytest.mark.parametrize("num_parts", [2, 5])
def test_parts_make_the_volume_that_one_process_makes(model, tmp_path, options, num_parts):
    """Every part by itself, in any order; the output has its name when the last is finished, and not before."""
    _, volumes = written(tmp_path, image_of())
    VolumePrediction(
        load(model, **options), str(volumes), str(tmp_path / "whole"), VolumeOptions(save_probabilities=True)
    ).run()
    for part in (1, 0, *range(2, num_parts)):
        assert not (tmp_path / "parts" / "case_0.zarr").exists()
        made = VolumeOptions(save_probabilities=True, num_parts=num_parts, part_id=part)
        VolumePrediction(load(model, **options), str(volumes), str(tmp_path / "parts"), made).run()
    whole, parts = (zarr.open_group(str(tmp_path / name / "case_0.zarr"), mode="r") for name in ("whole", "parts"))
    assert np.abs(whole["probabilities"][:] - parts["probabilities"][:]).max() < 1e-5
    assert (whole["0"][:] != parts["0"][:]).mean() < 1e-4
    assert [path.name for path in (tmp_path / "parts").glob(".*")] == []


def predicted(model, volumes, output, options=None, **more):
    VolumePrediction(load(model, **more), str(volumes), str(output), options or VolumeOptions()).run()


def test_a_part_that_is_missing_or_damaged_is_named_at_verification(model, tmp_path):
    """With the command that mends it; the output has no name before."""
    _, volumes = written(tmp_path, image_of())
    output = tmp_path / "out"
    for part in (0, 2):
        predicted(model, volumes, output, VolumeOptions(num_parts=3, part_id=part))
    verified = VolumePrediction(load(model), str(volumes), str(output), VolumeOptions(num_parts=3))
    with pytest.raises(
        OutputError, match=r"case_0.zarr: part 1 of 3 is not finished: predict it .* -num_parts 3 -part_id 1"
    ):
        verified.verify()
    (mark,) = output.rglob("part_2_of_3.json")
    file = sorted(json.loads(mark.read_text())["files"])[0]
    (mark.parent.parent / file).unlink()
    predicted(model, volumes, output, VolumeOptions(num_parts=3, part_id=1, resume=True))
    with pytest.raises(OutputError, match=r"part 2 of 3 is not finished"):
        verified.verify()
    mark.unlink()
    predicted(model, volumes, output, VolumeOptions(num_parts=3, part_id=2, resume=True))
    assert (output / "case_0.zarr").is_dir()
    verified.verify()
    assert not list(output.glob(".*"))


def test_a_process_that_stops_leaves_what_the_next_continues(model, tmp_path, monkeypatch):
    """Stopped in the middle of a volume, in either plan: the same files as without."""
    monkeypatch.setattr(journal_module, "NOTE_EVERY", 0.0)
    _, volumes = written(tmp_path, image_of())
    for name, options in {"stages": {"scratch": tmp_path / "scratch"}, "tiles": {"execution": "tiles"}}.items():
        predicted(model, volumes, tmp_path / name, **options)
        for stop in (3, 6, None):
            predictor, steps = load(model, **options), []

            def check(stop=stop, steps=steps):
                steps.append(None)
                if stop is not None and len(steps) > stop:
                    raise KeyboardInterrupt

            predictor.check = check
            made = VolumePrediction(predictor, str(volumes), str(tmp_path / "again"), VolumeOptions(resume=True))
            if stop is None:
                made.run()
            else:
                with pytest.raises(KeyboardInterrupt):
                    made.run()
        assert np.array_equal(labels_of(tmp_path / name / "case_0.zarr"), labels_of(tmp_path / "again" / "case_0.zarr"))
        shutil.rmtree(tmp_path / "again")
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("norm", "options", "parts", "expected"),
    [
        (
            "InstanceNorm3d",
            {},
            2,
            r"-num_parts 2 divides a volume, and .*norm takes the statistics of all of it, .* recalibrate",
        ),
        ("BatchNorm3d", {"population": "batch"}, 1, r"--population batch is for images in memory: .*recalibrate"),
    ],
)
def test_what_a_volume_cannot_have_is_refused_with_the_reason(tmp_path, norm, options, parts, expected):
    """Before anything is written."""
    model = write_model(tmp_path / "model", norm=f"torch.nn.{norm}")
    _, volumes = written(tmp_path, image_of())
    with pytest.raises(TilingError, match=expected):
        predicted(model, volumes, tmp_path / "out", VolumeOptions(num_parts=parts), **options)
    assert not (tmp_path / "out").exists()


def test_plans_that_would_resample_are_refused_with_the_remedy(model, tmp_path):
    """The level that fits is not there: resample, or other plans."""
    group = zarr.create_group(str(tmp_path / "case_0.zarr"))
    scale = [{"type": "scale", "scale": [3.0, 1.0, 1.0]}]
    axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}], "version": "0.4"}
    group.attrs["multiscales"] = [image]
    group.create_array("0", data=image_of())
    with pytest.raises(
        PlansError, match=r"spacing of 3 x 1 x 1 .* a volume on disk is not resampled: resample the volume"
    ):
        predicted(model, tmp_path / "case_0.zarr", tmp_path / "out")


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5, 6)])
def test_a_volume_of_the_wrong_rank_is_refused(model, tmp_path, shape):
    """With what is expected."""
    zarr.create_array(str(tmp_path / "case_0.zarr"), data=np.zeros(shape, np.float32))
    with pytest.raises(InputImageError, match=r"array of rank \d, .*: its axes must be"):
        predicted(model, tmp_path / "case_0.zarr", tmp_path / "out")


def test_an_output_that_is_not_finished_is_no_input(model, tmp_path):
    """It is told for what it is."""
    _, volumes = written(tmp_path, image_of())
    predicted(model, volumes, tmp_path / "out", VolumeOptions(num_parts=2, part_id=0))
    (unfinished,) = (tmp_path / "out").glob(".*.unfinished")
    unfinished.rename(tmp_path / "case_9.zarr")
    with pytest.raises(InputImageError, match="unfinished"):
        predicted(model, tmp_path / "case_9.zarr", tmp_path / "other")


def test_two_processes_do_not_write_one_part(model, tmp_path):
    """The second is refused while the first is at work."""
    _, volumes = written(tmp_path, image_of())
    first = VolumePrediction(load(model), str(volumes), str(tmp_path / "out"), VolumeOptions())
    with first._work("case_0.zarr"), pytest.raises(OutputError, match=r"another process is writing '.*case_0.zarr'"):
        predicted(model, volumes, tmp_path / "out")


def test_memory_that_is_short_sends_scratch_to_the_output(model, tmp_path, monkeypatch):
    """Without --scratch; the record tells, and nothing is left there."""
    _, volumes = written(tmp_path, image_of())
    predicted(model, volumes, tmp_path / "a")
    monkeypatch.setattr(ways, "ALLOCATOR_BYTES", 0)
    monkeypatch.setattr(ways, "BLOCKS_AT_A_TIME", 1)
    monkeypatch.setattr(ways, "anonymous_memory", lambda: 0)
    predicted(model, volumes, tmp_path / "b", max_memory=3 * 2**19)
    record = json.loads((tmp_path / "b" / "halo_prediction.json").read_text())
    assert record["case_0"]["scratch"] == "disk"
    assert np.array_equal(labels_of(tmp_path / "a" / "case_0.zarr"), labels_of(tmp_path / "b" / "case_0.zarr"))
    assert list((tmp_path / "b").glob(".*")) == []


def test_an_output_never_replaces_its_input(model, tmp_path):
    """Neither in the same folder, nor in one of the other."""
    _, volumes = written(tmp_path, image_of())
    for source, output in (
        (volumes, volumes),
        (volumes / "case_0.zarr", volumes),
        (volumes / "case_0.zarr", volumes / "case_0.zarr"),
    ):
        with pytest.raises(OutputError, match=r"would replace the image: choose another folder \(-o\)"):
            predicted(model, source, output)
    assert np.array_equal(zarr.open_array(str(volumes / "case_0.zarr"))[:], image_of())


def test_a_second_run_does_not_touch_what_the_first_has_begun(model, tmp_path, monkeypatch):
    """It is refused before it removes or makes anything, at any moment of the first."""
    _, volumes = written(tmp_path, image_of())
    predicted(model, volumes, tmp_path / "alone")
    original, refused = LabelVolume.write, []

    def write(self, *args):
        files = original(self, *args)
        with pytest.raises(OutputError, match="another process is writing"):
            predicted(model, volumes, tmp_path / "out", VolumeOptions(save_probabilities=True))
        refused.append(True)
        return files

    monkeypatch.setattr(LabelVolume, "write", write)
    predicted(model, volumes, tmp_path / "out")
    assert refused
    assert np.array_equal(labels_of(tmp_path / "alone" / "case_0.zarr"), labels_of(tmp_path / "out" / "case_0.zarr"))


def test_what_was_made_otherwise_is_not_taken_for_finished(model, tmp_path):
    """Continuing refuses it; and a part of a run that replaces it is not finished by it."""
    other = write_model(tmp_path / "other", features=3)
    _, volumes = written(tmp_path, image_of())
    predicted(other, volumes, tmp_path / "out")
    with pytest.raises(
        OutputError, match=r"is there already, and was made with another model, image or options: remove it"
    ):
        predicted(model, volumes, tmp_path / "out", VolumeOptions(resume=True))
    predicted(model, volumes, tmp_path / "out", VolumeOptions(num_parts=2, part_id=0))
    with pytest.raises(OutputError, match="part 1 of 2 is not finished"):
        VolumePrediction(load(model), str(volumes), str(tmp_path / "out"), VolumeOptions(num_parts=2)).verify()
    predicted(model, volumes, tmp_path / "out", VolumeOptions(num_parts=2, part_id=1, resume=True))
    predicted(model, volumes, tmp_path / "whole", VolumeOptions())
    assert (labels_of(tmp_path / "out" / "case_0.zarr") != labels_of(tmp_path / "whole" / "case_0.zarr")).mean() < 1e-4


def test_too_many_parts_leave_nothing_behind(model, tmp_path):
    """Refused with the largest number before anything is made; then fewer will do."""
    _, volumes = written(tmp_path, image_of())
    with pytest.raises(TilingError, match=r"num_parts 5000: .*choose 1 to \d+ parts"):
        predicted(model, volumes, tmp_path / "out", VolumeOptions(num_parts=5000))
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_while_it_gives_the_name_loses_nothing(model, tmp_path, monkeypatch):
    """Before and after the renaming: the next one only finishes."""
    _, volumes = written(tmp_path, image_of())
    original = LabelVolume.finish
    for moment in ("before", "after"):
        output = tmp_path / moment

        def finish(self, moment=moment):
            if moment == "after":
                original(self)
            raise KeyboardInterrupt

        monkeypatch.setattr(LabelVolume, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            predicted(model, volumes, output)
        monkeypatch.setattr(LabelVolume, "finish", original)
        again = load(model)
        again.predict_to = None  # nothing is left to be predicted
        VolumePrediction(again, str(volumes), str(output), VolumeOptions(resume=True)).run()
        assert not list((output / "case_0.zarr").glob(".*"))
        assert [path.name for path in output.glob(".*") if "finishing" not in path.name] == []
