"""Tables of ``experimental_batches.py``."""

import itertools
import json
from statistics import mean
from typing import Any

from reporting import table

WHAT = {
    "em": "Electron microscopy of the nerve cord of Drosophila: VNC (groundtruth-drosophila-vnc) and ISBI 2012, membrane "
    "against everything else",
    "hippocampus": "Hippocampus MRI (Medical Segmentation Decathlon, Task04), grouped by the 99th percentile of the "
    "intensities, slice by slice",
}

NOTES = """\
- Mixed training: nnUNetTrainerBatchNorm; batch-wise: nnUNetTrainerBEN, each mini-batch from one group. Stored statistics:
  those of the training, the same for all groups; batch-wise: estimated on the held-out images of the group that is predicted
  (`nnunet-norm predict --population batch --batches FILE`).
- Dice: of all held-out voxels of a group together, mean over the classes; in the last column mean over the groups, too. Mean,
  and the range over seeds in brackets where there are several.
- Groups: over all voxels of the preprocessed images, as the network gets them; the spread of image means is their standard
  deviation over the images of the group.
"""


def shown(values: list[float]) -> str:
    """Mean, and the range in brackets."""
    middle = f"{mean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3f} to {max(values):.3f})"


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    parts = ["# Batch-wise training and batch-wise inference (batch effects normalization)"]
    for which, found in result["experiments"].items():
        settings = found["settings"]
        parts += [
            f"## {which}",
            f"`{found['command']}`",
            f"{WHAT[which]}. {settings['stages']} stages, {settings['features']} features at the first, patch "
            f"{' x '.join(map(str, found['patch']))}, batch {settings['batch']}, {settings['epochs']} epochs of "
            f"{settings['iterations']} iterations, seed(s) {', '.join(map(str, settings['seeds']))}. {settings['note']}",
            f"The groups after preprocessing ({', '.join(found['schemes'])}): {_differ(found['groups'])}.",
            table(_groups(found)),
            "Dice on held-out images:",
            table(_arms(found)),
            _told(found),
        ]
    parts.append(NOTES)
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _differ(groups: dict[str, dict[str, float]]) -> str:
    """How far apart the groups are, at most."""
    pairs = list(itertools.combinations(groups.values(), 2))
    shift = max(abs(a["mean"] - b["mean"]) / min(a["std"], b["std"]) for a, b in pairs)
    ratio = max(max(a["std"], b["std"]) / min(a["std"], b["std"]) for a, b in pairs)
    return (
        f"means differ by up to {shift:.2g} standard deviations, standard deviations by a factor of up to {ratio:.3g}"
    )


def _groups(found: dict[str, Any]) -> list[list[str]]:
    rows = [["group", "cases", "held out", "mean", "std", "spread of image means", "1st percentile", "median", "99th"]]
    for group, numbers in found["groups"].items():
        keys = ("mean", "std", "of_means", "percentile_1", "median", "percentile_99")
        cells = [f"{numbers[key]:.4g}" for key in keys]
        rows.append([group, str(numbers["cases"]), str(found["held_out"][group]), *cells])
    return rows


def _arms(found: dict[str, Any]) -> list[list[str]]:
    groups = list(found["groups"])
    rows = [["training", "inference", *groups, "mean over groups"]]
    for arm in found["arms"]:
        per_group = [[mean(seed[group]) for seed in arm["dice"]] for group in groups]
        over_all = [mean(values) for values in zip(*per_group, strict=True)]
        rows.append([arm["training"], arm["inference"], *[shown(values) for values in per_group], shown(over_all)])
    return rows


def _told(found: dict[str, Any]) -> str:
    told = found["machine"] | found["versions"]
    return "\n".join(f"- {key}: {json.dumps(value)}" for key, value in told.items())
