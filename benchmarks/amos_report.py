"""Results of ``amos.py``: every model's scores, the norms compared within each setting and loss, tables and figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from amos_sweep import Found, levels
from reporting import amount, table

from nnunet_norm.planning import resolve_configuration
from nnunet_norm.planning.topology import as_text
from nnunet_norm.plans.amos import SIDES
from nnunet_norm.scores import DICE, NSD
from nnunet_norm.sweep.collecting import compare_with_baseline
from nnunet_norm.sweep.outcomes import Collection
from nnunet_norm.sweep.pictures import curve_pictures, score_pictures
from nnunet_norm.sweep.points import Point
from nnunet_norm.sweep.tables import DISPARITY, MISMATCH, NONE
from nnunet_norm.training.reporting import none_for_nan
from nnunet_norm.writing import write_json, written_beside

METRICS = (DICE, NSD)

BY_BATCH = ("p160", "b4", "b16", "b64")
"""Settings that differ in the batch size; the first is b2, too."""

HEALTH = (
    "Disparity: 1 - Dice of the same patches with the norms in train and in eval mode, mean over classes; above 0.1 the "
    "stored statistics are not those of the training. Tile mismatch: largest difference of logits where two blocks of "
    'nnunet-norm predict meet the same voxels, in any fold; "no" if none but rounding.'
)
"""What the columns of the table of both are."""


def write_results(found: Found, about: dict[str, Any], name: Path) -> str:
    """``NAME.json``, ``NAME.md`` and figures ``NAME_*.png``; the text of the second."""
    sweep = found.sweep
    pictures = [*score_pictures(sweep), *(one for one in curve_pictures(sweep) if "Dice" in one.title)]
    files = [name.with_name(f"{name.name}_{number}.png") for number in range(1, len(pictures) + 1)]
    result = about | {
        "dataset": sweep.grid.dataset,
        "configuration": sweep.grid.configuration,
        "evaluation": sweep.settings,
        "trained": f"{len(sweep.done)} of {len(sweep.outcomes)}",
        "models": [model(sweep, point) for point in sweep.grid.points],
        "norms": list(norms_compared(sweep)),
        "ensemble": found.ensemble and {key: found.ensemble[key] for key in ("metric", "candidates", "best")},
        "figures": {
            file.name: {"title": picture.title, "caption": picture.caption}
            for file, picture in zip(files, pictures, strict=True)
        },
    }
    for candidate in (result["ensemble"] or {}).get("candidates", ()):
        candidate.pop("folder")  # a place on this machine
    name.parent.mkdir(parents=True, exist_ok=True)
    write_json(name.with_suffix(".json"), result, indent=2)
    for file, picture in zip(files, pictures, strict=True):
        with written_beside(file) as beside:
            beside.write_bytes(picture.png)
    text = markdown(result)
    with written_beside(name.with_suffix(".md")) as beside:
        beside.write_text(text, encoding="utf-8")
    return text


def model(sweep: Collection, point: Point) -> dict[str, Any]:
    """A model's scores fold by fold (None: not trained yet), and what its trainer measured."""
    resolved = resolve_configuration(dict(point.plans), sweep.grid.configuration)
    outcomes = sweep.of(point)
    return {
        "name": point.name,
        **levels(point.values),
        "patch": list(resolved["patch_size"]),
        "batch": resolved["batch_size"],
        **{metric: [none_for_nan(one.score(metric)) for one in outcomes] for metric in METRICS},
        **{
            f"{metric} by class": {
                name: [none_for_nan(one.score(metric, label)) for one in outcomes]
                for label, name in sweep.labels.items()
            }
            for metric in METRICS
        },
        "disparity": [none_for_nan(one.disparity) for one in outcomes],
        "mismatch": [one.tiles.verdict for one in outcomes],
        "epochs": [len(one.epochs) for one in outcomes],
        "seconds per epoch": [none_for_nan(one.seconds) for one in outcomes],
    }


def norms_compared(sweep: Collection) -> Iterator[dict[str, Any]]:
    """Every norm minus the first one with the same loss and setting, over the cases of all folds that both have."""
    first = levels(sweep.grid.points[0].values)["norm"]
    others = [point for point in sweep.grid.points if levels(point.values)["norm"] != first]
    for point in others:
        base = next(one for one in sweep.grid.points if levels(one.values) == levels(point.values) | {"norm": first})
        pair = replace(sweep, grid=replace(sweep.grid, points=(base, point), baseline=base))
        compared = compare_with_baseline(pair)[point.name]
        yield levels(point.values) | {
            metric: {key: none_for_nan(value) for key, value in asdict(one).items()}
            if (one := compared[metric])
            else None
            for metric in METRICS
        }


