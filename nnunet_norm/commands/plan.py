"""Derive a new plans file from one that nnU-Net has written; the preprocessed data are reused.

    nnunet-norm plan -d 4 -c 3d_fullres --batch-size 16 --patch-size 64 160 160 --seed 1

The strides are kept and an indivisible patch is enlarged to fit them; --replan-topology recomputes them as nnU-Net would.
Every stage of a cascade is derived together: batch and patch for the configuration that is named, all else for both.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_norm.commands.messages import messages_shown
from nnunet_norm.errors import PlansError, SetupError
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
    "batch_renorm": "--batch-renorm",
}
"""Parameters of ``derive_plans`` and the flags that give them."""

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
        "--batch-renorm", type=_setting, nargs="+", metavar="KEY=F", help="momentum, r_max, d_max, warmup, ramp"
    )
    parser.add_argument("--plans-name", metavar="NAME", help="of the result (default: the old name and what changed)")
    parser.add_argument("--overwrite", action="store_true", help="replace a plans file of that name")


def _setting(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
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
    with messages_shown():
        derived = derive(plans, args.c, plans_name=args.plans_name, **options)
    path = save_plans(derived, folder, overwrite=args.overwrite)
    print(f"\n{path}\n")
    _print_table(_differences(plans, derived))
    print("\nNext:")
    for command in _next_commands(dataset, derived, args.c, "norm_op" in options):
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


def _next_commands(dataset: str, derived: dict[str, Any], named: list[str], norm_given: bool) -> list[str]:
    """The export line and one training per configuration; a cascade needs all folds of a stage before the next one."""
    trainer = "nnUNetTrainerNorm" if norm_given else "nnUNetTrainerBRN"
    commands = ['export nnUNet_extTrainer="$(nnunet-norm trainers-dir)"']
    for name in dict.fromkeys(stage for configuration in named for stage in cascade(derived, configuration)):
        line = f"nnUNetv2_train {dataset} {name} 0 -p {derived['plans_name']} -tr {trainer}"
        if resolve_configuration(derived, name).get("next_stage"):
            line += "    # and folds 1 to 4, before the next stage"
        commands.append(line)
    return commands
