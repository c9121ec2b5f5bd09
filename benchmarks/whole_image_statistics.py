"""Trained stock InstanceNorm models: Gaussian blending against the statistics of the whole image.

    python benchmarks/whole_image_statistics.py --data IMAGES --work FOLDER [--only vnc ...] [--train-only]

IMAGES holds ``vnc_sstem`` and ``hippocampus_msd04``. nnU-Net's own programs preprocess them and train one model on each
with nnU-Net's own trainer, on one core; only the plans are smaller. Images that were not seen are then predicted, mirrored
as nnU-Net does by default: by nnU-Net's predictor (Gaussian blending, step 0.5), in halo-cut tiles with each tile's own
statistics, and stage by stage with the statistics of the whole image. One pass of the network over the whole image is the
reference.

How far a prediction depends on where the tiles lie is measured as in ``nnunet_norm.demo.tilings``: two windows of the image,
shifted by a quarter of a patch, are predicted independently and compared where both see the image, a quarter of a patch away
from the cuts. Statistics of the whole image belong to the image, so there the same image is predicted in small blocks, twice,
with the grid of blocks moved by half a block; what becomes of them when the image itself is cut elsewhere, in the same two
windows, is reported beside it.

Everything in FOLDER is kept: started again, the benchmark goes on where it was.
"""

import argparse
import itertools
import json
import math
import os
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from whole_image_statistics_data import (
    DATASETS,
    EPOCHS,
    EXPERIMENTS,
    ITERATIONS,
    TRAINER,
    cases_of,
    read_labels,
    test_images,
    train,
)
from whole_image_statistics_report import PICTURES, draw, write_table

from nnunet_norm.demo.tilings import preprocess
from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.metrics import tile_mismatch
from nnunet_norm.metrics.dice import class_masks, dice_counts
from nnunet_norm.tiling import padded_shape
from nnunet_norm.writing import write_json, written_beside

GAUSSIAN, TILES, STAGES, ONE_PASS = "Gaussian blending", "halo-cut tiles", "whole-image statistics", "one pass"
WHOLE, WINDOWS, BLOCKS = "whole", ("first_window", "second_window"), ("first_blocks", "second_blocks")


def geometry(model, shape):
    """For images of ``shape``: total stride, patch, and shift of the tiles, a quarter of a patch; all (z, y, x)."""
    plans = json.loads((model / "plans.json").read_text())["configurations"][model.name.split("__")[-1]]
    stride = [int(s) for s in np.prod(plans["architecture"]["arch_kwargs"]["strides"], axis=0)]
    slices = 3 - len(stride)  # a 2d network takes slice by slice
    stride, patch = (1,) * slices + tuple(stride), (1,) * slices + tuple(plans["patch_size"])
    shift = [max(1, round(p / 4 / s)) * s if n > p else 0 for n, p, s in zip(shape, patch, stride, strict=True)]
    return stride, patch, shift