def markdown(result: Mapping[str, Any]) -> str:
    """The report."""
    settings, found = result["settings"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    folds = f"fold{'s' * (len(settings['folds']) > 1)} {', '.join(map(str, settings['folds']))} of five"
    parts = [
        f"# Patch, batch and loss on {result['dataset']}",
        f"`{result['command']}` on {found['gpu'] or found['cpu']}, {found['cores']} cores, {amount(found.get('memory'))}; "
        f"{versions}. {settings['note']}".strip(),
        f"{result['trained']} trainings are done: {settings['epochs']} x {settings['iterations']} optimizer steps, "
        f"{folds}, seed {settings['seed']}, else as `nnunet-norm sweep run amos` does it. {result['scaled']}".strip(),
        "Every training has as many steps, so a larger batch or patch has seen more voxels, and taken longer, as in the "
        "study. Cells: Dice / surface Dice (NSD), mean over classes and validation cases"
        + (", mean over folds (lowest to highest)" if len(settings["folds"]) > 1 else "")
        + f"; {NONE}: not trained yet. One training per cell and fold: differences of a few thousandths are within what "
        "another seed would change.",
    ]
    for title, names in (("Patch", tuple(SIDES)), ("Batch", BY_BATCH)):
        asked = [name for name in names if name in settings["settings"]]
        if len(asked) > 1:
            parts += [f"## {title}", *score_tables(result, asked)]
    parts += ["## Norms", *norm_table(result)]
    parts += [f"![{one['title']}]({file})\n\n{one['caption']}" for file, one in result["figures"].items()]
    parts += ["## Disparity and tile mismatch", health_table(result), HEALTH]
    return "\n\n".join([*parts, "## Ensemble", ensemble(result)]) + "\n"


def score_tables(result: Mapping[str, Any], settings: Sequence[str]) -> Iterator[str]:
    """A table per norm: settings by losses."""
    for norm in result["settings"]["norms"]:
        yield f"{norm}:"
        yield by_loss(result, settings, lambda one: " / ".join(shown(one[metric]) for metric in METRICS), norm)


def by_loss(result, settings, cell, norm, among="models"):
    """Rows: settings; columns: losses; a cell is made of the entry of ``norm`` in ``result[among]``."""
    entries = {tuple(one[key] for key in ("norm", "loss", "setting")): one for one in result[among]}
    sizes = {one["setting"]: (as_text(one["patch"]), str(one["batch"])) for one in result["models"]}
    losses = result["settings"]["losses"]
    rows = [["patch", "batch", *losses]]
    rows += [[*sizes[name], *(cell(entries[norm, loss, name]) for loss in losses)] for name in settings]
    return table(rows)


def shown(values: Sequence[float | None]) -> str:
    """Mean over the folds that are there, and the range."""
    there = [value for value in values if value is not None]
    if not there:
        return NONE
    mean = f"{sum(there) / len(there):.3f}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.3f} to {max(there):.3f})"


def norm_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Differences of Dice, with intervals, and how many of them leave 0 out."""
    first, *others = result["settings"]["norms"]

    def difference(one: Mapping[str, Any]) -> str:
        found = one[DICE]
        if found is None:
            return NONE
        interval = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
        return f"{found['mean']:+.3f}{interval}"

    for norm in others:
        there = [one[DICE] for one in result["norms"] if one["norm"] == norm and one[DICE]]
        sure = [one["mean"] for one in there if one["low"] is not None and (one["low"] > 0 or one["high"] < 0)]
        better, worse = sum(mean > 0 for mean in sure), sum(mean < 0 for mean in sure)
        yield (
            f"Dice of {norm} minus {first}, same setting and loss: mean over the cases that both have, with the 95 % "
            f"bootstrap interval over cases (which does not know how much another seed would change). Of {len(there)} "
            f"comparisons the interval leaves 0 out in {len(sure)}: {norm} is better in {better} and worse in {worse}."
        )
        yield by_loss(result, result["settings"]["settings"], difference, norm, "norms")


def health_table(result: Mapping[str, Any]) -> str:
    """Disparity and tile mismatch of every model with the first loss."""
    rows = [["norm", "patch", "batch", DISPARITY, MISMATCH]]
    for one in result["models"]:
        if one["loss"] == result["settings"]["losses"][0]:
            verdicts = dict.fromkeys(verdict.partition(" (")[0] for verdict in one["mismatch"])
            cells = (as_text(one["patch"]), str(one["batch"]), shown(one["disparity"]), ", ".join(verdicts))
            rows.append([one["norm"], *cells])
    return table(rows)


def ensemble(result: Mapping[str, Any]) -> str:
    """The best models and pairs of ``ensemble --find``."""
    if not result["ensemble"]:
        return "Searched for when all trainings are done."
    key = result["ensemble"]["metric"]
    named = {
        one["name"]: f"{one['norm']} {one['loss']} {as_text(one['patch'])} b{one['batch']}" for one in result["models"]
    }
    ranked = sorted(result["ensemble"]["candidates"], key=lambda one: -(one[key] or 0))
    rows = [["", DICE, NSD]]
    for kind, count in (("model", 1), ("pair", 2)):
        best = [one for one in ranked if len(one["models"]) == count][:3]
        rows += [
            [f"{kind} {' + '.join(named[name] for name in one['models'])}", *(shown([one[m]]) for m in METRICS)]
            for one in best
        ]
    return (
        "Best models and best pairs, averaged probabilities, by `nnunet-norm ensemble --find`; chosen on the cases on which "
        f"they are scored, so expect less on new ones.\n\n{table(rows)}"
    )
