"""Derive a new plans file from one that nnU-Net has written; the preprocessed data are reused.

    nnunet-norm plan -d 4 -c 3d_fullres --batch-size 16 --patch-size 64 160 160 --seed 1

The strides are kept and an indivisible patch is enlarged to fit them; --replan-topology recomputes them as nnU-Net would.
Every stage of a cascade is derived together: batch and patch for the configuration that is named, all else for both.
"""

import argparse
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.errors import ExperimentalBatchesError, PlansError, SetupError
from nnunet_norm.experimental_batches import (
    find_experimental_batches,
    load_experimental_batches,
    missing_cases,
    small_batches,
    untrained_batches,
)
from nnunet_norm.planning import cascade, derive_plans, load_plans, resolve_configuration, save_plans

OPTIONS = {
    "batch_size": "--batch-size",
    "patch_size": "--patch-size",
    "replan_topology": "--replan-topology",
    "num_stages": "--num-stages",
    "base_features": "--base-features",
    "features_per_stage": "--features-per-stage",
    "norm_op": "--norm-op",
    "iterations_per_epoch": "--iterations-per-epoch",
    "val_iterations_per_epoch": "--val-iterations-per-epoch",
    "initial_lr": "--initial-lr",
    "seed": "--seed",
    "disparity_batches": "--disparity-batches",
    "population_samples": "--population-samples",
    "reestimate_every": "--reestimate-every",
    "frozen_share": "--frozen-share",
    "normalization_batch_size": "--normalization-batch-size",
    "domain_statistics": "--domain-statistics",
    "batch_renorm": "--batch-renorm",
}
"""Parameters of ``derive_plans`` and the flags that give them."""

TRAINERS = {
    "norm_op": "nnUNetTrainerNorm",
    "domain_statistics": "nnUNetTrainerBEN",
    "normalization_batch_size": "nnUNetTrainerGhostBN",
    "frozen_share": "nnUNetTrainerFrozenBN",
    "reestimate_every": "nnUNetTrainerPreciseBN",
    "population_samples": "nnUNetTrainerPreciseBN",
}
"""Which trainer a setting is for; the first that is given counts."""

RECIPES = "nnunet_norm.plans"
"""Where recipes are found by name; the library does not import them otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plans to start from, what changes, and the name of the result."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or id of the dataset")
    parser.add_argument(
        "-c", required=True, nargs="+", metavar="CONFIG", help="configurations to change, e.g. 3d_fullres"
    )
    parser.add_argument(
        "-p", default="nnUNetPlans", metavar="PLANS", help="plans to derive from (default: nnUNetPlans)"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="named set of changes, e.g. shallow; the options below go on top"
    )
    changes = parser.add_argument_group("changes")
    changes.add_argument("--batch-size", type=int, metavar="N", help="samples per optimizer step, over all GPUs")
    changes.add_argument(
        "--patch-size", type=int, nargs="+", metavar="N", help="voxels per axis, in the order of the plans"
    )
    changes.add_argument(
        "--replan-topology", action="store_true", help="strides and kernels as nnU-Net would choose them"
    )
    changes.add_argument("--num-stages", type=int, metavar="N", help="keep this many of the finest stages")
    changes.add_argument(
        "--base-features", type=int, metavar="N", help="of the first stage; doubled up to the plan's cap"
    )
    changes.add_argument("--features-per-stage", type=int, nargs="+", metavar="N", help="instead, one number per stage")
    changes.add_argument("--norm-op", metavar="PATH", help="dotted path of a norm (train it with nnUNetTrainerNorm)")
    changes.add_argument("--iterations-per-epoch", type=int, metavar="N", help="optimizer steps per epoch")
    changes.add_argument("--val-iterations-per-epoch", type=int, metavar="N", help="validation batches per epoch")
    changes.add_argument("--initial-lr", type=float, metavar="F", help="learning rate at the start")
    changes.add_argument("--seed", type=int, metavar="N", help="of weights; with nnUNet_n_proc_DA=0 of all else too")
    changes.add_argument("--disparity-batches", type=int, metavar="N", help="batches on which disparity is measured")
    changes.add_argument(
        "--population-samples", type=int, metavar="N", help="patches for PreciseBN's and FrozenBN's statistics"
    )
    changes.add_argument("--reestimate-every", type=int, metavar="N", help="epochs between PreciseBN's estimates")
    changes.add_argument("--frozen-share", type=float, metavar="F", help="of FrozenBN's epochs, at the end")
    changes.add_argument("--normalization-batch-size", type=int, metavar="N", help="samples that GhostBN normalizes by")
    changes.add_argument(
        "--domain-statistics",
        action="store_true",
        help="running statistics for each experimental batch of the dataset (nnUNetTrainerBEN)",
    )
    changes.add_argument(
        "--batch-renorm", type=_setting, nargs="+", metavar="KEY=V", help="momentum, r_max, d_max, warmup, ramp, sync"
    )
    parser.add_argument("--plans-name", metavar="NAME", help="of the result (default: the old name and what changed)")
    parser.add_argument("--overwrite", action="store_true", help="replace a plans file of that name")


def _setting(text: str) -> tuple[str, float | str]:
    key, _, value = text.partition("=")
    if key == "sync" and value:
        return key, value
    try:
        return key, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=NUMBER, e.g. r_max=2") from error


def run(args: argparse.Namespace) -> None:
    """Derive, save, and say what changed and what to type next."""
    given = {name: getattr(args, name) for name in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    if "batch_renorm" in options:
        options["batch_renorm"] = dict(options["batch_renorm"])
    if not options and args.recipe is None:
        raise PlansError(f"nothing to change; give --recipe or at least one of {', '.join(OPTIONS.values())}")
    derive = derive_plans if args.recipe is None else _recipe(args.recipe)
    dataset, folder = _dataset(args.d)
    plans = load_plans(folder, args.p)
    batches = _experimental_batches(dataset, folder, "domain_statistics" in options)
    if "domain_statistics" in options:
        options["domain_statistics"] = batches
    with messages_shown():
        derived = derive(plans, args.c, plans_name=args.plans_name, **options)
    path = save_plans(derived, folder, overwrite=args.overwrite)
    print(f"\n{path}\n")
    _print_table(_differences(plans, derived))
    print("\nNext:")
    trainer = next((TRAINERS[name] for name in TRAINERS if name in options), "nnUNetTrainerBRN")
    for command in _next_commands(dataset, derived, args.c, trainer):
        print(f"  {command}")


def _recipe(name: str) -> Callable[..., dict[str, Any]]:
    """The function ``derive`` of a module in ``plans/``."""
    there = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(RECIPES).__path__))
    if name not in there:
        raise PlansError(f"--recipe {name} is not known; choose from {', '.join(there)}")
    derive: Callable[..., dict[str, Any]] = importlib.import_module(f"{RECIPES}.{name}").derive
    return derive


def _dataset(name_or_id: str) -> tuple[str, str]:
    """The dataset's name and its preprocessed folder, by nnU-Net's own conversion."""
    if not nnUNet_preprocessed.is_set():
        raise SetupError("nnUNet_preprocessed is not set; export it as the folder with your preprocessed datasets")
    try:
        name = str(maybe_convert_to_dataset_name(name_or_id))
    except (RuntimeError, ValueError) as error:  # what nnU-Net raises for no, several or a misspelt dataset
        raise SetupError(f"-d {name_or_id}: {' '.join(str(error).split())}") from error
    return name, f"{nnUNet_preprocessed}/{name}"


def _experimental_batches(dataset: str, folder: str, wanted: bool) -> list[str]:
    """Names of the dataset's experimental batches; what is wrong with them is refused if they are wanted, and else told."""
    try:
        path = find_experimental_batches(dataset)
    except ExperimentalBatchesError:
        if wanted:
            raise
        return []
    try:
        batches = load_experimental_batches(path)
    except ExperimentalBatchesError as error:
        if wanted:
            raise
        print(f"WARNING: {error}")
        return []
    cases, splits = _cases(dataset, folder)
    if wanted and not cases:
        raise SetupError(f"-d {dataset}: there are no cases yet; run nnUNetv2_plan_and_preprocess first")
    problems = [text for text in (missing_cases(batches, cases), small_batches(batches, cases)) if text]
    if wanted and problems:
        raise ExperimentalBatchesError(f"{path}: {'; '.join(problems)}")
    # Leaving whole experimental batches out is a way to validate: told, never refused.
    for text in [*problems, untrained_batches(batches, splits)]:
        if text:
            print(f"WARNING: {path}: {text}")
    return list(batches.grouped(case for case in cases if case in batches.batches))


