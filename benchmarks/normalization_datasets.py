"""Settings of ``normalization.py`` by name: its own data, or any dataset that nnU-Net has already."""

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_datasets import Dataset, make_raw, prepare, program
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from normalization_settings import SETTINGS, Network, Setting, cases

from nnunet_norm.errors import SetupError
from nnunet_norm.planning import load_plans, resolve_configuration
from nnunet_norm.planning.configurations import require_architecture
from nnunet_norm.planning.datasets import dataset_name
from nnunet_norm.planning.topology import cut, divisible_patch, kwargs_of, smallest_patch, total_stride
from nnunet_norm.writing import write_json

MOST_VOXELS = {2: 128, 3: 48}
"""Of an edge of the patch of a dataset of the user's, by number of axes."""

MOST_STAGES = 4
"""Of its network."""


def setting_named(text: str) -> Setting:
    """A key of ``SETTINGS``, or Dataset123_X:3d_fullres for a dataset in the user's own folders.

    The network of the latter is not that of its plans yet, see :func:`with_network`.

    Raises:
        SetupError: no such dataset, or no configuration behind its name.
    """
    if text in SETTINGS:
        return SETTINGS[text]
    dataset, _, configuration = text.partition(":")
    if not configuration:
        raise SetupError(f"setting {text!r} is unknown: choose {', '.join(SETTINGS)}, or Dataset123_X:3d_fullres")
    name = dataset_name(dataset)
    described = _folder("nnUNet_raw") / name / "dataset.json"
    if not described.exists():
        raise SetupError(f"setting {text!r}: nnUNet_raw has no {name}/dataset.json; copy the raw dataset there")
    labels, ending = (json.loads(described.read_text(encoding="utf-8"))[key] for key in ("labels", "file_ending"))
    return Setting("", Dataset(name, configuration, "", labels, ending, ()), Network(MOST_STAGES, ()))


def with_network(setting: Setting, changes: dict[str, Any], work: Path) -> Setting:
    """The setting with the network that is trained.

    That of a dataset of the user's comes from nnU-Net's plans for it: at most ``MOST_STAGES`` of the stages, and of the patch
    at most ``MOST_VOXELS`` an edge, enlarged to what the strides of those stages divide and allow.

    Args:
        setting: made in ``work``.
        changes: fields of ``Network`` that are not as the setting has them.
        work: folder of nnU-Net's folders.

    Raises:
        PlansError: the plans do not have the configuration, or no stages.
    """
    if setting.source:
        return replace(setting, network=replace(setting.network, **changes))
    data = setting.dataset
    plans = load_plans(work / "nnUNet_preprocessed" / data.name, "nnUNetPlans")
    resolved = resolve_configuration(plans, data.configuration)
    architecture = require_architecture(resolved, data.configuration)
    own = kwargs_of(architecture, data.configuration)["n_stages"]
    stages = changes.get("stages", min(own, MOST_STAGES))
    planned = resolved["patch_size"]
    stride = total_stride(cut(architecture, stages, data.configuration), len(planned), data.configuration)
    capped = [min(edge, MOST_VOXELS[len(planned)]) for edge in planned]
    patch = divisible_patch([max(each) for each in zip(capped, smallest_patch(stride), strict=True)], stride)
    return replace(setting, network=replace(setting.network, **{"stages": stages, "patch": patch} | changes))


def network_changes(args) -> dict[str, Any]:
    """What the flags say about the network."""
    said = {
        "stages": args.stages,
        "patch": args.patch and tuple(args.patch),
        "features": args.features,
        "batch": args.batch,
    }
    return {key: value for key, value in said.items() if value is not None}


def refuse_collisions(settings: Iterable[Setting], work: Path) -> None:
    """Refuse a dataset of the user's where a built-in setting has made one of that name, and the other way round.

    Raises:
        SetupError: as said, or ``work`` has the dataset from elsewhere.
    """
    own: dict[str, bool] = {}
    for setting in settings:
        name, made = setting.dataset.name, bool(setting.source)
        raw = work / "nnUNet_raw" / name
        theirs = None if made else (_folder("nnUNet_raw") / name).resolve()
        there = raw.exists() and (raw.is_symlink() if made else raw.resolve() != theirs)
        if there or own.setdefault(name, made) != made:
            raise SetupError(
                f"{name} is the name of a dataset in your folders and of one that a built-in setting makes, or of two in "
                f"different folders: take another folder than --work {work} for one of them"
            )


def make(setting: Setting, data: Path, work: Path) -> None:
    """The preprocessed dataset in ``work``; what is there is not made again.

    Raises:
        SetupError: the images are not in ``data``.
    """
    if setting.source:
        prepare(setting.dataset, work, lambda folder: make_raw(setting.dataset, cases(setting.source, data), folder))
        return
    name = setting.dataset.name
    raw, preprocessed = (work / kind / name for kind in ("nnUNet_raw", "nnUNet_preprocessed"))
    if not raw.exists():
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.symlink_to((_folder("nnUNet_raw") / name).resolve())
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
