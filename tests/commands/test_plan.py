"""`nnunet-norm plan` as a user types it: through the console script's main."""

import itertools
import json
import logging
import re
import shutil
from pathlib import Path

import pytest

from nnunet_norm.cli import main

STOCK = Path(__file__).resolve().parent.parent / "stock_plans" / "nnUNetPlans.json"
DATASET = "Dataset990_Abdomen"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preprocessed dataset that holds nnU-Net's plans and nothing else."""
    folder = tmp_path / DATASET
    folder.mkdir()
    shutil.copy(STOCK, folder)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return folder


def plan(*arguments: object) -> int:
    return main(["plan", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_plans_are_derived_saved_and_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces the file, the correction, the table old -> new, and the commands to type next."""
    options = ["--batch-size", 16, "--patch-size", 64, 150, 160, "--num-stages", 4, "--base-features", 8, "--seed", 0]
    assert plan("-d", 990, "-c", "3d_fullres", *options) == 0
    name = "nnUNetPlans_b16_p64x152x160_s4_f8_seed0"
    derived = json.loads((folder / f"{name}.json").read_text())
    assert derived["plans_name"] == name
    configuration = derived["configurations"]["3d_fullres"]
    assert (configuration["batch_size"], configuration["patch_size"]) == (16, [64, 152, 160])
    assert configuration["nnunet_norm"] == {"seed": 0}
    printed = capsys.readouterr()
    assert "3d_fullres: patch size 64x150x160 is not divisible by the total stride 4x8x8" in printed.out
    rows = [line.split(maxsplit=2) for line in printed.out.splitlines() if " -> " in line]
    assert ["3d_fullres", "batch_size", "2 -> 16"] in rows
    assert ["3d_fullres", "patch_size", "[80, 160, 160] -> [64, 152, 160]"] in rows
    assert ["3d_fullres", "features_per_stage", "[32, 64, 128, 256, 320, 320] -> [8, 16, 32, 64]"] in rows
    assert ["3d_fullres", "nnunet_norm.seed", "- -> 0"] in rows
    assert {row[0] for row in rows} == {"plans_name", "3d_fullres", "3d_cascade_fullres"}
    assert printed.out.splitlines()[-2:] == [
        '  export nnUNet_extTrainer="$(nnunet-norm trainers-dir)"',
        f"  nnUNetv2_train {DATASET} 3d_fullres 0 -p {name} -tr nnUNetTrainerBRN",
    ]


def test_the_stages_of_a_cascade_are_trained_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces both trainings for a cascade, the low resolution first, and the trainer that takes the plans' norm."""
    assert (
        plan("-d", DATASET, "-c", "3d_cascade_fullres", "--norm-op", "torch.nn.BatchNorm3d", "--plans-name", "mine")
        == 0
    )
    lines = [line.split("#")[0].split() for line in capsys.readouterr().out.splitlines() if "nnUNetv2_train" in line]
    assert [line[2] for line in lines] == ["3d_lowres", "3d_cascade_fullres"]
    assert all(line[3:] == ["0", "-p", "mine", "-tr", "nnUNetTrainerNorm"] for line in lines)
    assert (folder / "mine.json").is_file()


def test_every_option_reaches_the_plans(folder: Path) -> None:
    """Enforces that no flag is dropped on its way, several configurations at once included."""
    options = "--replan-topology --iterations-per-epoch 10 --val-iterations-per-epoch 2 --initial-lr 0.1 "
    options += "--disparity-batches 1 --batch-renorm r_max=2 warmup=0.1 --plans-name mine"
    assert plan("-d", 990, "-c", "2d", "3d_fullres", *options.split()) == 0
    configurations = json.loads((folder / "mine.json").read_text())["configurations"]
    for name in ("2d", "3d_fullres"):
        assert configurations[name]["nnunet_norm"] == {
            "num_iterations_per_epoch": 10,
            "num_val_iterations_per_epoch": 2,
            "initial_lr": 0.1,
            "disparity_batches": 1,
            "batch_renorm": {"r_max": 2.0, "warmup": 0.1},
        }
    assert "nnunet_norm" not in configurations["3d_lowres"]
    features = ["--features-per-stage", 4, 4, 4, "--num-stages", 3, "--plans-name", "small"]
    assert plan("-d", 990, "-c", "2d", *features) == 0
    kwargs = json.loads((folder / "small.json").read_text())["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == [4, 4, 4]


def test_a_recipe_takes_options_on_top(folder: Path) -> None:
    """Enforces that a recipe is found by name and that options refine it."""
    assert plan("-d", 990, "-c", "2d", "--recipe", "shallow", "--num-stages", 3, "--batch-size", 4) == 0
    configuration = json.loads((folder / "nnUNetPlans_b4_s3.json").read_text())["configurations"]["2d"]
    assert (configuration["architecture"]["arch_kwargs"]["n_stages"], configuration["batch_size"]) == (3, 4)


def test_an_existing_file_is_kept_unless_overwrite_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that the same command twice is refused, and the remedy that it names works."""
    command = ["-d", 990, "-c", "2d", "--batch-size", 4]
    assert plan(*command) == 0
    capsys.readouterr()
    assert plan(*command) == 2
    assert refusal(capsys).endswith("nnUNetPlans_b4.json exists; choose another --plans-name or give --overwrite")
    assert plan(*command, "--overwrite") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-d", 990, "-c", "2d"],
            "nothing to change; give --recipe or at least one of --batch-size, --batch-dice, --patch-size",
        ),
        (["-d", 990, "-c", "2d", "--batch-size", 4, "-p", "nnUNetPlan"], "there are nnUNetPlans"),
        (["-d", 990, "-c", "1d", "--batch-size", 4], "configuration 1d is not in plans nnUNetPlans; there are 2d,"),
        (["-d", 990, "-c", "2d", "--recipe", "deep"], "--recipe deep is not known; choose from amos, shallow"),
        (["-d", 990, "-c", "2d", "--patch-size", 64, 64], "64x64 is below the network's minimum of 512x512"),
        (["-d", 990, "-c", "2d", "--seed", -1], "nnunet_norm.seed is -1"),
        (["-d", 991, "-c", "2d", "--batch-size", 4], "-d 991: Could not find a dataset with the ID 991"),
        (["-d", "Abdomen", "-c", "2d", "--batch-size", 4], "-d Abdomen: dataset_name_or_id was a string"),
        (["-d", "Dataset991_X", "-c", "2d", "--batch-size", 4], "Dataset991_X; run nnUNetv2_plan_and_preprocess first"),
    ],
)
def test_wrong_input_gets_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    """Enforces exit code 2, one telling line, and no new file."""
    assert plan(*arguments) == 2
    assert message in refusal(capsys)
    assert [file.name for file in folder.iterdir()] == ["nnUNetPlans.json"]


def test_an_unset_variable_gets_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that a missing nnUNet_preprocessed is named before anything else fails for want of it."""
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert plan("-d", 990, "-c", "2d", "--batch-size", 4) == 2
    assert "nnUNet_preprocessed is not set; export it" in refusal(capsys)


def test_a_malformed_setting_is_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that --batch-renorm wants KEY=NUMBER."""
    with pytest.raises(SystemExit, match="2"):
        plan("-d", 990, "-c", "2d", "--batch-renorm", "r_max")
    assert "'r_max' is not KEY=NUMBER" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "values"), [("--batch-renorm", "r_max=2 r_max=3"), ("--unetr", "num_heads=3 num_heads=4")]
)
def test_a_setting_that_is_given_twice_is_refused_by_the_parser(
    flag: str, values: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces that of two values for one key none is silently the one that holds."""
    with pytest.raises(SystemExit, match="2"):
        plan("-d", 990, "-c", "2d", flag, *values.split())
    assert f"argument {flag}: {values.split('=')[0]} is given 2 times" in capsys.readouterr().err


def table(printed: str, configuration: str) -> dict[str, str]:
    """What the table says about a configuration."""
    lines = printed.splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("  "), lines[lines.index(configuration) + 1 :])
    return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in rows)


def describe_labels(folder: Path, labels: int = 15) -> None:
    """The dataset's description, of one channel."""
    names = ["background", *(f"label_{label}" for label in range(1, labels + 1))]
    description = {"channel_names": {"0": "CT"}, "labels": {name: label for label, name in enumerate(names)}}
    (folder / "dataset.json").write_text(json.dumps(description | {"file_ending": ".nii.gz"}))


def test_a_table_says_what_a_step_takes_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces network, corrected patch, shares, voxels, nnU-Net's memory, steps, samples, learning rate and -num_gpus."""
    describe_labels(folder)
    options = "--batch-size 16 --micro-batch-size 1 --patch-size 64 280 288 --lr-scaling linear --warmup-epochs 5 "
    options += "--keep-samples --checkpoint-minutes 5 --num-gpus 8 --vram 24"
    assert plan("-d", 990, "-c", "3d_fullres", *options.split()) == 0
    printed = capsys.readouterr().out
    rows = table(printed, "3d_fullres")
    assert rows == {
        "topology": "PlainConvUNet, 6 stages, total stride 16x32x32, features 32 64 128 256 320 320",
        "patch": "64x288x288, 5,308,416 voxels (asked for 64x280x288)",
        "batch": "16 samples, 2 on each of 8 GPUs, 1 at once in the network",
        "voxels per step": "84,934,656",
        "memory per GPU": "11.6 GB with 1 sample at once (nnU-Net's estimate)",
        "steps": "31 x 1000 epochs = 31,000, with 496,000 samples; 6 validation steps per epoch "
        "(other epochs: _<N>epochs in the trainer's name)",
        "learning rate": "0.08, after 5 epochs of warm-up",
    }
    # What inherits from it is checked and shown too.
    inherited = {key: rows[key] for key in ("batch", "voxels per step", "steps", "learning rate")}
    heir = table(printed, "3d_cascade_fullres")
    assert heir.items() >= (inherited | {"patch": "64x288x288, 5,308,416 voxels"}).items()
    name = "nnUNetPlans_b16_p64x288x288_keep_lrlin_mb1_warm5_save5"
    assert printed.index("learning rate  ") < printed.index(f"{name}.json")
    assert printed.splitlines()[-1].endswith(f"-p {name} -tr nnUNetTrainerBRN -num_gpus 8")
    assert json.loads((folder / f"{name}.json").read_text())["configurations"]["3d_fullres"]["nnunet_norm"] == {
        "num_iterations_per_epoch": 31,
        "num_val_iterations_per_epoch": 6,
        "initial_lr": pytest.approx(0.08),
        "micro_batch_size": 1,
        "warmup_epochs": 5,
        "checkpoint_minutes": 5.0,
    }


def test_what_does_not_fit_is_refused_with_what_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces that --vram writes nothing that is too large, and that a choice that it names is accepted."""
    describe_labels(folder)
    command = ["-d", 990, "-c", "2d", "--batch-size", 48, "--num-stages", 4, "--patch-size", 256, 256]
    assert plan(*command, "--vram", 4) == 2
    printed = capsys.readouterr()
    assert table(printed.out, "2d")["memory per GPU"] == "7.5 GB with 48 samples at once (nnU-Net's estimate)"
    (line,) = printed.err.splitlines()
    assert "256x256 with 48 samples at once takes 7.5 GB per GPU (nnU-Net's estimate), --vram is 4; what fits: " in line
    flags = re.search(r"what fits: (--micro-batch-size \d+) ", line)[1]
    assert [file.name for file in folder.iterdir() if file.name.startswith("nnUNetPlans")] == ["nnUNetPlans.json"]
    assert plan(*command, "--vram", 4, *flags.split()) == 0
    capsys.readouterr()
    assert plan(*command, "--activation-checkpointing") == 0
    memory = table(capsys.readouterr().out, "2d")["memory per GPU"]
    assert memory.endswith("activations computed again (nnU-Net's estimate, checkpointing counted)")


def test_a_stage_that_follows_is_checked_and_never_told_to_run_on_gpus_that_cannot_share_its_batch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces its table, a warning with the reason, its command for one GPU, and its own refusal of too little memory."""
    options = ["-d", 990, "-c", "3d_cascade_fullres", "--batch-size", 8, "--micro-batch-size", 1, "--num-stages", 3]
    options += ["--num-gpus", 4]
    assert plan(*options) == 0
    printed = capsys.readouterr().out
    assert "WARNING: configuration 3d_lowres: num_gpus is 4, more than the batch of 2 has samples; give" in printed
    assert table(printed, "3d_lowres")["batch"] == "2 samples"
    assert table(printed, "3d_cascade_fullres")["batch"].startswith("8 samples, 2 on each of 4 GPUs")
    first, second = (line for line in printed.splitlines() if "nnUNetv2_train" in line)
    assert "-num_gpus" not in first
    assert first.endswith("BRN    # on one GPU: 4 cannot share its batch; and folds 1 to 4, before the next stage")
    assert second.endswith("-tr nnUNetTrainerBRN -num_gpus 4")
    describe_labels(folder)
    assert plan(*options, "--vram", 5, "--overwrite") == 2
    line = refusal(capsys)
    assert "configuration 3d_lowres: patch " in line
    assert line.endswith("; name 3d_lowres in -c too, where these flags are to act")


def test_a_warm_up_is_taken_back_and_one_without_end_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces 0 as an answer, and a line where the learning rate would rise until nnU-Net's last epoch."""
    assert plan("-d", 990, "-c", "2d", "--warmup-epochs", 1000) == 0
    warning = (
        "WARNING: configuration 2d: warmup_epochs is 1000, and nnU-Net trains 1000 epochs: the learning rate never"
    )
    assert warning in capsys.readouterr().out
    assert plan("-d", 990, "-c", "2d", "-p", "nnUNetPlans_warm1000", "--warmup-epochs", 0) == 0
    printed = capsys.readouterr().out
    assert "WARNING" not in printed
    assert table(printed, "2d")["learning rate"] == "0.01, no warm-up"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--batch-size", 4, "--num-gpus", 5],
            "2d: num_gpus is 5, more than the batch of 4 has samples; give num_gpus of",
        ),
        (["--batch-size", 4, "--num-gpus", 0], "--num-gpus is 0; it must be at least 1"),
        (["--batch-size", 4, "--vram", 0], "--vram is 0; it must be the memory of a GPU in GB, above 0"),
        (["--batch-size", 4, "--vram", "nan"], "--vram is nan; it must be"),
        (["--batch-size", 4, "--vram", 8], "--vram 8: memory cannot be estimated without"),
        (["--micro-batch-size", 13], "micro_batch_size is 13, larger than the batch of 12"),
        (["--batch-size", 4, "--lr", 0.1, "--lr-scaling", "sqrt"], "lr_scaling and initial_lr both say"),
        (["--recipe", "amos"], "--setting is missing; recipe amos has p160, p288, p352, p384, b2, b4, b16, b64"),
        (["--recipe", "amos", "--setting", "b8"], "--setting b8 is not known; recipe amos has p160,"),
        (["--recipe", "shallow", "--setting", "b16"], "--setting b16: recipe shallow has no settings; leave it out"),
        (["--batch-size", 4, "--setting", "b16"], "--setting b16 belongs to a recipe; give --recipe too"),
        (
            ["--patch-size", 1024, 512],
            "1024x512 is larger than every image on axis 0 (the largest extents are 520x512): give",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list, message: str
) -> None:
    """Enforces exit code 2 and one telling line for GPUs, memory, recipes and images, and no new plans."""
    fingerprint = {"shapes_after_crop": [[260, 520, 512]], "spacings": [[2.0, 0.7, 0.7]]}
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    assert plan("-d", 990, "-c", "2d", *flags) == 2
    assert message in refusal(capsys)
    assert not list(folder.glob("nnUNetPlans_*"))


