"""Plans files: found with a telling refusal, written beside and then renamed."""

import json
import os
from pathlib import Path
from typing import Any

from nnunet_norm.errors import PlansError
from nnunet_norm.planning.naming import check_plans_name
from nnunet_norm.writing import write_json

Plans = dict[str, Any]

NOT_PLANS = {"dataset", "dataset_fingerprint", "experimental_batches", "splits_final"}
"""The other JSON files of a preprocessed dataset."""

INPUT_QUANTILES = "_input_quantiles"
"""Ending of those that keep the quantiles of a configuration's cases (``input_normalization``)."""


def load_plans(dataset_folder: str | os.PathLike[str], plans_identifier: str) -> Plans:
    """Read ``<plans_identifier>.json`` of a preprocessed dataset.

    Raises:
        PlansError: the folder or the file is not there (the plans that are there are listed), or it is no plans file.
    """
    folder = Path(dataset_folder)
    if Path(plans_identifier).name != plans_identifier:
        raise PlansError(f"plans {plans_identifier!r}: give the name of the plans, without folder")
    path = folder / f"{plans_identifier}.json"
    if not folder.is_dir():
        raise PlansError(
            f"plans {plans_identifier}: there is no folder {folder}; run nnUNetv2_plan_and_preprocess first"
        )
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = sorted(file.stem for file in folder.glob("*.json") if not _is_other(file.stem))
        choice = f"there are {', '.join(there)}" if there else "there are none; run nnUNetv2_plan_experiment first"
        raise PlansError(f"plans {plans_identifier} are not in {folder}; {choice}") from error
    except OSError as error:
        raise PlansError(f"plans {path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlansError(f"plans {path} are not JSON ({error}); run nnUNetv2_plan_experiment again") from error
    if not isinstance(plans, dict) or not isinstance(plans.get("configurations"), dict) or "plans_name" not in plans:
        raise PlansError(f"{path} is not a plans file: it lacks plans_name or configurations")
    return plans


def _is_other(stem: str) -> bool:
    return stem in NOT_PLANS or stem.endswith(INPUT_QUANTILES)


def save_plans(plans: Plans, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write ``<plans_name>.json`` into ``folder``, whole or not at all.

    Raises:
        PlansError: a file of that name is there and ``overwrite`` is not given, or the name cannot be one.
        OutputError: the folder is missing or read-only, the disk is full; nothing is left behind.
    """
    check_plans_name(plans["plans_name"])
    path = Path(folder) / f"{plans['plans_name']}.json"
    if path.exists() and not overwrite:
        raise PlansError(f"{path} exists; choose another --plans-name or give --overwrite")
    write_json(path, plans)
    return path
