import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path += [str(Path(__file__).parent.parent / name) for name in ("prediction", "ensembling")]
from predicted import write_folder
from tiny_models import segmentation, visible, write_image, write_model

from nnunet_norm.cli import build_parser, main
from nnunet_norm.ensembling import Model, Search
from nnunet_norm.errors import EnsembleError

FLAGS = {"-i", "-o", "-m", "-d", "-f", "--save_npz", "--postprocessing", "-pp_pkl_file", "-np", "--scratch", "-chk"}
FLAGS |= {"--disable_tta", "--population", "--batches", "--controls", "--max-memory", "-npp", "-nps", "-device"}
FLAGS |= {
    "--keep_members",
    "--trust-checkpoint",
    "--find",
    "--sweep",
    "-c",
    "--metric",
    "--tolerance",
    "--hd95",
    "--candidates",
}
FLAGS |= {"--disable_progress_bar"}
QUIET = ["--disable_progress_bar", "-np", "1"]
HERE = ["-npp", "0", "-nps", "0", "-device", "cpu", *QUIET]
NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture(autouse=True)
def threads():
    """The command takes all threads, as nnU-Net's does."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def refusal(capsys, *arguments):
    """The one line on stderr of a call that is refused."""
    assert main(["ensemble", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    return line


def test_flags_are_nnunets():
    """Those of nnUNetv2_ensemble, and ours; its defaults."""
    parser = build_parser(["ensemble"])
    subparser = parser._subparsers._group_actions[0].choices["ensemble"]
    flags = {flag for action in subparser._actions for flag in action.option_strings}
    assert flags - {"-h", "--help", "--debug"} == FLAGS
    args = parser.parse_args(["ensemble", "-i", "a", "b", "-o", "c"])
    assert (args.i, args.save_npz, args.postprocessing, args.metric, args.chk) == (
        ["a", "b"],
        False,
        "none",
        "Dice",
        "checkpoint_final.pth",
    )


def test_folders_are_averaged(tmp_path, capsys):
    """As nnUNetv2_ensemble is called; a second call has nothing to do."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    line = ["ensemble", "-i", *map(str, folders), "-o", str(tmp_path / "out"), "--save_npz", *QUIET]
    assert main(line) == 0
    total = sum(np.load(folder / "x.npz")["probabilities"] for folder in folders)
    np.testing.assert_array_equal(segmentation(tmp_path / "out" / "x.nii.gz"), total.argmax(0))
    assert "2 of them averaged now" in capsys.readouterr().out
    assert main(line) == 0
    assert "2 cases in" in (said := capsys.readouterr().out)
    assert "0 of them averaged now" in said