def test_the_settings_of_a_recipe_name_the_trainers_of_its_losses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces the plans of a setting, and one training for each loss of the study."""
    assert plan("-d", 990, "-c", "3d_fullres", "--recipe", "amos", "--setting", "p288") == 0
    trainers = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "nnUNetv2_train" in line]
    losses = ("", "_DiceFocal", "_DiceTopK", "_DicePerim")
    assert trainers == [f"nnUNetTrainerBRN{loss}" for loss in losses]
    configuration = json.loads((folder / "nnUNetPlans_b2_p80x288x288.json").read_text())["configurations"]["3d_fullres"]
    assert (configuration["batch_size"], configuration["patch_size"]) == (2, [80, 288, 288])


def test_logging_is_left_as_it_was(folder: Path) -> None:
    """Enforces that the command's messages do not change the logging of whoever calls it."""
    logger = logging.getLogger("nnunet_norm")
    before = (logger.level, list(logger.handlers))
    assert plan("-d", 990, "-c", "2d", "--batch-size", 4) == 0
    assert (logger.level, list(logger.handlers)) == before


def describe(folder: Path, batches: dict[str, str], cases: list[str], splits: list | None = None) -> Path:
    """What nnU-Net leaves of a preprocessed dataset, and the experimental batches beside it."""
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    (folder / "gt_segmentations").mkdir()
    for case in cases:
        (folder / "gt_segmentations" / f"{case}.nii.gz").touch()
    if splits is not None:
        (folder / "splits_final.json").write_text(json.dumps(splits))
    path = folder / "experimental_batches.json"
    path.write_text(json.dumps({"batches": batches}))
    return path


