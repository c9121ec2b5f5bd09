"""A grid's axes become points, once each, and what a grid cannot mean is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_norm.errors import GridError, LaunchError, PlansError, SetupError
from nnunet_norm.planning import load_plans, resolve_configuration
from nnunet_norm.sweep.cost import costs, describe
from nnunet_norm.sweep.grid import load_grid
from nnunet_norm.sweep.plans import padded_points, write_plans

STOCK = Path(__file__).resolve().parent.parent / "stock_plans"
DATASET = "Dataset998_Sweep"

BEGINNING = "dataset: 998\nconfiguration: 3d_fullres\n"


@pytest.fixture
def preprocessed(tmp_path, monkeypatch):
    """A preprocessed dataset without images, and nnU-Net's variables."""
    from nnunetv2 import paths

    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        assert getattr(paths, f"nnUNet_{name}").is_set()
    folder = tmp_path / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    shutil.copy(STOCK / "nnUNetPlans.json", folder)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    (folder / resolve_configuration(plans, "3d_fullres")["data_identifier"]).mkdir()
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"})
    )
    return folder


def grid_of(tmp_path, text, beginning=BEGINNING, **kwargs):
    (tmp_path / "study.yaml").write_text(beginning + text)
    return load_grid(str(tmp_path / "study.yaml"), **kwargs)


STUDY = """
folds: [0, 1]
fixed: {epochs: 20, iterations_per_epoch: 10}
axes:
  norm: [BRN, {norm: GhostBN, normalization_batch_size: 2}]
  loss: [none, DiceFocal]
  batch: [2, 4]
  lr: [1e-2]
exclude:
  - {norm: BRN, batch: 4, loss: [DiceFocal]}
baseline: {batch: 4, loss: DiceCE}
"""


def test_points_are_derived_plans_and_a_trainer(preprocessed, tmp_path):
    """Enforces names, plans, folders and order; YAML's 1e-2, which is text to it, is a number."""
    grid = grid_of(tmp_path, STUDY)
    assert [point.label for point in grid.points] == [
        *("BRN, DiceCE, b2", "BRN, DiceCE, b4", "BRN, DiceFocal, b2"),
        *(f"GhostBN nb2, {loss}, {batch}" for loss in ("DiceCE", "DiceFocal") for batch in ("b2", "b4")),
    ]
    first, last = grid.points[0], grid.points[-1]
    assert first.name == "nnUNetTrainerBRN_20epochs__nnUNetPlans_b2_it10_lr0.01__3d_fullres"
    assert last.name == "nnUNetTrainerGhostBN_DiceFocal_20epochs__nnUNetPlans_b4_it10_lr0.01_nb2__3d_fullres"
    assert first.epochs == 20
    assert first.plans["configurations"]["3d_fullres"]["nnunet_norm"]["initial_lr"] == 0.01
    assert grid.baseline == grid.points[1]
    assert [run.fold for run in grid.runs] == [0] * 7 + [1] * 7
    assert str(grid.fold_folder(grid.runs[0])) == get_output_folder(
        DATASET, first.trainer, first.plans_name, "3d_fullres", 0
    )
    assert grid.folder == tmp_path / "results" / DATASET / "sweeps" / "study__3d_fullres"


def test_the_command_line_says_what_a_grid_leaves_open(preprocessed, tmp_path):
    """Enforces that dataset, configuration and folds can be given from outside; and both norms and whole trainers."""
    text = "axes: {trainer: [nnUNetTrainer_5epochs, nnUNetTrainerBRN]}"
    grid = grid_of(tmp_path, text, "", dataset="998", configuration="3d_fullres", folds=["all"])
    assert [(point.trainer, point.epochs, point.plans_name) for point in grid.points] == [
        ("nnUNetTrainer_5epochs", 5, "nnUNetPlans"),
        ("nnUNetTrainerBRN", 1000, "nnUNetPlans"),
    ]
    assert grid.folds == ("all",)
    assert (len(grid.runs), grid.gpus, grid.npz) == (2, 1, True)


def test_an_axis_may_vary_several_keys_together(preprocessed, tmp_path):
    """Enforces that a value may be keys, under a name of one's own; and that options which are mappings stay values."""
    text = """
fixed: {norm: BRN}
axes:
  schedule: [{batch: 2, lr: 0.01}, {batch: 8, lr: 0.02}]
  batch_renorm: [{r_max: 2}, {r_max: 3}]
"""
    labels = [point.label for point in grid_of(tmp_path, text).points]
    assert labels[0] == "b2 lr0.01, brn-rmax2"
    assert len(labels) == 4


