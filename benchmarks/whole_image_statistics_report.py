"""Table and pictures of ``whole_image_statistics.py``."""

import textwrap

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_norm.demo.figure import worst_place
from nnunet_norm.writing import written_beside

COLOURS = ("black", "#4aa8ff", "#ff9f1c", "#7ed957", "#e0457b")

PICTURES = {
    "vnc": {
        "size": (320, 320),
        "unit": "pixels (4.6 nm)",
        "what": "Electron microscopy of the ventral nerve cord of Drosophila, a section that was not trained on",
        "source": "Images and labels: groundtruth-drosophila-vnc, CC BY-NC-SA 3.0.",
    },
    "hippocampus": {
        "size": (100, 100),
        "unit": "voxels (1 mm)",
        "what": "T1 MRI of the hippocampus, held-out cases side by side in one larger volume",
        "source": "Images and labels: Medical Segmentation Decathlon, Task04, CC BY-SA 4.0.",
    },
}
"""Extent of the crop (y, x), the axes' unit, and the words of the caption."""

EXPLANATION = """\
Dice is that of all test images together. Tile mismatch (median of 1 - Dice over boxes of half a patch), max dist (largest
difference of any logit) and labels changed compare two predictions of the same voxels: with the tiles a quarter of a patch
further on, or, for whole-image statistics, with other blocks. The row *image cut elsewhere* compares whole-image statistics
of two windows of the image, shifted by a quarter of a patch: that is a change of the image, not of the tiles. *One pass* is
the network applied once to the whole image. Seconds: mean per image, mirrored passes included.
"""


