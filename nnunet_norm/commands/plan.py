"""Derive a new plans file from one that nnU-Net has written; the preprocessed data are reused.

    nnunet-norm plan -d 4 -c 3d_fullres --batch-size 16 --patch-size 64 160 160 --seed 1
    nnunet-norm plan -d 4 -c 3d_fullres --batch-size 16 --lr-scaling linear --warmup-epochs 5 --num-gpus 8 --vram 24

The strides are kept and an indivisible patch is enlarged to fit them; --replan-topology recomputes them as nnU-Net would.
Every stage of a cascade is derived together: batch and patch for the configuration that is named, all else for both.
A table says before anything is written what a step takes: memory is estimated, or measured where a GPU is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_norm.architectures import UNETR
from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.commands.plan_checks import check_training
from nnunet_norm.commands.plan_options import OPTIONS, add_changes
from nnunet_norm.errors import ExperimentalBatchesError, PlansError, SetupError
from nnunet_norm.experimental_batches import (
    find_experimental_batches,
    load_experimental_batches,
    missing_cases,
    small_batches,
    untrained_batches,
)
from nnunet_norm.planning import cascade, derive_plans, load_plans, resolve_configuration, save_plans
from nnunet_norm.planning.batches import check_shares
from nnunet_norm.planning.configurations import Configuration, Plans
from nnunet_norm.planning.datasets import dataset_name
from nnunet_norm.planning.options import given
from nnunet_norm.planning.recipes import find_recipe
from nnunet_norm.settings import NESTED

TRAINERS = {
    "norm_op": "nnUNetTrainerNorm",
    "domain_statistics": "nnUNetTrainerBEN",
    "normalization_batch_size": "nnUNetTrainerGhostBN",
    "frozen_share": "nnUNetTrainerFrozenBN",
    "reestimate_every": "nnUNetTrainerPreciseBN",
    "population_samples": "nnUNetTrainerPreciseBN",
}
"""Which trainer a setting is for; the first that is given counts."""


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
    parser.add_argument("--setting", metavar="NAME", help="of a recipe that has several, e.g. b16 of amos")
    add_changes(parser)
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="over which the batch is shared out (default: 1)"
    )
    parser.add_argument("--vram", type=float, metavar="GB", help="memory of a GPU; refuse plans that do not fit it")
    parser.add_argument(
        "-device", choices=("cuda", "cpu"), help="measure memory on a GPU, or not (default: where there is one)"
    )
    parser.add_argument("--plans-name", metavar="NAME", help="of the result (default: the old name and what changed)")
    parser.add_argument("--overwrite", action="store_true", help="replace a plans file of that name")


def run(args: argparse.Namespace) -> None:
    """Derive, say what the training takes, save, and say what changed and what to type next."""
    options = _options(args)
    recipe = None if args.recipe is None else find_recipe(args.recipe, args.setting)
    if args.setting is not None and recipe is None:
        raise PlansError(f"--setting {args.setting} belongs to a recipe; give --recipe too")
    if not options and recipe is None:
        raise PlansError(f"nothing to change; give --recipe or at least one of {', '.join(OPTIONS.values())}")
    dataset, folder = _dataset(args.d)
    plans = load_plans(folder, args.p)
    batches = _experimental_batches(dataset, folder, "domain_statistics" in options)
    if "domain_statistics" in options:
        options["domain_statistics"] = batches
    with messages_shown():
        derive = derive_plans if recipe is None else recipe.derive
        derived = derive(plans, args.c, plans_name=args.plans_name, **options)
        check_training(args, plans, derived, Path(folder), dataset)
    path = save_plans(derived, folder, overwrite=args.overwrite)
    print(f"\n{path}\n")
    _print_table(_differences(plans, derived))
    print("\nNext:")
    trainer = next((TRAINERS[name] for name in TRAINERS if name in options), "nnUNetTrainerBRN")
    trainer += f"_{UNETR}" if "unetr" in options else ""
    names = [trainer, *(f"{trainer}_{loss}" for loss in (recipe.losses if recipe is not None else ()))]
    for command in _next_commands(dataset, derived, args, names):
        print(f"  {command}")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as ``derive_plans`` takes it."""
    options = given({name: getattr(args, name) for name in OPTIONS})
    if not options["domain_statistics"]:
        del options["domain_statistics"]
    for nested in NESTED:
        if nested.key in options:
            options[nested.key] = dict(options[nested.key])
    return options


def _dataset(name_or_id: str) -> tuple[str, str]:
    """The dataset's name and its preprocessed folder, by nnU-Net's own conversion."""
    if not nnUNet_preprocessed.is_set():
        raise SetupError("nnUNet_preprocessed is not set; export it as the folder with your preprocessed datasets")
    name = dataset_name(name_or_id, "-d")
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


def _next_commands(dataset: str, derived: Plans, args: argparse.Namespace, trainers: list[str]) -> list[str]:
    """The export line and the trainings of each configuration; a cascade needs all folds of a stage before the next one."""
    commands = ['export nnUNet_extTrainer="$(nnunet-norm trainers-dir)"']
    for name in dict.fromkeys(stage for configuration in args.c for stage in cascade(derived, configuration)):
        resolved = resolve_configuration(derived, name)
        gpus = f" -num_gpus {args.num_gpus}" if args.num_gpus > 1 else ""
        comments = []
        if gpus and not _can_be_shared(resolved, args.num_gpus, name):
            gpus = ""
            comments.append(f"on one GPU: {args.num_gpus} cannot share its batch")
        if resolved.get("next_stage"):
            comments.append("and folds 1 to 4, before the next stage")
        comment = f"    # {'; '.join(comments)}" if comments else ""
        commands += [
            f"nnUNetv2_train {dataset} {name} 0 -p {derived['plans_name']} -tr {trainer}{gpus}{comment}"
            for trainer in trainers
        ]
    return commands


def _can_be_shared(resolved: Configuration, num_gpus: int, name: str) -> bool:
    try:
        check_shares(resolved, num_gpus, name)
    except PlansError:
        return False
    return True