def test_values_are_those_of_yaml_1_2(preprocessed, tmp_path):
    """Enforces that 0998 is no octal number, 2e0 no text wherever it stands, and that merge keys work."""
    text = """
dataset: 0998
configuration: 3d_fullres
fixed: {norm: BRN}
axes: {batch_renorm: [{r_max: 2e0}, {r_max: 3}], options: [{lr: 1e-2}]}
baseline: {}
exclude: []
"""
    grid = grid_of(tmp_path, text, "")
    assert grid.dataset == DATASET
    assert grid.points[0].values["batch_renorm"] == {"r_max": 2.0}
    merged = grid_of(tmp_path, "axes: {values: [&first {norm: BRN, batch: 2}, {<<: *first, batch: 4}]}")
    assert [point.trainer for point in merged.points] == ["nnUNetTrainerBRN"] * 2


def test_the_study_is_a_recipe(preprocessed, tmp_path):
    """Enforces the study's trainings: patch or batch vary, with four losses each, on five folds."""
    grid = load_grid("amos", dataset="998", configuration="3d_fullres")
    assert len(grid.points) == 2 * 4 * 7
    assert len(grid.runs) == 5 * len(grid.points)
    losses = ("", "_DiceFocal", "_DiceTopK", "_DicePerim")
    assert {point.trainer for point in grid.points} == {
        f"nnUNetTrainer{norm}{loss}" for norm in ("InstanceNorm", "BRN") for loss in losses
    }
    assert grid.baseline.label == "InstanceNorm, DiceCE, p160"
    batches = {
        point.values["setting"]: resolve_configuration(dict(point.plans), "3d_fullres")["batch_size"]
        for point in grid.points
    }
    assert batches["b64"] == 32 * batches["p160"]


