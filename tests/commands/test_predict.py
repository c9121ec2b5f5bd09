import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
from tiny_models import segmentation, visible, write_image, write_model

from nnunet_norm.cli import build_parser, main
from nnunet_norm.errors import TilingError

NNUNET_FLAGS = {
    *("-i", "-o", "-d", "-p", "-tr", "-c", "-f", "-chk", "-step_size", "-prev_stage_predictions", "-device"),
    *("-npp", "-nps", "-num_parts", "-part_id", "--disable_tta", "--save_probabilities", "--continue_prediction"),
    *("--verbose", "--disable_progress_bar", "--not_on_device"),
}
OUR_FLAGS = {"-m", "--tile-size", "--halo", "--execution", "--population", "--scratch", "--max-memory", "--no_folding"}
OUR_FLAGS |= {"--batches", "--controls", "--trust-checkpoint", "--level", "--verify_parts"}
OUR_FLAGS |= {"--slurm", "--slurm_partition", "--slurm_gpus", "--slurm_cpus", "--slurm_memory", "--slurm_minutes"}
OUR_FLAGS |= {"--slurm_array_limit", "--slurm_setup", "--slurm_wait"}
HERE = ["-npp", "0", "-nps", "0", "-device", "cpu", "--disable_progress_bar"]
NAME = "Dataset901_Tiny/nnUNetTrainer__nnUNetPlans__3d_fullres"