@pytest.mark.parametrize("by_name", [True, False])
def test_images_are_predicted_by_models_and_averaged(tmp_path, monkeypatch, by_name):
    """By names under nnUNet_results or by folders, each with its own folds."""
    (tmp_path / "Dataset901_Tiny").mkdir()
    write_model(tmp_path / "Dataset901_Tiny" / NAME, folds=(0, 1, 2))
    write_model(tmp_path / "Dataset901_Tiny" / NAME.replace("Plans", "Others"), folds=(1,))
    write_image(tmp_path / "images", "a_0000")
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    models = [f"{NAME}:0,2", NAME.replace("Plans", "Others")]
    folders = [str(tmp_path / "Dataset901_Tiny" / name) for name in models]
    which = ["-d", "901", "-m", *models] if by_name else ["-m", *folders]
    where = ["-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    assert main(["ensemble", *which, "-f", "1", *where, "--keep_members", *HERE]) == 0
    assert visible(tmp_path / "out" / "members") == [f"{NAME.replace('Plans', 'Others')}__fold_1", f"{NAME}__fold_0_2"]
    total = sum(np.load(path)["probabilities"] for path in (tmp_path / "out" / "members").glob("*/a.npz"))
    np.testing.assert_array_equal(segmentation(tmp_path / "out" / "a.nii.gz"), total.argmax(0))


def test_a_search_gets_its_flags(monkeypatch, tmp_path):
    """Each with the value that was written."""
    given = {}

    def run(self, models):
        given.update(vars(self), models=models)
        raise EnsembleError("far enough")

    monkeypatch.setattr(Search, "run", run)
    folders = [str(tmp_path / name) for name in ("a__b__c", "d__e__f")]
    flags = [
        "--metric",
        "NSD",
        "--tolerance",
        "2",
        "liver=3",
        "--candidates",
        "3",
        "-np",
        "5",
        "-f",
        "0",
        "2",
        "--hd95",
    ]
    assert main(["ensemble", "--find", "-m", *folders, *flags]) == 2
    assert [(str(model.folder), model.folds) for model in given["models"]] == [(folder, (0, 2)) for folder in folders]
    assert (given["metric"], given["num_candidates"], given["num_processes"]) == ("NSD", 3, 5)
    assert (dict(given["options"].tolerance), given["options"].hd95) == ({"*": 2.0, "liver": 3.0}, True)


def test_names_of_models_do_not_depend_on_the_working_folder(monkeypatch, tmp_path):
    """Relative folders become absolute, for the commands that are printed; a name with -d is that of the dataset's model."""
    given = {}

    def run(self, models):
        given["folders"] = [str(model.folder) for model in models]
        raise EnsembleError("far enough")

    monkeypatch.setattr(Search, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / NAME).mkdir()
    assert main(["ensemble", "--find", "-m", NAME, f"other/../{NAME}", "-f", "0"]) == 2
    assert given["folders"] == [str(tmp_path / NAME)] * 2
    assert main(["ensemble", "--find", "-d", "Dataset901_Tiny", "-m", NAME, f"./{NAME}", "-f", "0"]) == 2
    assert given["folders"] == [str(tmp_path / "results" / "Dataset901_Tiny" / NAME), str(tmp_path / NAME)]


def test_a_sweep_names_models_and_folds(monkeypatch, tmp_path):
    """All points of the grid; its folds, unless others are given, and its dataset."""
    given = {}

    def load_grid(source, **options):
        given.update(options, source=source)
        folds = (0, 1) if options["folds"] is None else tuple(options["folds"])
        return SimpleNamespace(points=("p", "q"), model_folder=tmp_path.joinpath, folds=folds, folder=tmp_path)

    def run(self, models):
        given["models"] = models
        raise EnsembleError("far enough")

    monkeypatch.setattr("nnunet_norm.sweep.grid.load_grid", load_grid)
    monkeypatch.setattr(Search, "run", run)
    for flags, folds in (([], (0, 1)), (["-f", "1"], (1,))):
        assert main(["ensemble", "--find", "--sweep", "amos", "-d", "218", "-c", "2d", *flags]) == 2
        assert (given["source"], given["dataset"], given["configuration"]) == ("amos", "218", "2d")
        assert given["models"] == [Model(tmp_path / "p", folds), Model(tmp_path / "q", folds)]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "-i is missing: give folders to average"),
        (["-i", "a"], "-o is missing: give the folder to write"),
        (["--find", "-i", "a", "-m", "b"], "-i is of no use with --find"),
        (["--find"], "--find needs models: give either -d and -m, or --sweep"),
        (["--find", "-m", "a", "--sweep", "b"], "--find needs models: give either"),
        (["-i", "a", "-o", "b", "--sweep", "c"], "--sweep is of no use without --find"),
        (["-i", "a", "-o", "b", "--hd95"], "--hd95 is of no use without --find"),
        (["-m", "m", "-i", "a", "-o", "b", "-c", "2d"], "-c is of no use without --find"),
        (["--find", "-m", "a", "-c", "2d"], "-c is of no use with -m, as a model's name says its configuration"),
        (["--find", "-m", "a", "--save_npz"], "--save_npz is of no use with --find, which predicts nothing"),
        (["--find", "-m", "a", "--postprocessing", "after"], "--postprocessing is of no use with --find"),
        (["--find", "-m", "a", "-pp_pkl_file", "b"], "-pp_pkl_file is of no use with --find"),
        (["--find", "-m", "a", "-device", "cpu"], "-device is of no use with --find"),
        (["-i", "a", "b", "-o", "c", "-d", "4"], "-d is of no use without -m, as nothing is predicted: leave it out"),
        (["-i", "a", "b", "-o", "c", "-f", "0"], "-f is of no use without -m"),
        (["-i", "a", "b", "-o", "c", "-device", "cpu"], "-device is of no use without -m"),
        (["-i", "a", "b", "-o", "c", "--population", "tile"], "--population is of no use without -m"),
        (["-i", "a", "b", "-o", "c", "--keep_members"], "--keep_members is of no use without -m"),
        (["-i", "a", "b", "-o", "c", "--max-memory", "1G"], "--max-memory is of no use without -m"),
        (["-m", "m:0,0", "-i", "a", "-o", "b"], "-m m:0,0 has a fold twice (0, 0): give every fold once"),
        (["-m", "m", "-f", "1", "2", "1", "-i", "a", "-o", "b"], "-m m has a fold twice (1, 2, 1)"),
        (["-m", "m", "-i", "a", "b", "-o", "c"], "-i a b: with -m, give one folder of images"),
        (["-i", "a", "b", "-o", "c", "-np", "-1"], "-np -1"),
        (["--find", "-m", "a", "--candidates", "0"], "--candidates 0 must be at least 1"),
        (["-i", "a", "b", "-o", "c", "--postprocessing", "each"], "name the files with -pp_pkl_file"),
        (
            ["-i", "a", "b", "-o", "c", "-pp_pkl_file", "d"],
            "-pp_pkl_file has 1 file, and --postprocessing none takes none",
        ),
        (["-i", "a", "b", "-o", "c", "--postprocessing", "each", "-pp_pkl_file", "d"], "each takes 2"),
        (["-m", "m", "-i", "a", "-o", "c", "--max-memory", "lots"], "--max-memory 'lots' is no size"),
        (["-i", "a", "-o", "c"], "-i a is no folder"),
        (["-d", "901", "-m", "wrong", "-i", "a", "-o", "c"], "-m 'wrong' is neither a folder nor <trainer>__<plans>__"),
    ],
)
def test_refusals_are_one_line(capsys, tmp_path, monkeypatch, arguments, what):
    """What is missing, of no use, or contradicts another flag."""
    monkeypatch.chdir(tmp_path)
    assert what in refusal(capsys, *arguments)


def test_postprocessing_that_runs_code_is_refused(capsys, tmp_path):
    """The file is named, and nothing is averaged."""
    folders = [write_folder(tmp_path / str(i), i) for i in range(2)]
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(([subprocess.run], [{}])))
    line = ["-i", *folders, "-o", tmp_path / "out", "--postprocessing", "after", "-pp_pkl_file", tmp_path / "bad.pkl"]
    assert "bad.pkl would call subprocess.run when it is read" in refusal(capsys, *line)
    assert not (tmp_path / "out").exists()
