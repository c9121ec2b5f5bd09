"""Tables of ``normalization.py``, and the file with its numbers."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from normalization_figures import draw_batches, draw_modes, draw_tiles, draw_transfer
from normalization_settings import NORMALIZATION_BATCHES, ROWS
from reporting import table

from nnunet_norm.training.trainer import LARGE_DISPARITY
from nnunet_norm.writing import write_json, written_beside

REFERENCE = "InstanceNorm"
MEASURED = Callable[[dict[str, Any]], float | None]

NOTES = {
    "modes": """\
Patches as large as in training, side by side over all validation images, in a random but fixed order and the same batches
in each mode, as many patches as in a training batch. Eval: the norms' running statistics (the patch's own for
InstanceNorm and GroupNorm). Train: the statistics of the batch, for BatchRenorm and FrozenBN as at the end of their
training. Disparity: 1 - Dice between both modes; *against the batch alone*: between eval mode and plain batch statistics,
where train mode has others. Dice of all patches together; means over the classes.""",
    "seams": """\
The same voxels predicted from two tiles, at least the halo of the network's convolutions away from every inner side
(UNETR sees all of a tile: its predictor's halo). Mismatch: median over the pairs of 1 - Dice. Max dist: largest
difference of any logit; "no" where it is zero or rounding. Networks with InstanceNorm and GroupNorm use the tile's
statistics here; by default this package's predictor takes those of the whole image instead: the last column is what the
trainings' own validation found.""",
    "whole": """\
Nothing mirrored; Dice of all validation images together. Halo predictor: as one pass over the whole image, with its
statistics for InstanceNorm and GroupNorm; tile quantiles and UNETR in tiles of the patch. Blending: nnU-Net's predictor,
tiles of the patch with step 0.5. Difference: from InstanceNorm of the same seed in its best way, the halo predictor's.""",
    "tiles": """\
Tiles without overlap but for the halo, which is that of the convolutions and at most a quarter of a tile, each normalized
with its own statistics where the norm has no others. Mean over the classes; the last column is the whole image.""",
    "batches": """\
GhostBN normalizes parts of a training batch by themselves, as several GPUs would; all else is the same. Below: networks
trained at the batch of the table above, their train mode with other batches, on at most 96 patches.""",
    "transfer": """\
Dice of membranes. Own: this dataset's validation images. Other images: as trained, and with running statistics
re-estimated on the other dataset's training images without their labels (`nnunet-norm recalibrate`; adaptive batch
normalization). Trained there: the same row of the other setting on its own images, if that was measured.""",
}


def write_report(result: dict[str, Any], path: Path) -> None:
    """JSON, Markdown and figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result, indent=2)
    rows = rows_of(result)
    figures = {}
    for name, draw in (("", draw_modes), ("tiles", draw_tiles), ("batches", draw_batches), ("transfer", draw_transfer)):
        file = path.with_name(f"{path.stem}{'_' * bool(name)}{name}.png")
        figures[name] = f"![{name or 'modes'}]({file.name})" if draw(rows, result, file) else ""
    there = path.with_name(f"normalization_{result['other']}.json")
    other = rows_of(json.loads(there.read_text())) if result["other"] and there.exists() else {}
    text = markdown(result, rows, figures, other)
    with written_beside(path.with_suffix(".md")) as beside:
        beside.write_text(text, encoding="utf-8")
    print(text)


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Per row what was measured, by seed; rows of which nothing is known are empty."""
    return {row: {seed: found for seed, found in result["trained"].get(row, {}).items() if found} for row in ROWS} | {
        str(size): {seed: found for seed, found in result["trained"].get(str(size), {}).items() if found}
        for size in NORMALIZATION_BATCHES
    }


