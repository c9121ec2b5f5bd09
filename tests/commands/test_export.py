"""``nnunet-norm export``: what it writes runs where this package is not, and it says how."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
from tiny_models import segmentation, visible, write_image
from trained_models import add_what_a_training_leaves, write_trained

from nnunet_norm.cli import main

DATASET = "Dataset901_Tiny"
NAME = f"{DATASET}/nnUNetTrainerBRN__nnUNetPlans__3d_fullres"
NEW = f"{DATASET}/nnUNetTrainer__nnUNetPlans_BRN__3d_fullres"

WITHOUT = "sys.modules['nnunet_norm'] = None; "
"""An import of the package fails as where it is not installed."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """nnUNet_results with a model of two folds."""
    (tmp_path / DATASET).mkdir()
    add_what_a_training_leaves(write_trained(tmp_path / NAME, folds=(0, 1)))
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


def refusal(capsys, *arguments):
    """The one line on stderr of a call that is refused."""
    assert main(["export", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    return line


def nnunet(entry_point, *arguments, with_package):
    """Run a program of nnU-Net, with this package or without."""
    module, function = entry_point.split(":")
    code = f"import sys; {'' if with_package else WITHOUT}from {module} import {function}; {function}()"
    env = {name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"}
    if with_package:
        env["nnUNet_extTrainer"] = str(files("nnunet_norm.trainers"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"
TO_ZIP = "nnunetv2.model_sharing.entry_points:export_pretrained_model_entry"


def test_stock_nnunet_predicts_the_same_without_this_package(place, capsys, monkeypatch):
    """Segmentation and probabilities to the last bit, by dataset and plans' name; the line printed is the one to type."""
    write_image(place / "images", "a_0000")
    assert main(["export", "-d", "901", "-c", "3d_fullres", "-tr", "nnUNetTrainerBRN"]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    (use,) = [part for part in said.split("; ") if part.startswith("predict with nnUNetv2_predict ")]
    words = use.removeprefix("predict with nnUNetv2_predict ").split()
    words[words.index("IN")], words[words.index("OUT")] = str(place / "images"), str(place / "stock")
    more = ["-device", "cpu", "--save_probabilities", "--disable_progress_bar", "-npp", "0", "-nps", "0"]
    nnunet(PREDICT, *words, *more, with_package=False)
    nnunet(
        PREDICT, "-i", place / "images", "-o", place / "ours", "-d", 901, "-c", "3d_fullres", "-tr", "nnUNetTrainerBRN",
        "-f", 0, 1, *more, with_package=True,
    )  # fmt: skip
    assert len(np.unique(segmentation(place / "ours" / "a.nii.gz"))) > 1
    assert (segmentation(place / "stock" / "a.nii.gz") == segmentation(place / "ours" / "a.nii.gz")).all()
    mine, theirs = (np.load(place / name / "a.npz")["probabilities"] for name in ("stock", "ours"))
    assert np.array_equal(mine, theirs)


def test_the_folder_that_is_named_is_the_model(place, capsys, monkeypatch):
    """-o needs no nnUNet_results; nnU-Net's predictor takes the folder, and its output has the plans' new name."""
    write_image(place / "images", "a_0000")
    monkeypatch.delenv("nnUNet_results")
    target = place / "elsewhere" / "my_model"
    assert main(["export", "-m", str(place / NAME), "-o", str(target), "--plans-name", "mine", "-f", "0"]) == 0
    assert f"nnUNetv2_predict_from_modelfolder -m {target} -f 0 -i IN -o OUT" in capsys.readouterr().out
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(target), (0,))
    (place / "out").mkdir()
    predictor.predict_from_files_sequential(str(place / "images"), str(place / "out"))
    assert "a.nii.gz" in visible(place / "out")
    assert json.loads((place / "out" / "plans.json").read_text())["plans_name"] == "mine"


def test_nnunet_puts_the_model_into_its_zip_file(place):
    """With everything that it asks of a model, the fold's validation and picture among it."""
    assert main(["export", "-m", str(place / NAME), "-f", "0"]) == 0
    archive = place / "model.zip"
    nnunet(
        TO_ZIP, "-d", DATASET, "-o", archive, "-c", "3d_fullres", "-tr", "nnUNetTrainer", "-p", "nnUNetPlans_BRN", "-f", 0,
        with_package=False,
    )  # fmt: skip
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
    assert {f"{NEW}/{name}" for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth")} <= set(names)


def test_nothing_written_needs_this_package_to_be_opened(place):
    """Tensors and plain values alone: torch opens the checkpoint without running anybody's code."""
    assert main(["export", "-m", str(place / NAME)]) == 0
    for fold in (0, 1):
        path = place / NEW / f"fold_{fold}" / "checkpoint_final.pth"
        assert torch.load(path, weights_only=True)["trainer_name"] == "nnUNetTrainer"
        assert b"nnunet_norm." not in path.read_bytes()


def test_a_second_export_is_refused(place, capsys):
    """What is there stays as it is, and nothing is left beside it."""
    assert main(["export", "-m", str(place / NAME)]) == 0
    before = (place / NEW / "fold_0" / "checkpoint_final.pth").read_bytes()
    capsys.readouterr()
    assert "is there already, and is not overwritten" in refusal(capsys, "-m", place / NAME, "-f", "0")
    assert (place / NEW / "fold_0" / "checkpoint_final.pth").read_bytes() == before
    assert visible(place / DATASET) == [Path(NAME).name, Path(NEW).name]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no model is named: give -d and -c"),
        (["-m", "M", "-f", "7"], "no checkpoint_final.pth for fold 7; folds that have it (choose with -f): 0, 1"),
        (["-m", "M", "--plans-name", "a b"], "plans_name is 'a b'"),
        (["-m", "M", "-chk", "checkpoint_best.pth"], "no checkpoint_best.pth for fold 0 to 4"),
        (["--pretrained", "-m", "M"], "no -o with --pretrained"),
        (["--pretrained", "-m", "M", "-o", "x", "-f", "0", "1"], "-f 0 1 with --pretrained"),
        (["--pretrained", "-m", "M", "-o", "x", "--plans-name", "y"], "--plans-name with --pretrained"),
    ],
)
def test_refusals_name_what_is_wrong(place, capsys, arguments, expected):
    """In one line, with the choice or the remedy."""
    words = [str(place / NAME) if word == "M" else word for word in arguments]
    assert expected in refusal(capsys, *words)


def test_without_results_folder_a_place_is_asked_for(place, capsys, monkeypatch):
    """A model by its folder, and nowhere to write."""
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results is not set: export it, or give the folder to write with -o" in refusal(
        capsys, "-m", place / NAME
    )


def test_pretrained_weights_are_of_one_fold(place, capsys):
    """As before: the fold that is named, or fold 0, into one file."""
    assert main(["export", "--pretrained", "-m", str(place / NAME), "-o", str(place / "a.pth")]) == 0
    assert "fold 0, for nnUNetv2_train -pretrained_weights" in capsys.readouterr().out
    assert main(["export", "--pretrained", "-m", str(place / NAME), "-o", str(place / "b.pth"), "-f", "1"]) == 0
    weights = [torch.load(place / name)["network_weights"] for name in ("a.pth", "b.pth")]
    for fold, found in enumerate(weights):
        source = torch.load(place / NAME / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)[
            "network_weights"
        ]
        key = "encoder.stages.0.0.convs.0.conv.weight"
        assert torch.equal(found[key], source[key])