@pytest.fixture(autouse=True)
def threads():
    """The command takes all threads, as nnU-Net's does."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """nnUNet_results with a model, and a folder of images."""
    (tmp_path / "Dataset901_Tiny").mkdir()
    write_model(tmp_path / NAME)
    write_image(tmp_path / "images", "a_0000")
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


def predict(place, *arguments):
    return main(["predict", "-i", str(place / "images"), "-o", str(place / "out"), *HERE, *arguments])


def refusal(place, capsys, *arguments):
    """The one line on stderr of a call that is refused."""
    assert predict(place, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    return line


def test_flags_are_nnunets():
    """Every flag of nnUNetv2_predict, and ours; its defaults."""
    parser = build_parser(["predict"])
    subparser = parser._subparsers._group_actions[0].choices["predict"]
    flags = {flag for action in subparser._actions for flag in action.option_strings}
    assert flags - {"-h", "--help", "--debug"} == NNUNET_FLAGS | OUR_FLAGS
    args = parser.parse_args(["predict", "-i", "a", "-o", "b"])
    assert (args.tr, args.p, args.f, args.chk) == (
        "nnUNetTrainer",
        "nnUNetPlans",
        [0, 1, 2, 3, 4],
        "checkpoint_final.pth",
    )
    assert (args.npp, args.nps, args.device, args.num_parts, args.part_id) == (3, 3, "cuda", 1, 0)
    assert (args.execution, args.population, args.scratch, args.max_memory) == ("auto", None, None, None)


def test_predicts_a_folder(place, capsys):
    """By dataset number: by default stage by stage, with the plan on stdout and in the record."""
    assert predict(place, "-d", "901", "-c", "3d_fullres", "-f", "0") == 0
    out = capsys.readouterr().out
    assert out.count("Please cite") == 1
    assert out.count("image of 20 x 22 x 24 voxels: ") == 1
    assert "in one pass; statistics: stored; " in out
    assert "a.nii.gz" in visible(place / "out")
    record = json.loads((place / "out" / "halo_prediction.json").read_text())
    assert (record["a"]["plan"], record["a"]["population"], record["a"]["exact"]) == ("stages", "stored", True)


def test_predicts_a_folder_in_tiles(place, capsys):
    """Where tiles are asked for, with tiles and halo on stdout."""
    assert predict(place, "-d", "901", "-c", "3d_fullres", "-f", "0", "--tile-size", "16", "--halo", "4") == 0
    out = capsys.readouterr().out
    assert (
        "image of 20 x 22 x 24 voxels: 8 tiles of at most 16 x 16 x 16, halo before/after per axis: 4/4 (given)" in out
    )
    assert "a.nii.gz" in visible(place / "out")
    record = json.loads((place / "out" / "halo_prediction.json").read_text())
    assert record["a"]["tile_size"] == [16, 16, 16]
    assert record["a"]["why_tiles"] == "--tile-size or --halo was given, which are for tiles"


def test_flags_reach_the_predictor(place, monkeypatch):
    """Each with the value that was written; sizes in bytes."""
    given = {}

    def predictor(**options):
        given.update(options)
        raise TilingError("far enough")

    monkeypatch.setattr("nnunet_norm.prediction.HaloPredictor", predictor)
    flags = ("--execution", "stages", "--population", "image", "--scratch", "/scratch/of/mine", "--max-memory", "1.5G")
    assert predict(place, "-m", str(place / NAME), *flags) == 2
    expected = {"execution": "stages", "population": "image", "scratch": "/scratch/of/mine", "max_memory": 3 * 2**29}
    assert {name: given[name] for name in expected} == expected
    assert predict(place, "-m", str(place / NAME)) == 2
    assert {given[name] for name in ("population", "scratch", "max_memory")} == {None}


def test_scratch_lies_in_the_folder_and_is_gone_afterwards(place, monkeypatch):
    """Stage by stage with files: the same segmentation as in memory, and an empty folder."""
    monkeypatch.setattr("nnunet_norm.prediction.ways.BLOCK_BYTES", 2**14)
    scratch = place / "scratch"
    assert predict(place, "-m", str(place / NAME), "-f", "0", "--scratch", str(scratch), "--max-memory", "8G") == 0
    assert visible(scratch) == []
    record = json.loads((place / "out" / "halo_prediction.json").read_text())
    assert record["a"]["scratch"] == "disk"
    on_disk = segmentation(place / "out" / "a.nii.gz")
    assert predict(place, "-m", str(place / NAME), "-f", "0") == 0
    assert (segmentation(place / "out" / "a.nii.gz") == on_disk).all()


@pytest.mark.parametrize("norm", ["InstanceNorm3d", "BatchNorm3d"])
@pytest.mark.parametrize("population", ["image", "tile", "batch"])
def test_population_is_recorded(place, population, norm):
    """Whether a network has statistics of its own or not, those that are used are chosen by that flag alone."""
    write_model(place / "model", norm=f"torch.nn.{norm}")
    assert predict(place, "-m", str(place / "model"), "-f", "0", "--population", population) == 0
    record = json.loads((place / "out" / "halo_prediction.json").read_text())
    plan = {"image": "stages", "tile": "tiles", "batch": "stages"}[population]
    assert (record["a"]["plan"], record["a"]["population"]) == (plan, population)


def test_model_folder_stands_for_the_names(place, monkeypatch, capsys):
    """-m needs neither -d nor nnUNet_results."""
    monkeypatch.delenv("nnUNet_results")
    assert predict(place, "-m", str(place / NAME), "-f", "0") == 0
    assert "a.nii.gz" in visible(place / "out")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-step_size", "0.5"], "-step_size 0.5 has no meaning here"),
        ([], "no model is named: give -d and -c"),
        (["-d", "901", "-c", "x", "-part_id", "2"], "-part_id 2 must be from 0 to 0"),
        (["-d", "901", "-c", "x", "-npp", "-1"], "-npp -1 and -nps 0 must not be negative"),
        (["-d", "902", "-c", "x"], "-d 902 should be one dataset"),
        (["-d", "Tiny", "-c", "x"], "-d 'Tiny' is neither a number nor a name"),
        (["-d", "901", "-c", "2d"], "beside it: nnUNetTrainer__nnUNetPlans__3d_fullres"),
        (["-d", "901", "-c", "3d_fullres"], "no checkpoint_final.pth for fold 1, 2, 3, 4; folds that have it"),
        (["-m", "M", "-f", "0", "--halo", "much"], "halo 'much' is unknown: choose auto, exact, erf"),
        (["-m", "M", "-f", "0", "--halo", "auto", "8"], "--halo auto 8 is neither a word nor numbers"),
        (
            ["-m", "M", "-f", "0", "--halo", "40", "--tile-size", "64"],
            "halo 40 leaves no core of a tile of 64 on axis 0",
        ),
        (["-m", "M", "--max-memory", "much"], "--max-memory 'much' is no size: give a number and a unit"),
        (
            ["-m", "M", "-f", "0", "--population", "image", "--execution", "tiles"],
            "tiles cannot use the whole image's statistics, and --execution tiles was chosen",
        ),
        (
            ["-m", "M", "-f", "0", "--batches", "F"],
            "--batches is for --population batch, and --population was not given: choose that, or leave --batches out",
        ),
        (
            ["-m", "M", "-f", "0", "--population", "batch", "--controls"],
            "--controls are those of --batches, which is not",
        ),
        (
            ["-m", "I", "-f", "0", "--population", "stored"],
            "'stored' does not exist for this network: encoder.stages.0",
        ),
        (["-m", "I", "-f", "0", "--execution", "tiles"], "or choose --population tile, as nnU-Net does"),
        (
            ["-m", "I", "-f", "0", "--halo", "4"],
            "and --tile-size or --halo was given: leave that out, or choose --popula",
        ),
        (
            ["-m", "I", "-f", "0", "--execution", "stages", "--population", "tile"],
            "tile needs --execution tiles (or auto)",
        ),
        (["-m", "M", "-f", "0", "--execution", "stages", "--halo", "4"], "leave them out, or choose --execution tiles"),
        (
            ["-m", "M", "-f", "0", "--execution", "stages", "--max-memory", "1M"],
            "and --max-memory 1 MiB do not suffice",
        ),
        (["-m", "I", "-f", "0", "--max-memory", "1M"], "else choose --population tile, as nnU-Net does"),
        (
            ["-m", "M", "-f", "0", "--scratch", "F"],
            "images/a_0000.nii.gz' cannot be used (File exists): choose another",
        ),
        (
            ["-m", "M", "-f", "0", "--tile-size", "8", "8"],
            "tile size 8 x 8 does not suit a network with 3 spatial axes",
        ),
    ],
)
def test_wrong_input_gets_one_line(place, capsys, arguments, expected):
    """Exit code 2 and what to do, without a traceback."""
    write_model(place / "instance", norm="torch.nn.InstanceNorm3d")
    names = {"M": NAME, "I": "instance", "F": "images/a_0000.nii.gz"}
    arguments = [str(place / names[argument]) if argument in names else argument for argument in arguments]
    line = refusal(place, capsys, *arguments)
    assert line.startswith("nnunet-norm predict: ")
    assert expected in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--execution", "blocks"], "argument --execution: invalid choice: 'blocks'"),
        (["--population", "tiles"], "argument --population: invalid choice: 'tiles'"),
        (["--max-memory", "much"], "--max-memory 'much' is no size"),
        (["--halo", "auto", "8"], "--halo auto 8 is neither a word nor numbers"),
    ],
)
def test_what_needs_no_model_is_refused_before_nnunet_is_imported(tmp_path, arguments, expected):
    """In a process of its own: nnU-Net takes seconds to import."""
    code = f"""if True:
        import sys
        from nnunet_norm.cli import main
        try:
            code = main(["predict", "-i", "a", "-o", "b", "-m", {str(tmp_path)!r}, *{arguments!r}])
        except SystemExit as exit:
            code = exit.code
        print(code, "nnunetv2" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"
    (line,) = done.stderr.splitlines()
    assert expected in line


def test_missing_results_folder_gets_one_line(place, capsys, monkeypatch):
    """nnUNet_results is named, and what does without it."""
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results is not set: export it, or give" in refusal(place, capsys, "-d", "901", "-c", "3d_fullres")


def test_cuda_without_cuda_gets_one_line(place, capsys, monkeypatch):
    """With the remedy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(place, capsys, "-m", str(place / NAME), "-device", "cuda")
    assert "-device cuda is not available on this machine: use -device cpu" in line


def test_fold_must_be_a_number_or_all(place, capsys):
    """argparse says so, with its usage."""
    with pytest.raises(SystemExit):
        predict(place, "-m", str(place / NAME), "-f", "first")
    assert "'first' is neither a number nor 'all'" in capsys.readouterr().err


def test_tile_size_may_be_auto(place, capsys):
    """The tile that costs least, here the whole image; another word is refused."""
    flags = ("-m", str(place / NAME), "-f", "0", "--execution", "tiles", "--tile-size")
    assert predict(place, *flags, "auto") == 0
    record = json.loads((place / "out" / "halo_prediction.json").read_text())
    assert (record["a"]["tiles"], record["a"]["exact"]) == (1, True)
    assert "--tile-size large is neither auto nor numbers" in refusal(place, capsys, *flags, "large")


def test_the_error_of_a_small_halo_is_said_and_recorded(place, capsys):
    """Measured on the image: in one line on stdout, and in the record."""
    assert predict(place, "-m", str(place / NAME), "-f", "0", "--tile-size", "12", "--halo", "1") == 0
    assert capsys.readouterr().out.count("the halo is smaller than the theoretical reach: on ") == 1
    error = json.loads((place / "out" / "halo_prediction.json").read_text())["a"]["measured_error"]
    assert error["logits"] > 0
    assert error["exact"]
