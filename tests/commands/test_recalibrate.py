"""``nnunet-norm recalibrate``: a model folder per population with its statistics, which nnU-Net runs; the old one stays."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "prediction"))
from tiny_models import segmentation, visible, write_image
from trained_models import flat, write_trained

from nnunet_norm.cli import main
from nnunet_norm.layers import find_norms
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.model_writing import load_model

DATASET = "Dataset901_Tiny"
NAME = f"{DATASET}/nnUNetTrainerBRN__nnUNetPlans__3d_fullres"
NEW = f"{DATASET}/nnUNetTrainerBRN__nnUNetPlans_recalibrated__3d_fullres"
HERE = ["-npp", "0", "-device", "cpu", "--disable_progress_bar"]
CASES = [f"case_{number}" for number in range(4)]
FILE = {
    "batches": {"case_0": "Scanner 1", "case_1": "B", "case_2": "Scanner 1", "case_3": "B"},
    "controls": ["case_1", "case_2"],
}


@pytest.fixture(autouse=True)
def threads():
    """The command takes all threads, as nnU-Net's does."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """nnUNet_results with a model of two folds, and images of two experimental batches."""
    (tmp_path / DATASET).mkdir()
    write_trained(tmp_path / NAME, folds=(0, 1))
    for number, case in enumerate(CASES):
        write_image(tmp_path / "images", f"{case}_0000", seed=number, shape=(16, 16, 16))
    (tmp_path / "batches.json").write_text(json.dumps(FILE))
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


MODEL = ["-d", "901", "-c", "3d_fullres", "-tr", "nnUNetTrainerBRN"]


def recalibrate(place, *arguments, model=MODEL):
    return main(["recalibrate", *model, "-i", str(place / "images"), *HERE, *map(str, arguments)])


def refusal(place, capsys, *arguments, model=MODEL):
    """The one line on stderr of a call that is refused."""
    assert recalibrate(place, *arguments, model=model) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    return line


def predict(folder, images, output, **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(folder), None)
    made.predict_from_files_sequential(str(images), str(output), save_probabilities=True)


def models(place):
    return [name for name in visible(place / DATASET) if "recalibrated" in name]


def preprocessed(folder, place, cases):
    """The images as they come to the network, as one batch."""
    preprocessing = load_model(folder, [0], "checkpoint_final.pth").preprocessing
    data = [preprocessing([str(place / "images" / f"{case}_0000.nii.gz")], None)[0] for case in cases]
    return torch.stack([torch.from_numpy(image) for image in data])


def require_statistics_of(folder, batch, source):
    """The written statistics are those that train mode takes of the whole batch, in every fold; weights are as they were."""
    for fold in (0, 1):
        network = load_model(folder, [fold], "checkpoint_final.pth").bare_network
        old = load_model(source, [fold], "checkpoint_final.pth").bare_network.state_dict()
        state = {key: value.clone() for key, value in network.state_dict().items()}
        assert all(torch.equal(old[key], value) for key, value in state.items() if "running" not in key and key in old)
        inputs = {}
        for name, norm in find_norms(network.double()).items():
            norm.register_forward_pre_hook(lambda _, given, name=name, inputs=inputs: inputs.update({name: given[0]}))
            norm.track_running_stats, norm.momentum = True, 0.0  # in train mode every norm takes the batch's statistics
            if hasattr(norm, "r_max"):
                norm.r_max, norm.d_max = 1.0, 0.0
        with torch.no_grad():
            network.train()(batch.double())
        assert len(inputs) == 3
        for name, x in inputs.items():
            channels = x.transpose(0, 1).flatten(1)
            for key, value in (("mean", channels.mean(1)), ("var", channels.var(1, unbiased=False))):
                torch.testing.assert_close(state[f"{name}.running_{key}"].double(), value, rtol=1e-4, atol=1e-5)


def test_the_folder_is_one_population(place, capsys):
    """Beside the model, under its trainer, with a note; and predicted as --population batch predicts, to the last bit."""
    before = {path: path.read_bytes() for path in (place / NAME).rglob("*") if path.is_file()}
    assert recalibrate(place) == 0
    out = capsys.readouterr().out
    use = f"nnUNetv2_predict -d {DATASET} -c 3d_fullres -tr nnUNetTrainerBRN -p nnUNetPlans_recalibrated -f 0 1 -i IN -o OUT"
    assert f"statistics of folder, 4 images; predict with {use}" in out
    assert "stage by stage, all norms in one pass over 4 images or slices x 2 folds; scratch at most" in out
    require_statistics_of(place / NEW, preprocessed(place / NAME, place, CASES), place / NAME)
    assert {path: path.read_bytes() for path in (place / NAME).rglob("*") if path.is_file()} == before
    note = json.loads((place / NEW / "nnunet_norm.json").read_text())
    assert note["of"] == {
        "model": Path(NAME).name,
        "trainer": "nnUNetTrainerBRN",
        "plans": "nnUNetPlans",
        "checkpoint": "checkpoint_final.pth",
        "folds": [0, 1],
    }
    assert (note["population"], note["images"]) == ("folder, 4 images", CASES)
    assert (note["num_images"], note["num_voxels"]) == (4, 4 * 16**3)
    predict(place / NEW, place / "images", place / "new")
    predict(place / NAME, place / "images", place / "on_the_fly", population="batch")
    for case in CASES:
        new, on_the_fly = (np.load(place / name / f"{case}.npz")["probabilities"] for name in ("new", "on_the_fly"))
        assert np.array_equal(new, on_the_fly)