def predictor_for(way, model, shape):
    """The predictor, with the weights of fold 0, for images of ``shape`` (z, y, x)."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_norm.prediction import HaloPredictor

    options = {"device": torch.device("cpu"), "perform_everything_on_device": False, "allow_tqdm": False}
    if way == GAUSSIAN:
        predictor = nnUNetPredictor(**options)
    elif way == STAGES:
        predictor = HaloPredictor(**options, execution="stages", population="image")
    elif way == TILES:
        predictor = HaloPredictor(**options, execution="tiles", population="tile")
    else:  # a single tile that holds the image: the network applied once
        axes = 2 if model.name.endswith("2d") else 3
        tile = padded_shape(shape[-axes:], geometry(model, shape)[0][-axes:])
        predictor = HaloPredictor(**options, execution="tiles", population="tile", tile_size=tile, halo=0)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    return predictor


def in_other_blocks(predictor, layout, image):
    """Logits of ``image`` stage by stage, in the blocks of one of ``BLOCKS``; mirrored like all else."""
    from nnunet_norm.prediction.stages_plan import with_blocks_elsewhere

    predictor.network.eval()
    plan = predictor.plan(image)
    first, second = (replace(other, mirror_axes=plan.mirror_axes) for other in with_blocks_elsewhere(plan))
    return predictor.predict_with(first if layout == BLOCKS[0] else second, image)


def predict(way, layout, model, image, file):
    """Logits (K, z, y, x) of a part of ``image`` (1, z, y, x), NaN elsewhere; (logits, seconds), kept in ``file``."""
    if file.exists():
        with np.load(file) as kept:
            return torch.from_numpy(kept["logits"]), float(kept["seconds"])
    shape = image.shape[1:]
    predictor = predictor_for(way, model, shape)
    box = [slice(0, n) for n in shape]
    if layout in WINDOWS:
        first = layout == WINDOWS[0]
        box = [slice(0, n - s) if first else slice(s, n) for n, s in zip(shape, geometry(model, shape)[2], strict=True)]
    part = image[(slice(None), *box)].contiguous()
    start = time.perf_counter()
    if layout in BLOCKS:
        logits = in_other_blocks(predictor, layout, part)
    else:
        logits = predictor.predict_sliding_window_return_logits(part)
    seconds = time.perf_counter() - start
    whole = torch.full((len(logits), *shape), torch.nan)
    whole[(slice(None), *box)] = logits.float().cpu()
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(file) as beside, beside.open("wb") as sink:
        np.savez(sink, logits=whole.numpy(), seconds=seconds)
    print(f"{file.stem}: {seconds:.1f} s", flush=True)
    return whole, seconds


def boxes(shape, model):
    """Where both windows see an image of ``shape`` (z, y, x), and that part cut into boxes of half a patch."""
    _, patch, shift = geometry(model, shape)
    margin = [p // 4 if s else 0 for s, p in zip(shift, patch, strict=True)]
    common = tuple(slice(s + m, n - s - m) for n, s, m in zip(shape, shift, margin, strict=True))
    size = [max(1, p // 2) for p in patch]
    sides = [
        [slice(a, min(a + n, side.stop)) for a in range(side.start, side.stop, n)]
        for side, n in zip(common, size, strict=True)
    ]
    return common, list(itertools.product(*sides))


def accuracy(predictions, one_pass, references):
    """Dice with the references, and the difference from one pass; over all images together."""
    counts, differ, largest = 0, 0, 0.0
    for logits, expected, reference in zip(predictions, one_pass, references, strict=True):
        masks = torch.stack([torch.from_numpy(reference == i) for i in range(1, len(logits))])[None]
        counts = counts + dice_counts(class_masks(logits[None]), masks)
        largest = max(largest, (logits - expected).abs().max().item())
        differ += (logits.argmax(0) != expected.argmax(0)).sum().item()
    twice, both = counts
    share = differ / sum(reference.size for reference in references)
    return {"dice": (twice / both).tolist(), "labels_off_one_pass": share, "max_from_one_pass": largest}


def compare(twice, model):
    """Tile mismatch of two predictions of every image, and per image the change of the probabilities."""
    pairs, changed, maps = [], [], []
    for first, second in twice:
        common, parts = boxes(first.shape[1:], model)
        pairs += [(first[(slice(None), *part)], second[(slice(None), *part)]) for part in parts]
        a, b = (logits[(slice(None), *common)].argmax(0) for logits in (first, second))
        changed.append((a != b).float().mean().item())
        maps.append({"common": common, "difference": (first.softmax(0) - second.softmax(0)).abs().amax(0).numpy()})
    found = tile_mismatch(pairs)
    mismatch = [None if math.isnan(value) else value for value in found.per_class]
    row = {"mismatch": mismatch, "max_dist": found.max_dist, "verdict": found.verdict}
    return row | {"changed": float(np.mean(changed)), "boxes": found.num_pairs}, maps


def measure(experiment, way, model, images, work):
    """All numbers of one way to predict the images of an experiment, and per image what the picture needs."""

    def predicted(layout, by=way):
        files = [
            work / "predictions" / experiment / f"{name}_{by}_{layout}.npz".replace(" ", "_") for name, _, _ in images
        ]
        return [predict(by, layout, model, image, f) for (_, image, _), f in zip(images, files, strict=True)]

    whole, seconds = zip(*predicted(WHOLE), strict=True)
    one_pass = [logits for logits, _ in predicted(WHOLE, ONE_PASS)]
    row = accuracy(whole, one_pass, [reference for _, _, reference in images]) | {"seconds": seconds}
    shown = {name: {"labels": logits.argmax(0).numpy()} for (name, _, _), logits in zip(images, whole, strict=True)}
    comparisons = {"moved": BLOCKS, "cut": WINDOWS} if way == STAGES else {"moved": WINDOWS}
    for key, layouts in comparisons.items() if way != ONE_PASS else ():
        twice = [[logits for logits, _ in predicted(layout)] for layout in layouts]
        row[key], maps = compare(zip(*twice, strict=True), model)
        for found, changes in zip(shown.values(), maps if key == "moved" else (), strict=key == "moved"):
            found |= changes
    return row, shown


def evaluate(experiment, model, cases, args):
    """The experiment's part of the result, and its picture."""
    dataset = DATASETS[EXPERIMENTS[experiment]]
    images = []
    for name, scan, labels in test_images(experiment, cases, args.work):
        image = preprocess(predictor_for(GAUSSIAN, model, None), scan)
        reference = read_labels(labels)
        assert tuple(image.shape[1:]) == reference.shape, "preprocessing keeps the grid of these images"
        images.append((name, image, reference))
    rows, shown = {}, {}
    for way in (ONE_PASS, GAUSSIAN, TILES, STAGES):
        rows[way], shown[way] = measure(experiment, way, model, images, args.work)
    image = images[0][1]
    rows[STAGES]["plan"] = predictor_for(STAGES, model, image.shape[1:]).plan(image).as_dict()
    if experiment in PICTURES:
        draw(experiment, images, shown[GAUSSIAN], shown[STAGES], dataset.labels, rows, args.out)
    log = torch.load(model / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)["logging"]
    spans = zip(log["epoch_end_timestamps"], log["epoch_start_timestamps"], strict=True)
    configuration = json.loads((model / "plans.json").read_text())["configurations"][dataset.configuration]
    return {
        "classes": dataset.foreground,
        "images": {name: list(reference.shape) for name, _, reference in images},
        "patch": configuration["patch_size"],
        "batch": configuration["batch_size"],
        "features": configuration["architecture"]["arch_kwargs"]["features_per_stage"],
        "training": f"{TRAINER}, {EPOCHS * ITERATIONS} iterations, one core, {sum(b - a for b, a in spans) / 60:.0f} min",
        "rows": rows,
    }


