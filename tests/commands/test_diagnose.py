import base64
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
from tiny_models import plans, segmentation, visible, write_image, write_model
from trained_models import write_trained

from nnunet_norm.cli import main
from nnunet_norm.errors import ArchitectureError
from nnunet_norm.metrics import class_masks, dice

SHAPE = (18, 34, 20)
HERE = ["-device", "cpu", "--disable_progress_bar"]
INSTANCE = "torch.nn.InstanceNorm3d"


@pytest.fixture(autouse=True)
def one_thread(one_thread, monkeypatch):
    """The command takes all threads, as nnU-Net's does; for images this small that is slower."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model with InstanceNorm, and the raw dataset that it belongs to, with a split."""
    write_model(tmp_path / "model", norm=INSTANCE)
    raw = tmp_path / "raw" / "Dataset901_Tiny"
    raw.mkdir(parents=True)
    for seed, name in enumerate("abc"):
        write_image(raw / "imagesTr", f"{name}_0000", shape=SHAPE, seed=seed)
        write_labels(raw / "labelsTr" / f"{name}.nii.gz", seed=seed)
    folder = tmp_path / "preprocessed" / "Dataset901_Tiny"
    folder.mkdir(parents=True)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b", "c"]}]))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return tmp_path


def write_labels(path, *, shape=SHAPE, seed=0, largest=2):
    path.parent.mkdir(exist_ok=True)
    labels = np.random.default_rng(seed).integers(0, largest + 1, shape).astype(np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(path))


def diagnose(place, *arguments, model="model"):
    return main(["diagnose", "-m", str(place / model), *HERE, *arguments])


def refusal(place, capsys, *arguments, model="model"):
    """The one line on stderr of a call that is refused."""
    assert diagnose(place, *arguments, model=model) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("nnunet-norm diagnose: ")
    return line


def found(folder):
    return json.loads((folder / "diagnosis.json").read_text())


