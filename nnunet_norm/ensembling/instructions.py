"""What a search found, in words: the table of all candidates, and the commands that predict with the best."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from nnunet_norm.ensembling.models import Model
from nnunet_norm.ensembling.search import Candidate, Found, best_by
from nnunet_norm.evaluation import ABSENT, SETTINGS, tolerance_in_words
from nnunet_norm.pages import markdown_table
from nnunet_norm.scores import DICE, HD95, METRICS, NSD
from nnunet_norm.training.reporting import none_for_nan
from nnunet_norm.writing import write_json, written_beside

INSTRUCTIONS = "ensemble_instructions.txt"
RESULTS = "ensemble_results.json"


def table_of(found: Found) -> str:
    """Every candidate with its scores, the best first; the best of each column is marked."""
    metrics = [metric for metric in (DICE, NSD, HD95) if metric in found.best.summary["foreground_mean"]]
    leaders = {metric: best_by(found.candidates, metric) for metric in METRICS if _is_measured(found, metric)}
    order = sorted(found.candidates, key=lambda one: _sortable(one.score(found.metric)), reverse=True)
    rows = [
        [*(_cell(one.score(metric), metric, leaders.get(metric) is one) for metric in metrics), one.name]
        for one in order
    ]
    table = markdown_table([*metrics, "model or pair"], rows)
    cases, at = len(found.best.summary["metric_per_case"]), tolerance_in_words(found.best.summary[SETTINGS])
    return (
        f"{table}\nMean over classes of the mean over {cases} cases; NSD at {at}; * is the best of its column. {ABSENT}"
    )


def commands_of(candidate: Candidate) -> list[str]:
    """The commands that predict new images with a model or a pair."""
    folds = " ".join(map(str, candidate.models[0].folds))
    if len(candidate.models) == 1:
        return _predict(candidate.models[0], "OUTPUT_FOLDER")
    if all(model.previous_stage is None for model in candidate.models):
        names = " ".join(model.name for model in candidate.models)
        return [
            f"nnunet-norm ensemble -d {candidate.models[0].dataset} -m {names} -f {folds} -i INPUT_FOLDER -o OUTPUT_FOLDER"
        ]
    folders = [f"OUTPUT_FOLDER_MODEL_{number + 1}" for number in range(len(candidate.models))]
    single = [
        command
        for model, folder in zip(candidate.models, folders, strict=True)
        for command in _predict(model, folder, " --save_probabilities")
    ]
    return [*single, f"nnunet-norm ensemble -i {' '.join(folders)} -o OUTPUT_FOLDER"]


def _predict(model: Model, output: str, also: str = "") -> list[str]:
    """The command that predicts with a model; in a cascade, after that of the first stage, which has the same trainer."""
    trainer, plans, own = model.parts

    def command(configuration: str, output: str) -> str:
        return (
            f"nnunet-norm predict -d {model.dataset} -i INPUT_FOLDER -o {output} -f {' '.join(map(str, model.folds))} "
            f"-tr {trainer} -c {configuration} -p {plans}"
        )

    if model.previous_stage is None:
        return [f"{command(own, output)}{also}"]
    first = f"{output}_PREV_STAGE"
    return [command(model.previous_stage, first), f"{command(own, output)} -prev_stage_predictions {first}{also}"]


def postprocessing_command(found: Found) -> str:
    """The command that applies nnU-Net's postprocessing of the best."""
    file, plans = found.postprocessing.path, found.best.folder / "plans.json"
    return (
        f"nnUNetv2_apply_postprocessing -i OUTPUT_FOLDER -o OUTPUT_FOLDER_PP -pp_pkl_file {shlex.quote(str(file))} "
        f"-plans_json {shlex.quote(str(plans))}"
    )


def instructions_of(found: Found) -> str:
    """The best, and what to run."""
    best = found.best
    lines = [f"Best by {found.metric} ({best.score(found.metric):.4f}): {best.name}", *commands_of(best), ""]
    count = len(found.postprocessing.arguments)
    if count:
        steps = f"{count} step{'s' * (count != 1)}"
        lines += [f"nnU-Net's postprocessing ({steps}) raises its Dice here:", postprocessing_command(found)]
        if len(best.models) > 1 and len(commands_of(best)) == 1:
            lines += ["(or, in place of that command, add to the one above: --postprocessing after)"]
        lines += [""]
    else:
        lines += ["nnU-Net's postprocessing does not raise its Dice here: there is none to apply.", ""]
    for metric in METRICS:
        if metric != found.metric and _is_measured(found, metric):
            other = best_by(found.candidates, metric)
            if other is not best:
                lines += [f"Best by {metric} ({other.score(metric):.4f}): {other.name}", *commands_of(other), ""]
    return "\n".join(lines)


def write_findings(found: Found, folder: str | Path) -> tuple[Path, Path]:
    """Write the instructions and, for programs, all results; each file whole.

    Args:
        found: by a search.
        folder: made if need be.

    Returns:
        Both files.

    Raises:
        OutputError: they cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text, results = folder / INSTRUCTIONS, folder / RESULTS
    with written_beside(text) as beside:
        beside.write_text(f"{table_of(found)}\n\n{instructions_of(found)}", encoding="utf-8")
    write_json(results, _as_dict(found))
    return text, results


def _as_dict(found: Found) -> dict[str, Any]:
    return {
        "metric": found.metric,
        "tolerance_in_mm": found.best.summary[SETTINGS]["tolerance"],
        "folds": list(found.best.models[0].folds),
        "candidates": [
            {
                "models": [model.name for model in one.models],
                "folder": str(one.folder),
                **{metric: none_for_nan(one.score(metric)) for metric in METRICS},
            }
            for one in found.candidates
        ],
        "best": [model.name for model in found.best.models],
        "commands": commands_of(found.best),
        "postprocessing": str(found.postprocessing.path),
        "postprocessing_steps": len(found.postprocessing.arguments),
    }


def _is_measured(found: Found, metric: str) -> bool:
    return not all(math.isnan(one.score(metric)) for one in found.candidates)


def _sortable(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _cell(score: float, metric: str, is_best: bool) -> str:
    if math.isnan(score):
        return "-"
    return f"{score:.2f} mm" if metric == HD95 else f"{score:.4f}{'*' if is_best else ''}"