def write_table(result, path):
    """The table of all experiments as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = ["# Gaussian blending and whole-image statistics on trained InstanceNorm models", "", EXPLANATION]
    for name, experiment in result["experiments"].items():
        sizes = sorted({" x ".join(map(str, shape)) for shape in experiment["images"].values()})
        patch = " x ".join(map(str, experiment["patch"]))
        lines += [
            f"## {name}",
            "",
            f"{len(experiment['images'])} image(s) of {', '.join(sizes)} (z, y, x), patch {patch}, ",
        ]
        lines[-1] += f"features {experiment['features']}, batch {experiment['batch']}; {experiment['training']}.\n"
        classes = " / ".join(experiment["classes"])
        header = [
            f"Dice {classes}",
            f"tile mismatch {classes}",
            "max dist",
            "labels changed",
            "labels that differ from one pass",
        ]
        header += ["largest difference from one pass", "seconds"]
        lines += ["| prediction | " + " | ".join(header) + " |", "| --- " * (len(header) + 1) + "|"]
        for way, row in experiment["rows"].items():
            one_pass = [
                f"{row['labels_off_one_pass']:.2%}",
                f"{row['max_from_one_pass']:.2g}",
                f"{np.mean(row['seconds']):.1f}",
            ]
            lines.append(
                _line(
                    [
                        way,
                        _numbers(row["dice"], 3),
                        *_comparison(row.get("moved"), "-" if way == "one pass" else "not measured"),
                        *one_pass,
                    ]
                )
            )
            if "cut" in row:
                lines.append(_line([f"{way}, image cut elsewhere", "", *_comparison(row["cut"], ""), "", "", ""]))
        lines.append("")
    lines += [
        f"Machine: {result['machine']}. {versions}. {result['note']}".rstrip(),
        "",
        f"Seed: {result['seed']}.",
        "",
        f"    {result['command']}",
    ]
    with written_beside(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _numbers(values, digits):
    return " / ".join("0" if v == 0 else "-" if v is None else f"{v:.{digits}f}" for v in values)


def _comparison(found, otherwise):
    if found is None:
        return [otherwise] * 3
    changed = "none" if found["changed"] == 0 else f"{found['changed']:.2%}"
    return [_numbers(found["mismatch"], 4), found["verdict"], changed]


def draw(experiment, images, gaussian, whole, labels, rows, out):
    """The picture of one experiment: crops of the image, of both predictions, and of what moving the tiles changes."""
    about = PICTURES[experiment]
    name, z, crop = _crop(gaussian, about["size"])
    image, reference = next((image[0].numpy(), reference) for n, image, reference in images if n == name)
    y, x = crop
    extent = (x.start - 0.5, x.stop - 0.5, y.stop - 0.5, y.start - 0.5)
    figure = Figure(figsize=(11, 9), dpi=110)
    places = {"left": 0.07, "right": 0.9, "top": 0.96, "bottom": 0.255, "wspace": 0.12, "hspace": 0.16}
    axes = figure.subplots(2, 3, sharex=True, sharey=True, gridspec_kw=places)
    classes = {"cmap": ListedColormap(COLOURS[: len(labels)]), "vmin": -0.5, "vmax": len(labels) - 0.5}
    change = {"cmap": "inferno", "vmin": 0, "vmax": float(gaussian[name]["difference"][z][crop].max())}
    panels = [
        ("image", image, {"cmap": "gray"}),
        ("Gaussian blending: labels", gaussian[name]["labels"], classes),
        ("whole-image statistics: labels", whole[name]["labels"], classes),
        ("ground truth", reference, classes),
        ("Gaussian blending: tiles moved, change", gaussian[name]["difference"], change),
        ("whole-image statistics: blocks moved, change", whole[name]["difference"], change),
    ]
    for axis, (title, values, options) in zip(axes.flat, panels, strict=True):
        shown = axis.imshow(values[z][crop], extent=extent, interpolation="nearest", **options)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        if options is change:
            largest = float(values[z][crop].max())
            words = "0 everywhere" if largest == 0 else f"up to {largest:.2g}"
            axis.text(0.03, 0.03, words, transform=axis.transAxes, color="white", fontsize=11, fontweight="bold")
    for axis in axes[-1]:
        axis.set_xlabel(f"x in {about['unit']}")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"y in {about['unit']}")
    bar = figure.add_axes((0.915, 0.255, 0.012, 0.32))
    figure.colorbar(shown, cax=bar).set_label("largest change of a class probability", fontsize=8)
    patches = [Patch(facecolor=colour, label=label) for colour, label in zip(COLOURS, labels, strict=False)]
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.485, 0.2), ncols=len(patches), fontsize=9)
    figure.text(0.07, 0.015, textwrap.fill(_caption(about, crop, rows, labels), 140), fontsize=9, va="bottom")
    with written_beside(out / f"whole_image_statistics_{experiment}.png") as beside:
        figure.savefig(beside, format="png")


def _crop(shown, size):
    """Image, slice and box in which the prediction changes most."""
    best = None
    for name, found in shown.items():
        z_common, *plane = found["common"]
        for z in range(z_common.start, z_common.stop):
            values = np.nan_to_num(found["difference"][z])
            box = worst_place(values, tuple(plane), size)
            if best is None or values[box].sum() > best[0]:
                best = (values[box].sum(), name, z, box)
    return best[1:]


def _caption(about, crop, rows, labels):
    def words(way):
        row = rows[way]
        dice = ", ".join(f"{d:.3f}" for d in row["dice"])
        return f"Dice {dice}; {row['moved']['changed']:.2%} of the labels change; max dist: {row['moved']['verdict']}"

    names = ", ".join(label for label in labels if labels[label])
    size = " x ".join(str(side.stop - side.start) for side in crop)
    return (
        f"{about['what']}, predicted by a briefly trained stock nnU-Net network with InstanceNorm. Middle column: "
        "by nnU-Net's predictor "
        "(overlapping tiles, Gaussian blending, step 0.5). Right column: stage by stage, statistics of the whole image. "
        "Lower row: the largest change of any class's probability if the tiles (middle) or the blocks (right) are laid "
        f"elsewhere, on one scale. Shown is the crop of {size} in which Gaussian blending changes most. Over all test images "
        f"({names}): Gaussian blending, {words('Gaussian blending')}; whole-image statistics, "
        f"{words('whole-image statistics')}. {about['source']}"
    )