def _cases(dataset: str, folder: str) -> tuple[set[str], list[dict[str, list[str]]]]:
    """The dataset's cases, of the preprocessed labels or, before there are any, of the raw data; and its folds, if any."""
    path = Path(folder, "splits_final.json")
    splits = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    labels, description = Path(folder, "gt_segmentations"), Path(folder, "dataset.json")
    if labels.is_dir() and description.is_file():
        ending = json.loads(description.read_text(encoding="utf-8"))["file_ending"]
        return {file.name.removesuffix(ending) for file in labels.glob(f"*{ending}")}, splits
    if nnUNet_raw.is_set() and Path(str(nnUNet_raw), dataset, "dataset.json").is_file():
        return set(get_filenames_of_train_images_and_targets(f"{nnUNet_raw}/{dataset}")), splits
    return set(), splits


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(configuration, key, old, new) of everything that a configuration says or inherits, and that changed."""
    rows = [("", "plans_name", old["plans_name"], new["plans_name"])]
    for name in new["configurations"]:
        before, after = _flat(resolve_configuration(old, name)), _flat(resolve_configuration(new, name))
        for key in [*after, *(key for key in before if key not in after)]:
            if before.get(key) != after.get(key):
                shown = key.removeprefix("architecture.").removeprefix("arch_kwargs.")
                rows.append((name, shown, _shown(before, key), _shown(after, key)))
    return rows


def _shown(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "-"


def _print_table(rows: list[tuple[str, str, str, str]]) -> None:
    """Old -> new, with the first two columns aligned."""
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for configuration, key, old, new in rows:
        print(f"{configuration:<{widths[0]}}  {key:<{widths[1]}}  {old} -> {new}")


def _next_commands(dataset: str, derived: dict[str, Any], named: list[str], trainer: str) -> list[str]:
    """The export line and one training per configuration; a cascade needs all folds of a stage before the next one."""
    commands = ['export nnUNet_extTrainer="$(nnunet-norm trainers-dir)"']
    for name in dict.fromkeys(stage for configuration in named for stage in cascade(derived, configuration)):
        line = f"nnUNetv2_train {dataset} {name} 0 -p {derived['plans_name']} -tr {trainer}"
        if resolve_configuration(derived, name).get("next_stage"):
            line += "    # and folds 1 to 4, before the next stage"
        commands.append(line)
    return commands