def test_domain_statistics_are_those_of_the_datasets_experimental_batches(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces the names in the plans, without those that no case has, and the trainer that takes them."""
    batches = {"c1": "b", "c2": "b", "c3": "a", "c4": "a", "test1": "elsewhere"}
    describe(folder, batches, ["c1", "c2", "c3", "c4"])
    assert plan("-d", 990, "-c", "2d", "--domain-statistics") == 0
    configuration = json.loads((folder / "nnUNetPlans_domains2.json").read_text())["configurations"]["2d"]
    assert configuration["nnunet_norm"] == {"domain_statistics": ["a", "b"]}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("-p nnUNetPlans_domains2 -tr nnUNetTrainerBEN")
    assert not [line for line in lines if "WARNING" in line]


def test_problems_of_experimental_batches_are_told_and_refused_where_statistics_hang_on_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces the names of missing cases and of batches too small, as warnings, or as a refusal that writes nothing."""
    batches = {"c1": "a", "c2": "a", "c3": "b"}
    path = describe(folder, batches, ["c1", "c2", "c3", "c4"], [{"train": ["c1", "c2"], "val": ["c3", "c4"]}])
    assert plan("-d", 990, "-c", "2d", "--batch-size", 4) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == [
        f"WARNING: {path}: 1 of 4 cases have no experimental batch: c4; name one for each",
        f"WARNING: {path}: experimental batches of one case: b (c3); give them more cases, or the name of another batch",
        f"WARNING: {path}: experimental batches that a fold validates on without a training case: b (fold 0)",
    ]
    assert plan("-d", 990, "-c", "2d", "--domain-statistics") == 2
    line = refusal(capsys)
    assert "have no experimental batch: c4; name one for each; experimental batches of one case: b (c3)" in line
    assert not (folder / "nnUNetPlans_domains2.json").exists()


def test_leaving_experimental_batches_out_of_a_fold_is_told_and_never_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces that leave-one-batch-out splits can be planned with statistics per batch."""
    batches = {"c1": "a", "c2": "a", "c3": "b", "c4": "b"}
    splits = [{"train": ["c1", "c2"], "val": ["c3", "c4"]}, {"train": ["c3", "c4"], "val": ["c1", "c2"]}]
    describe(folder, batches, list(batches), splits)
    assert plan("-d", 990, "-c", "2d", "--domain-statistics") == 0
    assert "without a training case: a (fold 1), b (fold 0)" in capsys.readouterr().out


def test_domain_statistics_without_file_or_cases_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enforces one line with the remedy, and that a malformed file is only told where nothing hangs on it."""
    assert plan("-d", 990, "-c", "2d", "--domain-statistics") == 2
    assert f"there is no experimental_batches.json in {folder}" in refusal(capsys)
    path = folder / "experimental_batches.json"
    path.write_text('{"batches": {"c1": "a"}}')
    assert plan("-d", 990, "-c", "2d", "--domain-statistics") == 2
    assert "there are no cases yet; run nnUNetv2_plan_and_preprocess first" in refusal(capsys)
    path.write_text("{}")
    assert plan("-d", 990, "-c", "2d", "--domain-statistics") == 2
    assert f"{path}: it must be an object" in refusal(capsys)
    assert plan("-d", 990, "-c", "2d", "--batch-size", 4) == 0
    assert f"WARNING: {path}: it must be an object" in capsys.readouterr().out
    assert plan("-d", 990, "-c", "2d", "--batch-size", 4, "-p", "other") == 2
    assert "there are nnUNetPlans" in refusal(capsys)  # the file is not offered as plans


def test_cases_of_a_dataset_that_is_not_preprocessed_are_those_of_the_raw_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Enforces the check before preprocessing, with the file beside the raw dataset's dataset.json."""
    raw = folder.parent / "raw" / DATASET
    (raw / "imagesTr").mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    (raw / "dataset.json").write_text(json.dumps({"file_ending": ".png"}))
    for case in ("c1", "c2"):
        (raw / "imagesTr" / f"{case}_0000.png").touch()
    (raw / "experimental_batches.json").write_text(json.dumps({"batches": {"c1": "a"}}))
    assert plan("-d", 990, "-c", "2d", "--batch-size", 4) == 0
    assert "1 of 2 cases have no experimental batch: c2" in capsys.readouterr().out


def test_settings_of_population_statistics_reach_the_plans(folder: Path) -> None:
    """Enforces the flags of PreciseBN, FrozenBN and GhostBN, and sync, the one word among BatchRenorm's numbers."""
    options = "--population-samples 500 --reestimate-every 10 --frozen-share 0.3 --normalization-batch-size 2 "
    assert plan("-d", 990, "-c", "2d", *options.split(), "--batch-renorm", "sync=full", "r_max=2") == 0
    (path,) = folder.glob("nnUNetPlans_*.json")
    assert path.stem == "nnUNetPlans_pop500_every10_frozen0.3_nb2_brn-rmax2.0-syncfull"
    assert json.loads(path.read_text())["configurations"]["2d"]["nnunet_norm"] == {
        "population_samples": 500,
        "reestimate_every": 10,
        "frozen_share": 0.3,
        "normalization_batch_size": 2,
        "batch_renorm": {"r_max": 2.0, "sync": "full"},
    }


@pytest.mark.parametrize("kind", ["image_quantile", "tile_quantile"])
def test_the_input_normalization_is_in_table_name_and_plans(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Enforces that the choice is seen before anything is written, and that other configurations keep their own."""
    assert plan("-d", 990, "-c", "2d", "--input-normalization", kind) == 0
    row = table(capsys.readouterr().out, "2d")["input"]
    assert row.startswith("quantiles 0.01 and 0.98 of every ")
    assert row.endswith(f"become 0 and 1 ({kind})")
    path = folder / f"nnUNetPlans_{kind.replace('_', '')}.json"
    configurations = json.loads(path.read_text())["configurations"]
    assert configurations["2d"]["nnunet_norm"] == {"input_normalization": kind}
    assert "nnunet_norm" not in configurations["3d_fullres"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--population-samples", 0], "population_samples is 0; it must be a whole number of at least 1"),
        (["--reestimate-every", -1], "reestimate_every is -1; it must be a whole number"),
        (["--frozen-share", 1.0], "nnunet_norm.frozen_share is 1.0; it must be a share above 0 and below 1"),
        (["--normalization-batch-size", 0], "normalization_batch_size is 0; it must be a whole number"),
        (["--batch-renorm", "sync=all"], "batch_renorm.sync is 'all'; it must be one of running, full, none"),
    ],
)
def test_settings_out_of_range_get_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: list, message: str
) -> None:
    """Enforces exit code 2, the key, the value and the choice, and no new file."""
    assert plan("-d", 990, "-c", "2d", *flag) == 2
    assert message in refusal(capsys)
    assert [file.name for file in folder.iterdir()] == ["nnUNetPlans.json"]