def test_every_experimental_batch_has_a_model(place):
    """Named after it; controls alone if wanted; predicted on the fly alike."""
    assert recalibrate(place, "--batches", place / "batches.json") == 0
    names = [f"nnUNetTrainerBRN__nnUNetPlans_recalibrated_{name}__3d_fullres" for name in ("B", "Scanner_1")]
    assert models(place) == names
    for name, cases in zip(names, (["case_1", "case_3"], ["case_0", "case_2"]), strict=True):
        folder = place / DATASET / name
        require_statistics_of(folder, preprocessed(place / NAME, place, cases), place / NAME)
        assert json.loads((folder / "nnunet_norm.json").read_text())["images"] == cases
    predict(place / NAME, place / "images", place / "on_the_fly", population="batch", batches=place / "batches.json")
    predict(place / DATASET / names[0], place / "images", place / "new")
    new, on_the_fly = (np.load(place / name / "case_1.npz")["probabilities"] for name in ("new", "on_the_fly"))
    assert np.array_equal(new, on_the_fly)
    assert recalibrate(place, "--batches", place / "batches.json", "--controls", "-o", place / "controls") == 0
    for name, case in zip(names, ("case_1", "case_2"), strict=True):
        require_statistics_of(place / "controls" / name, preprocessed(place / NAME, place, [case]), place / NAME)


def test_every_image_has_a_model(place):
    """A population of one: what --population image predicts, but for rounding."""
    assert recalibrate(place, "--per-image", "-f", "1", "--plans-name", "own") == 0
    names = [f"nnUNetTrainerBRN__own_{case}__3d_fullres" for case in CASES]
    assert [name for name in visible(place / DATASET) if "own" in name] == names
    predict(place / DATASET / names[2], place / "images", place / "new", use_mirroring=False)
    only = place / "only"
    only.mkdir()
    (only / "fold_1").symlink_to(place / NAME / "fold_1")
    for name in ("plans.json", "dataset.json"):
        (only / name).symlink_to(place / NAME / name)
    predict(only, place / "images", place / "image", population="image", use_mirroring=False)
    new, image = (np.load(place / name / "case_2.npz")["probabilities"] for name in ("new", "image"))
    assert np.abs(new - image).max() < 1e-3


@pytest.mark.parametrize("change", [lambda plan: None, flat], ids=["3d", "2d"])
def test_a_model_with_instance_norm_becomes_one_with_batch_norm_that_stock_nnunet_runs(place, change):
    """Of nnU-Net's own trainer, whatever the old one's name; with -m and -o nothing needs to have a name."""
    source = write_trained(place / "instance", "nnUNetTrainerInstanceNorm", folds=(0, 1), eps=1e-3, change=change)
    assert recalibrate(place, "-o", place / "new", model=["-m", str(source)]) == 0
    loaded = load_model(place / "new", [0, 1], "checkpoint_final.pth")
    axes = len(loaded.configuration_manager.patch_size)
    assert loaded.trainer_name == "nnUNetTrainer"
    assert {(type(norm), norm.eps) for norm in find_norms(loaded.bare_network).values()} == {
        (getattr(torch.nn, f"BatchNorm{axes}d"), 1e-3)
    }
    assert loaded.plans_manager.plans_name == "nnUNetPlans_recalibrated"
    batch = preprocessed(source, place, CASES)
    if axes == 2:
        batch = batch.transpose(1, 2).flatten(0, 1)
    require_statistics_of(place / "new", batch, source)


def domains(plan):
    """Statistics per experimental batch."""
    plan["configurations"]["3d_fullres"]["nnunet_norm"] = {"domain_statistics": ["B", "Scanner 1"]}


def test_a_model_with_statistics_per_domain_keeps_them(place):
    """Beside those that were estimated, under its own trainer."""
    source = write_trained(place / "domains", "nnUNetTrainerBEN", folds=(0, 1), change=domains)
    assert recalibrate(place, "-o", place / "new", model=["-m", str(source)]) == 0
    require_statistics_of(place / "new", preprocessed(source, place, CASES), source)
    loaded = load_model(place / "new", [0, 1], "checkpoint_final.pth")
    assert loaded.trainer_name == "nnUNetTrainerBEN"
    assert loaded.bare_network.domain_statistics.names == ("B", "Scanner 1")


def test_tiles_are_taken_where_stages_cannot_be_had(place, capsys):
    """Announced with the reason; one tile is a whole image here, so the statistics are the same."""
    assert recalibrate(place, "--max-memory", "1M") == 0
    out = capsys.readouterr().out
    assert "in 4 tiles of at most 16 x 16 x 16, one pass per norm (3) x 2 folds; what is padded at borders of" in out
    assert "--max-memory 1 MiB do not suffice: give --max-memory more or give --scratch a folder with" in out
    require_statistics_of(place / NEW, preprocessed(place / NAME, place, CASES), place / NAME)


