"""Settings of ``normalization.py`` by name: its own data, or any dataset that nnU-Net has already."""

import json
import os
from dataclasses import replace
from pathlib import Path

from nnunet_datasets import Dataset, make_raw, prepare, program
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from normalization_settings import SETTINGS, SMALL_2D, SMALL_3D, Setting, cases

from nnunet_norm.errors import SetupError
from nnunet_norm.planning.datasets import dataset_name
from nnunet_norm.writing import write_json


def setting_named(text: str, changes: dict[str, object]) -> Setting:
    """A key of ``SETTINGS``, or Dataset123_X:3d_fullres for a dataset in the user's own folders.

    Args:
        text: the name.
        changes: fields of ``Network`` that are not as the setting has them.

    Raises:
        SetupError: no such dataset, or no configuration behind its name.
    """
    if text in SETTINGS:
        found = SETTINGS[text]
        return replace(found, network=replace(found.network, **changes))
    dataset, _, configuration = text.partition(":")
    if not configuration:
        raise SetupError(f"setting {text!r} is unknown: choose {', '.join(SETTINGS)}, or Dataset123_X:3d_fullres")
    name = dataset_name(dataset)
    described = json.loads((_folder("nnUNet_raw") / name / "dataset.json").read_text(encoding="utf-8"))
    data = Dataset(name, configuration, "", described["labels"], described["file_ending"], ())
    network = replace(SMALL_2D if configuration == "2d" else SMALL_3D, **changes)
    return Setting("", data, network, "_UNETR" if network.unetr else "")


def network_changes(args) -> dict[str, object]:
    """What the flags say about the network."""
    said = {
        "stages": args.stages,
        "patch": args.patch and tuple(args.patch),
        "features": args.features,
        "batch": args.batch,
    }
    return {key: value for key, value in said.items() if value is not None}


def make(setting: Setting, data: Path, work: Path) -> None:
    """The preprocessed dataset in ``work``; what is there is not made again."""
    if setting.source:
        prepare(setting.dataset, work, lambda folder: make_raw(setting.dataset, cases(setting.source, data), folder))
        return
    name = setting.dataset.name
    raw, preprocessed = (work / kind / name for kind in ("nnUNet_raw", "nnUNet_preprocessed"))
    if not raw.exists():
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.symlink_to(_folder("nnUNet_raw") / name)
    there = Path(os.environ.get("nnUNet_preprocessed", os.devnull)) / name
    if not (preprocessed / "nnUNetPlans.json").exists():
        if (there / "nnUNetPlans.json").exists():
            _link(there, preprocessed)
        else:
            which = ("-d", setting.dataset.number, "-c", setting.dataset.configuration, "-np", "1", "-npfp", "1")
            program(work, f"{name}.log")("nnUNetv2_plan_and_preprocess", *which, nnUNet_n_proc_DA="1")
    splits = preprocessed / "splits_final.json"
    if not splits.exists():  # two trainings that begin at once must not both write it
        write_json(splits, generate_crossval_split(sorted(get_filenames_of_train_images_and_targets(str(raw)))))


def _link(source: Path, target: Path) -> None:
    """A folder with links to everything in another: what is derived is written beside them, and the other stays."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)


def _folder(variable: str) -> Path:
    if variable not in os.environ:
        raise SetupError(f"{variable} is not set; export it as nnU-Net's documentation says")
    return Path(os.environ[variable])