def cpu_name():
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("NNUNET_NORM_DATA"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument(
        "--note", default="", help="what else is to be said about the machine, such as what else ran on it"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data is needed, or NNUNET_NORM_DATA")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        k: v for k, v in Workspace(args.work, DemoSettings()).environment().items() if k.startswith("nnUNet_")
    }
    torch.set_num_threads(args.threads)
    path = args.out / "whole_image_statistics.json"
    about = {
        "command": f"python benchmarks/whole_image_statistics.py --data IMAGES --work FOLDER --only {' '.join(args.only)}",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {args.threads} thread(s) for predicting",
        "note": args.note,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "nnunetv2")},
        "seed": "none: one training per dataset, with nnU-Net's own trainer, which is not seeded",
    }
    for which, dataset in DATASETS.items():
        wanted = [e for e in args.only if EXPERIMENTS[e] == which]
        if not wanted:
            continue
        cases = cases_of(which, args.data)
        model = train(dataset, cases, args.work)
        for experiment in wanted if not args.train_only else ():
            found = evaluate(experiment, model, cases, args)
            result = json.loads(path.read_text()) if path.exists() else {"experiments": {}}  # perhaps of another run
            result = about | {"experiments": result["experiments"] | {experiment: found}}
            write_json(path, result, indent=2)
            write_table(result, path.with_suffix(".md"))


if __name__ == "__main__":
    main()