def test_scratch_lies_in_the_folder_and_is_gone_afterwards(place, capsys):
    """Images and maps."""
    assert recalibrate(place, "--scratch", place / "scratch") == 0
    assert f"4 preprocessed images, 64.5 KiB, are kept in {place / 'scratch'} meanwhile" in capsys.readouterr().out
    assert visible(place / "scratch") == []


def test_what_is_there_is_refused_before_anything_starts_or_kept(place, capsys, monkeypatch):
    """After an interruption the finished models are kept with --continue; others are never taken for finished."""
    from nnunet_norm.prediction import recalibration

    written = []

    def interrupted(*args, **kwargs):
        if written:
            raise KeyboardInterrupt
        written.append(args)
        return write_model(*args, **kwargs)

    write_model = recalibration.write_model
    monkeypatch.setattr(recalibration, "write_model", interrupted)
    assert recalibrate(place, "--per-image") == 130
    assert len(models(place)) == 1
    monkeypatch.setattr(recalibration, "write_model", write_model)
    capsys.readouterr()
    line = refusal(place, capsys, "--per-image")
    assert (
        "_case_0__3d_fullres is there already, and is not overwritten: choose another --plans-name or -o, or --con"
        in line
    )
    time = (place / DATASET / models(place)[0] / "plans.json").stat().st_mtime_ns
    assert recalibrate(place, "--per-image", "--continue") == 0
    assert len(models(place)) == 4
    assert capsys.readouterr().out.count("written before, kept") == 1
    assert (place / DATASET / models(place)[0] / "plans.json").stat().st_mtime_ns == time
    line = refusal(place, capsys, "--per-image", "--continue", "-f", "0")
    assert "is there already, and of another model, other images or other folds: choose another --plans-name" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--controls"], "--controls are those of --batches, which is not given"),
        (["--batches", "batches.json", "-f", "3"], "has no checkpoint_final.pth for fold 3"),
        (["--plans-name", "a__b"], "plans_name is 'a__b'"),
        (["-i", "nothing"], "input folder 'nothing' does not exist"),
        (["-npp", "-1"], "-npp -1 must not be negative"),
        (["--batches", "alike.json"], "would be written to the same folder: give them names that differ"),
        (["--batches", "few.json"], "2 of 4 cases have no experimental batch: case_2, case_3"),
        (
            ["--batches", "few.json", "--controls", "-i", "two"],
            "experimental batch 'B' has no control among its 1 images",
        ),
    ],
)
def test_refused_before_anything_is_written(place, capsys, arguments, expected, monkeypatch):
    """In one line."""
    monkeypatch.chdir(place)
    alike = {"case_0": "a b", "case_1": "a_b", "case_2": "c", "case_3": "c"}
    (place / "alike.json").write_text(json.dumps({"batches": alike}))
    few = {"batches": {"case_0": "A", "case_1": "B"}, "controls": ["case_0"]}
    (place / "few.json").write_text(json.dumps(few))
    for case in ("case_0", "case_1"):
        write_image(place / "two", f"{case}_0000")
    assert expected in refusal(place, capsys, *arguments)
    assert models(place) == []


def test_populations_that_cannot_be_used_leave_no_folder(place, capsys):
    """An empty folder, an image that is not finite, and a model whose norms cannot have stored statistics."""
    (place / "empty").mkdir()
    assert "has no image ending in '.nii.gz'" in refusal(place, capsys, "-i", place / "empty")
    write_image(place / "images", "case_1_0000", value=np.inf)
    line = refusal(place, capsys)
    assert (
        "1 of 4 images of the population cannot be used: image 'case_1_0000.nii.gz' of case 'case_1' has 1 val" in line
    )
    source = write_trained(place / "group", "nnUNetTrainerGN")
    assert "cannot have stored statistics" in refusal(place, capsys, model=["-m", str(source)])
    assert models(place) == []
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == [DATASET, "empty", "group", "images"]


def test_the_other_way_to_be_refused(capsys):
    """Flags that exclude each other are argparse's to refuse, in one line, too."""
    with pytest.raises(SystemExit):
        main(["recalibrate", "-i", "images", "--batches", "file", "--per-image"])
    assert "not allowed with argument --batches" in capsys.readouterr().err


def test_other_flags_of_predict_reach_the_predictor(place):
    """--batches and --controls on the fly."""
    arguments = [
        "-i",
        place / "images",
        "-o",
        place / "out",
        "--population",
        "batch",
        "--batches",
        place / "batches.json",
    ]
    assert main(["predict", *MODEL, *map(str, arguments), "--controls", "-f", "0", *HERE, "-nps", "0"]) == 0
    record = json.loads((place / "out" / "halo_prediction.json").read_text())
    assert record["case_3"]["population_of"] == "experimental batch 'B', 1 control"
    assert segmentation(place / "out" / "case_3.nii.gz").shape == (16, 16, 16)
