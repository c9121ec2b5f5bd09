"""Datasets of the benchmarks: their raw form, preparation by nnU-Net's own programs, and how those are called."""

import shutil
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from nnunet_norm.demo.process import run_logged
from nnunet_norm.demo.workspace import DemoSettings, Workspace
from nnunet_norm.writing import write_json

ONE_CORE = """import multiprocessing
multiprocessing.cpu_count = lambda: 1
from nnunetv2.run.run_training import run_training_entry
run_training_entry()"""
"""``nnUNetv2_train``, which would take every core of the machine whatever OMP_NUM_THREADS says."""


@dataclass(frozen=True)
class Dataset:
    """One dataset and how its model is trained; spacing (z, y, x) is that of cases which are arrays."""

    name: str
    configuration: str
    channel: str
    labels: dict[str, int]
    ending: str
    plan: tuple[str, ...]
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def number(self):
        """As nnU-Net's programs take it."""
        return str(int(self.name[7:10]))

    @property
    def foreground(self):
        """Names of all classes but the background."""
        return [label for label in self.labels if self.labels[label]]


def make_raw(dataset, cases, folder):
    """nnU-Net's raw dataset of the cases for training and validation, with the split; dataset.json comes last.

    A case is (name, role, image, labels), both of the latter as files or as arrays (z, y, x).
    """
    used = [case for case in cases if case[1] != "test"]
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for name, _, image, labels in used:
        write_image(image, folder / "imagesTr" / f"{name}_0000{dataset.ending}", dataset.spacing)
        write_image(labels, folder / "labelsTr" / f"{name}{dataset.ending}", dataset.spacing)
    write_json(folder / "splits_final.json", [{r: [c[0] for c in used if c[1] == r] for r in ("train", "val")}])
    description = {"channel_names": {"0": dataset.channel}, "labels": dataset.labels}
    write_json(folder / "dataset.json", description | {"numTraining": len(used), "file_ending": dataset.ending})


def write_image(source, target, spacing):
    """A file, copied (a PNG in grey), or an array (z, y, x); a PNG takes its only section."""
    if target.suffix == ".png":
        picture = Image.fromarray(source[0]) if isinstance(source, np.ndarray) else Image.open(source)
        picture.convert("L").save(target)
    elif isinstance(source, np.ndarray):
        image = sitk.GetImageFromArray(source)
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(image, str(target))
    else:
        shutil.copy(source, target)


def program(work, log, on_line=print):
    """Runs a program with nnU-Net's folders in ``work``; its output is appended to ``work/log``."""

    def run(*command, **changes):
        environment = Workspace(work, DemoSettings()).environment(OMP_NUM_THREADS="1", **changes)
        run_logged(command, work / log, environment, on_line)

    return run


def prepare(dataset, work, make):
    """The preprocessed dataset with its split; ``make(folder)`` writes the raw one. What is there is not made again."""
    raw, preprocessed = (work / f"nnUNet_{kind}" / dataset.name for kind in ("raw", "preprocessed"))
    if not (raw / "dataset.json").exists():
        make(raw)
    if not (preprocessed / "splits_final.json").exists():
        which = ("-d", dataset.number, "-c", dataset.configuration)
        run = program(work, f"{dataset.name}.log", lambda line: "it/s]" in line or print(line))
        run("nnUNetv2_plan_and_preprocess", *which, "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1")
        shutil.copy(raw / "splits_final.json", preprocessed)