def average(values: Iterable[float | None]) -> float | None:
    """Over what was measured."""
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def shown(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean, and from the least to the most in brackets."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    middle = format(mean(there), form)
    return middle if len(there) == 1 else f"{middle} ({format(min(there), form)} to {format(max(there), form)})"


def of_runs(runs: dict[str, Any], *keys: str) -> list[Any]:
    """What lies under ``keys`` in every run, None where it is missing."""
    found = []
    for run in runs.values():
        value: Any = run
        for key in keys:
            value = None if value is None else value.get(key)
        found.append(value)
    return found


def means(lists: Iterable[list[float | None] | None]) -> list[float | None]:
    """Of each run over the classes."""
    return [None if each is None else average(each) for each in lists]


def per_class(lists: Sequence[Any], number: int) -> list[float | None]:
    """One class of each run."""
    return [None if each is None else list(each.values() if isinstance(each, dict) else each)[number] for each in lists]


def classes_of(rows: dict[str, Any]) -> list[str]:
    """Names of the classes."""
    return next((names for runs in rows.values() for names in of_runs(runs, "tables", "classes") if names), [])


def markdown(result: dict[str, Any], rows: dict[str, Any], figures: dict[str, str], other: dict[str, Any]) -> str:
    """The report."""
    own = {row: rows[row] for row in ROWS}
    parts = [
        f"# Norms on {result['setting']}",
        f"`{result['command']}`",
        about(result),
        verdict(own),
        figures[""],
        *section("Modes of the norms", "modes", modes_table(own)),
        *section("Seams", "seams", seams_table(own)),
        *section("Whole images", "whole", whole_table(own)),
        *section("Size of the tiles", "tiles", tiles_table(own), figures["tiles"]),
        *section("Size of the batch that normalizes", "batches", batches_table(rows), figures["batches"]),
        *section(f"Images of {result['other']}", "transfer", transfer_table(own, other), figures["transfer"]),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def section(title: str, kind: str, cells: list[list[str]], figure: str = "") -> list[str]:
    """A table under its title; nothing where nothing was measured."""
    return [f"## {title}", NOTES[kind], table(cells), figure] if len(cells) > 1 else []


def about(result: dict[str, Any]) -> str:
    """What was trained, on what."""
    told = result["machine"] | result["versions"]
    network = f"- network: {result['network']}"
    if result["ghost_network"]:
        network += f"; for the size of the batch that normalizes: {result['ghost_network']}"
    length = f"- training: `nnUNetv2_train`, {result['epochs']} epochs of {result['iterations']} iterations; seeds "
    lines = [f"- {key}: {json.dumps(value)}" for key, value in told.items()]
    cases = ", ".join(f"{number} cases {role}" for role, number in result["cases"].items())
    lines += [
        f"- dataset: {result['dataset']}, {result['configuration']}; {cases}. {result['images']}".strip(),
        network,
    ]
    lines += [
        length + ", ".join(map(str, result["seeds"])) + "; in brackets: from the least to the most over the seeds"
    ]
    return "\n".join([*lines, *([f"- {result['note']}"] if result["note"] else [])])


def differences(rows: dict[str, Any], row: str, *keys: str) -> list[float]:
    """Mean Dice of whole images of a row less that of InstanceNorm, seed by seed; ``keys``: which Dice of the latter."""
    found = []
    for seed, run in rows[row].items():
        pair = run.get("tables"), rows[REFERENCE].get(seed, {}).get("tables")
        if None in pair:
            continue
        values = average(pair[0]["whole"]["dice"]), average(_inside(pair[1], keys or ("whole", "dice")))
        if None not in values:
            found.append(values[0] - values[1])
    return found


def _inside(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found[key]
    return found or []


def verdict(rows: dict[str, Any]) -> str:
    """BatchRenorm against InstanceNorm, and BatchNorm's two modes, in words."""
    lines = []
    found = differences(rows, "BatchRenorm")
    if found:
        blended = differences(rows, "BatchRenorm", "blending")
        lines.append(
            f"BatchRenorm less InstanceNorm, mean Dice of whole images, paired by seed: {shown(found, '+.3f')} against "
            f"InstanceNorm with the statistics of the whole image, {shown(blended, '+.3f')} against nnU-Net's blended tiles."
        )
    for row in ("BatchNorm", "BatchRenorm", "PreciseBN", "FrozenBN"):
        values = means(of_runs(rows[row], "tables", "modes", "disparity", "train"))
        if average(values) is not None:
            size = of_runs(rows[row], "tables", "modes", "batch_size")[0]
            large = "above" if average(values) > LARGE_DISPARITY else "below"
            lines.append(f"Disparity of {row} at batch {size}: {shown(values)}, {large} {LARGE_DISPARITY}.")
    return " ".join(lines)


def modes_table(rows: dict[str, Any]) -> list[list[str]]:
    """Dice in eval and train mode, and disparity."""
    classes = classes_of(rows)
    head = ["norm", "eval", "train", "disparity", "against the batch alone", "clipped"]
    cells = [head + [f"{name}: {what}" for name in classes for what in ("eval", "train", "disparity")]]
    for row, runs in rows.items():
        if not any(of_runs(runs, "tables", "modes")):
            cells.append([row, *["-"] * (len(cells[0]) - 1)])
            continue
        kinds = [("dice", "eval"), ("dice", "train"), ("disparity", "train")]
        found = [of_runs(runs, "tables", "modes", *kind) for kind in kinds]
        batch = means(of_runs(runs, "tables", "modes", "disparity", "batch"))
        clipped = of_runs(runs, "tables", "reported", "clipped")
        whole = [shown(means(each)) for each in found] + [shown(batch), shown(clipped, ".1%")]
        cells.append([row, *whole, *[shown(per_class(each, i)) for i in range(len(classes)) for each in found]])
    return cells if classes else []


def seams_table(rows: dict[str, Any]) -> list[list[str]]:
    """Tile mismatch and max dist."""
    classes = classes_of(rows)
    cells = [["norm", *classes, "max dist", "tile", "halo", "max dist as predicted by default"]]
    for row, runs in rows.items():
        found = [each for each in of_runs(runs, "tables", "mismatch") if each]
        if not found:
            cells.append([row, *["-"] * (len(cells[0]) - 1)])
            continue
        values = [each["per_class"] for each in found]
        sizes = [" x ".join(map(str, found[0]["tile"])), " x ".join(str(max(pair)) for pair in found[0]["halo"])]
        own = worst([each["verdict"] for each in found])
        default = worst(of_runs(runs, "tables", "reported", "tile_mismatch"))
        cells.append([row, *[shown(per_class(values, i)) for i in range(len(classes))], own, *sizes, default])
    return cells if classes else []


def worst(verdicts: Iterable[str | None]) -> str:
    """Of all seeds: "no" if it is for every one, else how far the largest differences reach."""
    there = [verdict for verdict in verdicts if verdict]
    numbers = [float(verdict) for verdict in there if not verdict.startswith("no")]
    if not there:
        return "-"
    if numbers:
        return shown(numbers, ".2f")
    return next((word for word in ("not measured", "no") if word in there), "no (rounding)")


def whole_table(rows: dict[str, Any]) -> list[list[str]]:
    """Dice of whole images."""
    classes = classes_of(rows)
    cells = [
        ["norm", "mean", *classes, "less InstanceNorm", "blending: mean", *[f"blending: {name}" for name in classes]]
    ]
    for row, runs in rows.items():
        found, blended = of_runs(runs, "tables", "whole", "dice"), of_runs(runs, "tables", "blending")
        less = shown(differences(rows, row), "+.3f") if row != REFERENCE else ""
        own = [shown(means(found)), *[shown(per_class(found, i)) for i in range(len(classes))]]
        cells.append(
            [row, *own, less, shown(means(blended)), *[shown(per_class(blended, i)) for i in range(len(classes))]]
        )
    return cells if classes else []


def tiles_table(rows: dict[str, Any]) -> list[list[str]]:
    """Dice against the size of the tiles."""
    sizes = next((found for runs in rows.values() for found in of_runs(runs, "tiles", "sizes") if found), [])
    cells = [["norm", *[" x ".join(map(str, each["size"])) for each in sizes], "whole image"]]
    for row, runs in rows.items():
        found = [each for each in of_runs(runs, "tiles", "sizes") if each]
        if found:
            values = [shown(means([run[number]["dice"] for run in found])) for number in range(len(sizes))]
            cells.append([row, *values, shown(means(of_runs(runs, "tables", "whole", "dice")))])
    return cells


def batches_table(rows: dict[str, Any]) -> list[list[str]]:
    """Dice and disparity against the batch that normalizes: trained so, and evaluated so."""
    cells = [["norm", "batch that normalizes", "eval", "train", "disparity", "against the batch alone"]]
    for size in NORMALIZATION_BATCHES:
        found = of_runs(rows[str(size)], "ghost", "modes")
        if any(found):
            cells.append([f"trained: GhostBN by {size}", str(size), *modes_cells([each for each in found if each])])
    for row in ROWS:
        for number, size in enumerate(NORMALIZATION_BATCHES):
            found = [each[number] for each in of_runs(rows[row], "batches", "sizes") if each and number < len(each)]
            if found:
                cells.append([row, str(size), *modes_cells(found)])
    return cells


def modes_cells(found: list[dict[str, Any]]) -> list[str]:
    """Mean Dice in eval and train mode, and both disparities."""
    kinds = [("dice", "eval"), ("dice", "train"), ("disparity", "train"), ("disparity", "batch")]
    return [shown(means([each[kind].get(mode) for each in found])) for kind, mode in kinds]


def transfer_table(rows: dict[str, Any], other: dict[str, Any]) -> list[list[str]]:
    """Membranes of the other dataset."""
    head = [
        "norm",
        "own images",
        "other images, as trained",
        "with the others' statistics",
        "blended tiles",
        "max dist",
    ]
    cells = [[*head, "trained there"]]
    for row, runs in rows.items():
        if any(of_runs(runs, "transfer")):
            own = per_class(of_runs(runs, "tables", "whole", "dice"), 0)
            found = [of_runs(runs, "transfer", key) for key in ("as_trained", "adapted", "blending")]
            dist = worst(of_runs(runs, "transfer", "mismatch"))
            there = shown(per_class(of_runs(other.get(row, {}), "tables", "whole", "dice"), 0))
            cells.append([row, shown(own), *map(shown, found), dist, there])
    return cells