class Sources(HTMLParser):
    """Every attribute of a page that could load something."""

    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_a_stock_model_on_its_own_validation_cases(place, capsys):
    """The sentence and the paths on stdout; the numbers; a page that holds its figures and loads nothing."""
    assert diagnose(place, "--cases", "1") == 0
    out = capsys.readouterr().out.splitlines()
    folder = place / "model" / "fold_0" / "diagnosis"
    assert out[-2:] == [str(folder / "diagnosis.html"), str(folder / "diagnosis.json")]
    assert out[-3].startswith(
        "Predictions of this model depend on the tile: InstanceNorm3d normalizes with the statistics"
    )
    numbers = found(folder)
    assert numbers["verdict"] == {"kind": "problem", "sentence": out[-3]}
    assert [case["case"] for case in numbers["cases"]] == ["b"]
    assert numbers["source"] == "validation cases of fold 0 of Dataset901_Tiny"
    assert (numbers["model"]["trainer"], numbers["model"]["classes"]) == ("nnUNetTrainer", ["a", "b"])
    assert numbers["tile_mismatch"]["max_dist"] > 1e-3
    assert numbers["stages_mismatch"]["max_dist"] < 1e-4
    assert numbers["train_eval_disparity"]["mean"] == 0
    assert [row["tile_size"] for row in numbers["dice_against_tile_size"]] == [[8] * 3, [16] * 3, [32] * 3, None]
    assert all(row["seconds"] > 0 for row in numbers["dice_against_tile_size"])
    assert 0 < numbers["labels_changed"] < 1
    page = (folder / "diagnosis.html").read_text()
    reader = Sources()
    reader.feed(page)
    assert len(reader.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert "url(" not in page
    assert out[-3] in page.replace("&#x27;", "'")
    for source in reader.sources:
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()


def test_dice_is_that_of_the_predictions_of_nnunet_and_of_the_whole_image(place):
    """Against predictions that are made here: nnU-Net's own predictor, and the network on the whole image."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    assert diagnose(place, "--cases", "1", "-o", str(place / "out")) == 0
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(place / "model"), (0,), "checkpoint_final.pth")
    raw = place / "raw" / "Dataset901_Tiny"
    image = segmentation(raw / "imagesTr" / "b_0000.nii.gz")
    image = torch.from_numpy((image - image.mean()) / image.std())[None]
    labels = torch.from_numpy(segmentation(raw / "labelsTr" / "b.nii.gz"))
    reference = torch.stack([labels == 1, labels == 2])[None]
    tiled = predictor.predict_sliding_window_return_logits(image)
    with torch.no_grad():
        whole = predictor.network.eval()(image[None])[0]
    rows = found(place / "out")["dice_against_tile_size"]
    for logits, row in ((tiled, rows[1]), (whole, rows[-1])):
        expected = dice(class_masks(logits[None]), reference).tolist()
        assert list(row["dice"].values()) == pytest.approx(expected, abs=2e-3)
    changed = (class_masks(tiled[None]) != class_masks(whole[None])).any(1).float().mean().item()
    assert rows[1]["labels_changed"] == pytest.approx(changed, abs=2e-3)


def test_a_model_with_stored_statistics_has_no_problem(place, capsys):
    """BatchRenorm with open limits, as its training left it: no disparity, and a seamless prediction."""
    write_trained(place / "brn", "nnUNetTrainerBRN")
    assert diagnose(place, "--max-voxels", "5000", "-o", str(place / "out"), model="brn") == 0
    assert "No normalization problem was found: BatchRenorm3d has stored statistics" in capsys.readouterr().out
    numbers = found(place / "out")
    assert numbers["train_eval_disparity"]["mean"] < 0.05 < numbers["train_eval_disparity"]["mean_of_batch_statistics"]
    assert [case["case"] for case in numbers["cases"]] == ["b", "c"]


def test_finished_parts_are_kept(place, monkeypatch, capsys):
    """Interrupted after the first case, a second call measures the rest and gives what one call gives."""
    from nnunet_norm.diagnosis import run

    small = ("--max-voxels", "5000")  # faster
    assert diagnose(place, *small, "-o", str(place / "whole")) == 0
    measure, measured = run.measure_case, []

    def once(model, case, *arguments):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case.name)
        return measure(model, case, *arguments)

    monkeypatch.setattr(run, "measure_case", once)
    assert diagnose(place, *small, "-o", str(place / "out")) == 130
    assert "finished work is kept" in capsys.readouterr().err
    assert "case_b.json" in visible(place / "out" / "parts")
    assert not (place / "out" / "diagnosis.json").exists()
    measured.append("the first call")
    monkeypatch.setattr(
        run, "measure_case", lambda model, case, *rest: measured.append(case.name) or measure(model, case, *rest)
    )
    assert diagnose(place, *small, "-o", str(place / "out")) == 0
    assert measured == ["b", "the first call", "c"]
    texts = [re.sub(r'"seconds\w*": [^,}]+', "", json.dumps(found(place / name))) for name in ("whole", "out")]
    first, second = (re.sub(r'"(whole|nnunet)": [\d.]+', "", text) for text in texts)
    assert first == second
    write_model(place / "other", norm=INSTANCE, folds=(0,))
    assert diagnose(place, *small, "-o", str(place / "out"), model="other") == 0
    assert measured[3:] == ["b", "c"]  # of another model nothing is kept


def test_images_without_labels(place, capsys):
    """Agreement with the whole image stands in the place of Dice, and is called so."""
    arguments = ("-i", str(place / "raw" / "Dataset901_Tiny" / "imagesTr"), "--cases", "1", "-o", str(place / "out"))
    assert diagnose(place, *arguments) == 0
    numbers = found(place / "out")
    assert not numbers["labels"]
    assert numbers["dice_against_tile_size"][0]["dice"] is None
    assert 0 < numbers["dice_against_tile_size"][0]["agreement"]["a"] < 1
    assert "There were no labels" in (place / "out" / "diagnosis.html").read_text()


def test_large_images_are_cut_and_it_is_said(place):
    """To their middle, with the same voxels of the labels."""
    assert diagnose(place, "--cases", "1", "--max-voxels", "5000", "-o", str(place / "out")) == 0
    (case,) = found(place / "out")["cases"]
    assert case["whole_shape"] == list(SHAPE)
    assert np.prod(case["shape"]) <= 5000
    assert "the middle of 18 x 34 x 20" in (place / "out" / "diagnosis.html").read_text()


def test_receptive_field_alone(place, capsys):
    """Printed, drawn, and kept as JSON; nothing is predicted."""
    assert diagnose(place, "--receptive-field", "-o", str(place / "out")) == 0
    out = capsys.readouterr().out
    assert "total stride: x 2, y 2, z 2" in out
    assert "theoretical receptive field, of any voxel: x 4/3, y 4/3, z 4/3 voxels before/after" in out
    assert "effective receptive field (3 sigma): x " in out
    assert (
        "normalizes with statistics of the tile: 3 x InstanceNorm3d (the first: encoder.stages.0.0.convs.0.norm)" in out
    )
    assert visible(place / "out") == ["parts", "receptive_field.json", "receptive_field.png"]
    Image.open(place / "out" / "receptive_field.png").verify()


def test_a_network_that_has_no_stages_is_one_tile_as_a_whole(place, capsys, monkeypatch):
    """Then the whole image's statistics are shown, and not advised: nnunet-norm predict cannot have them."""
    monkeypatch.setattr("nnunet_norm.prediction.HaloPredictor.graph", property(lambda self: "an operator is not known"))
    assert diagnose(place, "--cases", "1", "--max-voxels", "5000", "-o", str(place / "out")) == 0
    assert "cannot be run stage by stage, so it cannot have the statistics of the whole" in capsys.readouterr().out
    numbers = found(place / "out")
    assert numbers["cases"][0]["plan"] == "tiles"
    assert numbers["dice_against_tile_size"][-1]["tile_size"] is None
    assert numbers["stages_mismatch"]["verdict"] == "not measured"


def test_a_network_of_one_size_is_measured_as_far_as_it_goes(place, capsys, monkeypatch):
    """With its patch alone: no other tiles, no whole image, and it is said what was not measured."""

    def no_field(self):
        raise ArchitectureError("this network takes one extent")

    monkeypatch.setattr("nnunet_norm.prediction.HaloPredictor.field", property(no_field))
    assert diagnose(place, "--cases", "1", "-o", str(place / "out")) == 0
    assert "Not everything could be measured: whether predictions depend on the tile" in capsys.readouterr().out
    numbers = found(place / "out")
    assert [row["tile_size"] for row in numbers["dice_against_tile_size"]] == [[16, 16, 16]]
    assert numbers["tile_mismatch"]["why_none"] == "this network takes one extent"
    assert numbers["cases"][0]["why_not_whole"] == "this network takes one extent"
    assert numbers["labels_changed"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cases", "0"], "--cases 0 must be at least 1"),
        (["--max-voxels", "0"], "--max-voxels 0 must be at least 1"),
        (["-l", "labels"], "-l 'labels' are labels of the images of -i, which is not given: give both"),
        (["-i", "empty"], "has no image ending in '.nii.gz', as dataset.json has it"),
        (["-i", "nowhere"], "does not exist: give the folder with the images (-i)"),
        (["-i", "raw/Dataset901_Tiny/imagesTr", "-l", "empty"], "(-l) lacks a.nii.gz, b.nii.gz, c.nii.gz"),
        (
            ["-i", "raw/Dataset901_Tiny/imagesTr", "-l", "small"],
            "of shape (4, 4, 4) do not fit the image of case 'a' of (18",
        ),
        (["-i", "raw/Dataset901_Tiny/imagesTr", "-l", "foreign"], "have the value 3, which dataset.json does not name"),
        (["-f", "1"], "has no checkpoint_final.pth for fold 1; folds that have it (choose with -f): 0"),
        (["-o", "raw/Dataset901_Tiny/imagesTr/a_0000.nii.gz"], "cannot be written (File exists): choose another (-o)"),
        (["-prev_stage_predictions", "empty"], "is of no use: this configuration is not the second stage of a cascade"),
    ],
)
def test_wrong_input_gets_one_line(place, capsys, arguments, expected):
    """Exit code 2 and what to do, without a traceback."""
    (place / "empty").mkdir()
    for name in "abc":
        write_labels(place / "small" / f"{name}.nii.gz", shape=(4, 4, 4))
        write_labels(place / "foreign" / f"{name}.nii.gz", largest=3)
    arguments = [str(place / word) if flag in ("-i", "-o") or word in ("empty", "small", "foreign") else word
                 for flag, word in zip([None, *arguments], arguments, strict=False)]  # fmt: skip
    assert expected in refusal(place, capsys, *arguments)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (
            "nnUNet_raw",
            "no images: nnUNet_raw is not set, so those of Dataset901_Tiny cannot be found: give images with -i",
        ),
        ("model", "is missing in model folder"),
    ],
)
def test_what_cannot_be_found_gets_one_line(place, capsys, monkeypatch, variable, expected):
    """The dataset of the model, or a part of the model itself."""
    if variable == "model":
        (place / "model" / "plans.json").unlink()
    else:
        monkeypatch.delenv(variable)
    assert expected in refusal(place, capsys)


def test_without_a_split_it_is_said_that_cases_were_trained_on(place):
    """For fold "all", or where nnUNet_preprocessed is elsewhere."""
    (place / "preprocessed" / "Dataset901_Tiny" / "splits_final.json").unlink()
    assert diagnose(place, "--cases", "1", "-o", str(place / "out"), "--max-voxels", "5000") == 0
    assert found(place / "out")["source"].startswith(
        "the first training cases of Dataset901_Tiny, since no split tells"
    )


def test_the_plans_of_the_tiny_model_are_what_these_tests_assume():
    """A patch of 16 and a stride of 2: the image is larger than the patch on every axis."""
    configuration = plans()["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [16, 16, 16]
    assert min(SHAPE) > 16