REFUSED = {
    "an unknown key": ("axis: {norm: [BRN]}", "axis is not a key of a grid; valid ones are axes, name, dataset"),
    "an unknown axis": (
        "axes: {nrom: [BRN]}",
        "nrom is not an axis of a grid; valid ones are norm, loss, epochs, trainer, batch",
    ),
    "no axes": ("axes: {}", "the grid is empty"),
    "an axis without values": ("axes: {norm: []}", "axis norm is []: the grid is empty"),
    "all excluded": ("axes: {norm: [BRN]}\nexclude: [{norm: BRN}]", "the grid is empty: every combination"),
    "an unknown norm": ("axes: {norm: [BNR]}", "norm is 'BNR'; choose from BRN, GN"),
    "an unknown loss": ("axes: {norm: [BRN], loss: [Focal]}", "loss is 'Focal'; choose from DiceCE, DiceFocal"),
    "no norm": ("axes: {batch: [2, 4]}", "a point has no norm"),
    "norm and trainer": (
        "axes: {norm: [BRN]}\nfixed: {trainer: nnUNetTrainer}",
        "trainer is the whole name; leave out norm",
    ),
    "a value twice": ("axes: {norm: [BRN, BRN]}", "axis norm has a value twice"),
    "a key twice": ("axes: {norm: [BRN]}\naxes: {norm: [GN]}", "axes is there twice"),
    "fixed and varied": ("axes: {norm: [BRN], batch: [2]}\nfixed: {batch: 4}", "batch_size is fixed and an axis"),
    "two axes of one name": ("axes: {norm: [BRN], batch: [2], batch_size: [4]}", "axis batch_size is there twice"),
    "said twice": (
        "axes: {norm: [BRN], a: [{batch: 2}, {batch: 4}], b: [{batch: 8}]}",
        "batch_size is said twice for",
    ),
    "an unknown exclusion": (
        "axes: {norm: [BRN]}\nexclude: [{norm: GN}]",
        "exclude has norm: GN, which is not in the grid",
    ),
    "no axis excluded": ("axes: {norm: [BRN]}\nexclude: [{loss: DiceFocal}]", "exclude names loss, which is no axis"),
    "an excluded baseline": (
        "axes: {norm: [BRN, GN]}\nexclude: [{norm: GN}]\nbaseline: {norm: GN}",
        "is excluded; name a point of the grid",
    ),
    "no such fold": ("axes: {norm: [BRN]}\nfolds: [5]", "folds has 5, and the split has 5: choose from 0 to 4, or all"),
    "a fold that is none": ("axes: {norm: [BRN]}\nfolds: [x]", "must be a list of different numbers from 0, or all"),
    "gpus": ("axes: {norm: [BRN]}\ngpus: -1", "gpus is -1; it must be a whole number of at least 0"),
    "npz": ("axes: {norm: [BRN]}\nnpz: maybe", "npz is 'maybe'; it must be true or false"),
    "a folder for a name": ("axes: {norm: [BRN]}\nname: ../x", "it names a folder"),
    "no YAML": ("axes: [", "is not YAML"),
    "an unknown recipe": ("axes: {norm: [BRN]}\nrecipe: x", "recipe x is not known; choose from amos, shallow"),
    "a list": ("- a", "is empty or no list of keys"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_grid_can_mean_is_refused(preprocessed, tmp_path, text, message):
    """Enforces one line that names the key and what is valid."""
    beginning = "" if text.startswith("-") else BEGINNING
    with pytest.raises(GridError) as refused:
        grid_of(tmp_path, text, beginning)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_same_model_twice_is_refused(preprocessed, tmp_path):
    """Enforces it for two settings of the study that say the same: one results folder cannot hold both."""
    text = "recipe: amos\nfixed: {norm: BRN}\naxes: {setting: [p160, b2]}"
    with pytest.raises(GridError, match="b2 and p160 are the same model, nnUNetTrainerBRN__"):
        grid_of(tmp_path, text)


def test_points_that_cannot_be_derived_say_which(preprocessed, tmp_path):
    """Enforces that the refusal of derive_plans names the point; that trainers, datasets and files must exist."""
    with pytest.raises(PlansError, match=r"point norm: BRN, patch_size: \[1, 1, 1\]: .*below the network's minimum"):
        grid_of(tmp_path, "axes: {norm: [BRN], patch: [[1, 1, 1]]}")
    with pytest.raises(LaunchError, match="-tr nnUNetTrainerOhNo: there is no such trainer"):
        grid_of(tmp_path, "axes: {trainer: [nnUNetTrainerOhNo]}")
    with pytest.raises(SetupError, match="dataset 3: "):
        grid_of(tmp_path, "axes: {norm: [BRN]}", dataset="3")
    for key, value in (("norm_op_kwargs", "[3]"), ("domain_statistics", "[3, 4]"), ("batch_renorm", "[hi]")):
        with pytest.raises(PlansError, match=f"{key} is .*; it must be"):
            grid_of(tmp_path, f"fixed: {{norm: BRN}}\naxes: {{{key}: {value}}}")
    (preprocessed / "splits_final.json").write_text("[{")
    with pytest.raises(GridError, match=r"splits_final.json cannot be read .*: remove it"):
        grid_of(tmp_path, "axes: {norm: [BRN]}")
    with pytest.raises(GridError, match=r"there is no such file, nor a recipe of that name \(amos, shallow\)"):
        load_grid(str(tmp_path / "none.yaml"))
    with pytest.raises(GridError, match="configuration is missing; give it in the grid, or with -c"):
        grid_of(tmp_path, "axes: {norm: [BRN]}", "dataset: 998\n")


def test_plans_are_written_once_and_never_over_others(preprocessed, tmp_path):
    """Enforces that a second run writes nothing, and that neither plans nor results of other plans are taken for its own."""
    grid = grid_of(tmp_path, STUDY)
    write_plans(grid)
    files = {path: path.stat().st_mtime_ns for path in preprocessed.glob("*_b*.json")}
    assert len(files) == 4
    assert load_plans(preprocessed, grid.points[0].plans_name) == grid.points[0].plans
    write_plans(grid_of(tmp_path, STUDY))
    assert {path: path.stat().st_mtime_ns for path in files} == files

    trained = grid.model_folder(grid.points[2])
    trained.mkdir(parents=True)
    plans = json.loads((preprocessed / f"{grid.points[2].plans_name}.json").read_text())
    (trained / "plans.json").write_text(json.dumps(plans))
    write_plans(grid)
    plans["configurations"]["3d_fullres"]["batch_size"] = 7
    (trained / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(GridError, match=r"point BRN, DiceFocal, b2: .* was trained with other plans of the same name"):
        write_plans(grid)
    shutil.rmtree(trained)
    (preprocessed / f"{grid.points[2].plans_name}.json").write_text(json.dumps(plans))
    with pytest.raises(GridError, match="says something else than the grid"):
        write_plans(grid)


def test_what_could_not_be_trained_is_refused_before_anything_is_written(preprocessed, tmp_path):
    """Enforces it for a batch that GPUs cannot share, plans that contradict a trainer, and data that are not there."""
    with pytest.raises(PlansError, match="point b2: configuration 3d_fullres: num_gpus is 4, more than the batch of 2"):
        write_plans(grid_of(tmp_path, "gpus: 2\nnodes: 2\nfixed: {norm: BRN}\naxes: {batch: [8, 2]}"))
    text = "axes: {norm: [BRN, GN]}\nfixed: {norm_op: torch.nn.modules.batchnorm.BatchNorm3d}"
    with pytest.raises(
        PlansError, match=r"norm_op is 'torch.nn.modules.batchnorm.BatchNorm3d' and -tr nnUNetTrainerBRN"
    ):
        write_plans(grid_of(tmp_path, text))
    assert [path.stem for path in preprocessed.glob("nnUNetPlans*.json")] == ["nnUNetPlans"]
    with pytest.raises(GridError, match=r"point nnUNetTrainer: nnUNetTrainer is not of nnunet_norm, .* in one process"):
        write_plans(grid_of(tmp_path, "gpus: 2\naxes: {trainer: [nnUNetTrainerBRN, nnUNetTrainer]}"))
    with pytest.raises(
        GridError, match="nnUNetTrainer is not of nnunet_norm, and would not heed initial_lr of its plans"
    ):
        write_plans(grid_of(tmp_path, "fixed: {lr: 0.1}\naxes: {trainer: [nnUNetTrainerBRN, nnUNetTrainer]}"))
    next(path for path in preprocessed.iterdir() if path.is_dir()).rmdir()
    with pytest.raises(SetupError, match="run nnUNetv2_preprocess -d Dataset998_Sweep -c 3d_fullres first"):
        write_plans(grid_of(tmp_path, "axes: {norm: [BRN]}"))


def test_patches_larger_than_all_images_are_told(preprocessed, tmp_path):
    """Enforces one line per such patch, with its points; patches that images fill, and unknown images, are not told of."""
    grid = grid_of(tmp_path, "axes: {norm: [BRN, GN], patch: [[64, 128, 128], [64, 384, 128], [64, 128, 384]]}")
    assert padded_points(grid) == []
    fingerprint = {"shapes_after_crop": [[70, 300, 310]], "spacings": [[2.0, 0.7, 0.7]]}
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    first, second = padded_points(grid)
    assert first.startswith(
        "2 of 6 points, the first is BRN, p64x384x128: configuration 3d_fullres: patch size 64x384x128"
    )
    assert first.endswith("give at most 64x320x128, or exclude them")
    assert "larger than every image on axis 2" in second


LOG = "2026-01-01 00:00:00.000000: Epoch {epoch}\n2026-01-01 00:00:00.000000: Epoch time: {seconds} s\n"


def test_the_cost_is_counted_and_hours_come_from_epochs_that_were_seen(preprocessed, tmp_path):
    """Enforces work in proportion to samples, memory of the GPU, and seconds scaled by work where a point has none."""
    text = """
folds: [0, 1]
fixed: {norm: BRN, epochs: 20, base_features: 4, patch: [64, 128, 128], val_iterations_per_epoch: 1, iterations_per_epoch: 10}
axes: {batch: [2, 4]}
"""
    grid = grid_of(tmp_path, text)
    small, large = costs(grid)
    assert large.flops == 2 * small.flops
    assert large.gigabytes >= small.gigabytes > 0
    assert (small.seconds, large.seconds) == (None, None)
    assert describe(grid)[-1].startswith("Hours are estimated as soon as")
    folder = grid.fold_folder(grid.runs[0])
    folder.mkdir(parents=True)
    (folder / "training_log_2026_1_1_00_00_00.txt").write_text(
        "".join(LOG.format(epoch=epoch, seconds=seconds) for epoch, seconds in enumerate((90, 36, 36)))
    )
    small, large = costs(grid)
    assert (small.seconds, small.seen) == (20 * 36, True)
    assert (large.seconds, large.seen) == (20 * 72, False)
    lines = describe(grid)
    assert lines[2].endswith("0.4 (scaled)")
    assert lines[-1].endswith("1.2 hours one after the other, without validation")
