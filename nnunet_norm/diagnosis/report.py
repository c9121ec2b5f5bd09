"""The report as one HTML file that needs nothing else: tables, figures within, captions that stand alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nnunet_norm.diagnosis.fields import reach, tile_norms
from nnunet_norm.diagnosis.figures import draw_tile_sizes
from nnunet_norm.diagnosis.findings import NO_PROBLEM, PROBLEM, share
from nnunet_norm.pages import as_png, html_figure, html_page, html_table
from nnunet_norm.writing import written_beside


def write_html(path: str | Path, found: Mapping[str, Any], figures: Mapping[str, bytes]) -> None:
    """Write the report.

    Args:
        path: of the file.
        found: as it stands in ``diagnosis.json``.
        figures: PNG files: "receptive_field", and one called "case_" and the name of each case.

    Raises:
        OutputError: it cannot be written.
    """
    with written_beside(path) as beside:
        beside.write_text(html_of(found, figures), encoding="utf-8")


def html_of(found: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """The report; see ``write_html``."""
    model, verdict = found["model"], found["verdict"]
    colour = {PROBLEM: "problem", NO_PROBLEM: "fine"}.get(verdict["kind"], "unknown")
    title = f"Normalization of {model['trainer']} ({model['plans']}, fold {model['fold']}) on {model['dataset']}"
    parts = [
        f'<p class="verdict {colour}">{escape(verdict["sentence"])}</p>',
        *_overview(found),
        *_classes(found),
        *_tile_sizes(found),
        *_changes(found, figures),
        *_receptive_field(found, figures),
        *_cases(found),
    ]
    return html_page(title, parts)


def _overview(found: Mapping[str, Any]) -> list[str]:
    model, seconds = found["model"], found["seconds"]
    norms = ", ".join(f"{count} x {name}" for name, count in model["norms"].items()) or "none"
    disparity, tiles, stages = found["train_eval_disparity"], found["tile_mismatch"], found["stages_mismatch"]
    plain = disparity["mean_of_batch_statistics"]
    beyond = ", with a halo smaller than the theoretical receptive field" if _halo_is_short(found) else ""
    rows = [
        ("network", f"{model['network']}, patch {_by(model['patch_size'])}, batch size {model['batch_size']}"),
        ("normalization layers", norms),
        ("normalizes with statistics of the tile", tile_norms(found["receptive_field"])),
        ("train/eval disparity, mean", _number(disparity["mean"])),
        *([("disparity against plain batch statistics, mean", _number(plain))] if plain is not None else []),
        ("max dist of tiles", _verdict(tiles) + beyond),
        ("max dist stage by stage", _verdict(stages)),
        ("labels that differ between nnU-Net's tiles and the whole image", _share(found["labels_changed"])),
        ("seconds for an image, nnU-Net's predictor", _seconds(seconds["nnunet"])),
        ("seconds for an image, whole image", _seconds(seconds["whole"])),
    ]
    caption = (
        f"Means over {_images(found)} ({found['source']}), nothing mirrored, one fold. Disparity: 1 - Dice of the same "
        f"patches with the norms in train and in eval mode ({_count(disparity['num_batches'], 'batch', 'batches')}); above "
        "0.1 the stored statistics are not those of the training. "
        + ("Against plain batch statistics: the same for BatchNorm's train mode. " if plain is not None else "")
        + f"Max dist: the largest difference of any output (logit) where two tiles of {_by(tiles['size'])} voxels, or two "
        f'grids of blocks, predict the same voxels ({tiles["num_pairs"]} and {stages["num_pairs"]} pairs); "no" is what a '
        "seamless prediction has. Seconds: the network alone, each way once, one after the other on the same machine."
    )
    return ["<h2>What was found</h2>", html_table(caption, ("", "value"), rows, words=True)]


def _classes(found: Mapping[str, Any]) -> list[str]:
    patch = _row_of_patch(found)
    whole = found["dice_against_tile_size"][-1]
    whole_dice = whole["dice"] if whole["tile_size"] is None else None
    rows = [
        (
            name,
            _number(found["train_eval_disparity"]["per_class"][name]),
            _number(found["tile_mismatch"]["per_class"][name]),
            _number(found["stages_mismatch"]["per_class"][name]),
            *(
                [_number((patch["dice"] or {}).get(name)), _number((whole_dice or {}).get(name))]
                if found["labels"]
                else []
            ),
            _number((patch["agreement"] or {}).get(name)),
        )
        for name in found["model"]["classes"]
    ]
    header = ["class", "disparity", "tile mismatch", "mismatch stage by stage"]
    header += ["Dice, nnU-Net", "Dice, whole image"] if found["labels"] else []
    caption = (
        "Per class. Disparity: see above. Mismatch: the median of 1 - Dice over pairs of tiles (or blocks) that predict the "
        "same voxels. nnU-Net: half-overlapping tiles of the plans' patch, blended with a Gaussian. Whole image: statistics "
        "and context of the whole image, in one piece. Agreement: Dice between these two. "
    )
    caption += (
        "Dice is that with the labels, at the spacing of the plans."
        if found["labels"]
        else "There were no labels for Dice."
    )
    return ["<h2>Classes</h2>", html_table(caption, (*header, "agreement"), rows)]


def _tile_sizes(found: Mapping[str, Any]) -> list[str]:
    rows, classes = found["dice_against_tile_size"], found["model"]["classes"]
    if not any(row["dice"] or row["agreement"] for row in rows):
        return []
    caption = (
        "Dice against the size of the tiles: nnU-Net's predictor (half-overlapping tiles, Gaussian blending) with other "
        f"tiles than the plans' {_by(found['model']['patch_size'])}, and last the whole image in one piece. Mean over "
        f"{_images(found)}. "
        + ("Left with the labels, right" if found["labels"] else "There were no labels; this is Dice")
        + " with the prediction of the whole image. If the curve still rises beyond the patch, the network gains from "
        "context or from statistics of more than a tile."
    )
    table = [
        (
            "whole image" if row["tile_size"] is None else _by(row["tile_size"]),
            *([_number(_mean(row["dice"]))] if found["labels"] else []),
            _number(_mean(row["agreement"])),
            _share(row["labels_changed"]) if row["tile_size"] is not None else "-",
            _seconds(row["seconds"]),
        )
        for row in rows
    ]
    dice = ("mean Dice",) if found["labels"] else ()
    header = ("tile", *dice, "agreement with whole image", "labels that differ from it", "seconds")
    picture = as_png(draw_tile_sizes(rows, classes, found["model"]["patch_size"]))
    text = "The same as numbers, means over classes and images."
    return ["<h2>Dice against tile size</h2>", html_figure(picture, caption), html_table(text, header, table)]


def _changes(found: Mapping[str, Any], figures: Mapping[str, bytes]) -> list[str]:
    parts = []
    for case in found["cases"]:
        picture = figures.get(f"case_{case['case']}")
        if picture is None:
            continue
        caption = (
            f"{case['case']}: the slice across the first axis in which most labels differ between nnU-Net's prediction in "
            f"tiles of {_by(found['model']['patch_size'])} and that of the whole image ({_share(case['labels_changed'])} of "
            "the labels of the image differ). Differences along straight lines are seams of tiles."
        )
        parts.append(html_figure(picture, caption))
    return ["<h2>Where labels differ</h2>", *parts] if parts else []


def _receptive_field(found: Mapping[str, Any], figures: Mapping[str, bytes]) -> list[str]:
    field = found["receptive_field"]
    axes, theoretical = field["axes"], field["theoretical"]
    rows: list[tuple[str, ...]] = []
    if theoretical is None:
        rows.append(("theoretical", f"not known: {field['why_no_theoretical']}"))
    else:
        rows.append(("total stride", ", ".join(f"{a} {s}" for a, s in zip(axes, field["total_stride"], strict=True))))
        if theoretical["unbounded"]:
            rows.append(("theoretical", f"unbounded, because of {theoretical['unbounded']}"))
        else:
            rows.append(("theoretical, of any voxel", reach(axes, theoretical["any_voxel"])))
            rows.append(("theoretical, of blocks on the stride's grid", reach(axes, theoretical["aligned"])))
    if field["effective"] is None:
        rows.append(("effective", f"not measured: {field['why_no_effective']}"))
    else:
        rows.append(("effective (3 sigma)", reach(axes, field["effective"])))
    halo = found["tile_mismatch"]["halo"]
    if halo is not None:
        rows.append(("halo with which tiles were compared", reach(axes, halo)))
    caption = (
        "Receptive field per axis: how many input voxels an output voxel depends on to either side. Tiles are predicted "
        "without seams only if a halo of the theoretical one is cut away, and if no norm uses the statistics of the tile."
    )
    parts = ["<h2>Receptive field</h2>", html_table(caption, ("", "value"), rows, words=True)]
    if "receptive_field" in figures:
        parts.append(html_figure(figures["receptive_field"], field["caption"]))
    return parts


def _cases(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            case["case"],
            _by(case["shape"]),
            "-" if list(case["shape"]) == list(case["whole_shape"]) else f"the middle of {_by(case['whole_shape'])}",
            _seconds(case["seconds_nnunet"]),
            _seconds(case["seconds_whole"]),
            case["whole"] or f"not predicted: {case['why_not_whole']}",
        )
        for case in found["cases"]
    ]
    caption = (
        f"The images ({found['source']}), preprocessed as nnU-Net does; all numbers of this report are of these voxels. An "
        f"image of more than {found['max_voxels']} voxels is cut to its middle (--max-voxels)."
    )
    header = ("case", "voxels", "cut", "seconds, nnU-Net", "seconds, whole", "the whole image")
    return ["<h2>Images</h2>", html_table(caption, header, rows, words=True)]


def _row_of_patch(found: Mapping[str, Any]) -> Mapping[str, Any]:
    patch = list(found["model"]["patch_size"])
    row: Mapping[str, Any] = next(r for r in found["dice_against_tile_size"] if r["tile_size"] == patch)
    return row


def _halo_is_short(found: Mapping[str, Any]) -> bool:
    """Whether tiles differ for another reason than their norm."""
    tiles, layers = found["tile_mismatch"], found["receptive_field"]["tile_statistics"]["layers"]
    return bool(tiles["max_dist"]) and not tiles["exact"] and not layers


def _verdict(mismatch: Mapping[str, Any]) -> str:
    why = f" ({mismatch['why_none']})" if not mismatch["num_pairs"] and mismatch["why_none"] else ""
    return f"{mismatch['verdict']}{why}"


def _images(found: Mapping[str, Any]) -> str:
    return _count(len(found["cases"]), "image", "images")


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _by(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "not measured" if value is None else share(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Mapping[str, float | None] | None) -> float | None:
    present = [value for value in (values or {}).values() if value is not None]
    return sum(present) / len(present) if present else None
