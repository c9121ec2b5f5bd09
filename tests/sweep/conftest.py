"""A sweep whose trainings are pretended: real plans and references, and results as nnU-Net would leave them."""

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from nnunet_norm.evaluation import Options
from nnunet_norm.sweep.collecting import collect
from nnunet_norm.sweep.grid import Grid, load_grid
from nnunet_norm.sweep.outcomes import Collection
from nnunet_norm.sweep.points import Run

STOCK = Path(__file__).resolve().parent.parent / "stock_plans" / "nnUNetPlans.json"
DATASET = "Dataset004_Pretended"
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "front": 1, "rear": 2},
    "file_ending": ".nii.gz",
    "numTraining": 0,
}
SHAPE, SPACING = (10, 12, 14), (1.0, 1.0, 2.0)


class PretendedSweep:
    """Folders of nnU-Net with a dataset, and a way to pretend that trainings have come so far."""

    def __init__(self, root: Path, text: str, *, cases_per_fold: int = 2) -> None:
        """Write dataset and grid.

        Args:
            root: for all folders.
            text: the grid, as YAML.
            cases_per_fold: that are validated.
        """
        self.root, self.cases_per_fold = root, cases_per_fold
        self.preprocessed = root / "preprocessed" / DATASET
        (self.preprocessed / "gt_segmentations").mkdir(parents=True)
        (root / "results").mkdir()
        (self.preprocessed / "dataset.json").write_text(json.dumps(DATASET_JSON), encoding="utf-8")
        plans = json.loads(STOCK.read_text(encoding="utf-8")) | {"dataset_name": DATASET}
        (self.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans), encoding="utf-8")
        for fold in range(5):
            for case in self.cases(fold):
                write_labels(self.preprocessed / "gt_segmentations" / f"{case}.nii.gz", reference_of(case))
        self.yaml = root / "tried.yaml"
        self.yaml.write_text(text, encoding="utf-8")

    def cases(self, fold: int | str) -> list[str]:
        """Validation cases of a fold."""
        return [f"case_{fold}{number}" for number in range(self.cases_per_fold)]

    def grid(self) -> Grid:
        """The grid, read."""
        return load_grid(str(self.yaml))

    def train(self, run: Run, *, epochs: int, moved: float, seconds: float = 2.0) -> Path:
        """Pretend that a training went on for so many epochs, without its end."""
        folder = self.grid().fold_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(abs(hash(run.name)) % 2**32 if epochs > 20 else 0)
        lines = []
        for epoch in range(epochs):
            loss = np.exp(-3 * epoch / max(epochs, 2)) + 0.2 * moved + 0.02 * rng.normal()
            dice = 0.9 * (1 - np.exp(-5 * epoch / max(epochs, 2))) - 0.1 * moved + 0.02 * rng.normal()
            lines += [f"Epoch {epoch}", "Current learning rate: 0.01", f"train_loss {loss:.4f}", f"val_loss {loss:.4f}"]
            lines += [f"Pseudo dice [np.float32({dice:.4f}), np.float32({dice:.4f})]", f"Epoch time: {seconds} s"]
        (folder / "training_log_2026_1_1_00_00_00.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    def finish(
        self, run: Run, *, moved: float, epochs: int = 3, report: dict[str, Any] | None = None, seconds: float = 2.0
    ) -> Path:
        """Pretend that a training ended and was validated.

        Args:
            run: which one.
            moved: share of the columns of voxels at whose end the prediction is a voxel off.
            epochs: that its log has.
            report: norm_report.json.
            seconds: of an epoch.
        """
        folder = self.train(run, epochs=epochs, moved=moved, seconds=seconds)
        with zipfile.ZipFile(folder / "checkpoint_final.pth", "w") as checkpoint:
            checkpoint.writestr("nothing", "")
        validation = folder / "validation"
        validation.mkdir(exist_ok=True)
        entries = []
        for case in self.cases(run.fold):
            path = validation / f"{case}.nii.gz"
            write_labels(path, predicted(case, moved))
            entries.append({"prediction_file": str(path), "reference_file": "", "metrics": {}})
        if report is not None:
            (validation / "norm_report.json").write_text(json.dumps(report), encoding="utf-8")
        (validation / "summary.json").write_text(json.dumps({"metric_per_case": entries}), encoding="utf-8")
        return folder


def reference_of(case: str) -> np.ndarray:
    """Two boxes, one behind the other, of a size of the case's own."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    size = 6 + int(case[-1]) % 3
    labels[2:5, 2 : 2 + size, 2:10] = 1
    labels[5:8, 2 : 2 + size, 2:10] = 2
    return labels


def predicted(case: str, moved: float) -> np.ndarray:
    """The reference, whose end at the last axis lies a voxel farther in a share of the columns."""
    labels = reference_of(case)
    columns = np.argwhere(labels[..., 9] > 0)
    for y, x in columns[: round(moved * len(columns))]:
        labels[y, x, 10] = labels[y, x, 9]
    return labels


def write_labels(path: Path, labels: np.ndarray) -> None:
    """A segmentation whose last axis has the first spacing."""
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path))


def measured(disparity: float, mismatch: float, distance: float, verdict: str) -> dict[str, Any]:
    """norm_report.json of a validation."""
    per_class = {"1": mismatch, "2": mismatch}
    return {
        "train_eval_disparity": {"per_class": {"1": disparity, "2": None}, "mean": disparity},
        "tile_mismatch": {"per_class": per_class, "max_dist": distance, "verdict": verdict},
    }


@contextmanager
def folders_of(root: Path) -> Iterator[None]:
    """Inside, nnU-Net's folders are those of a pretended sweep."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{folder}", str(root / folder))
        yield


@pytest.fixture
def pretended(tmp_path: Path) -> Iterator[Callable[[str], PretendedSweep]]:
    """Make a pretended sweep in folders of its own."""
    with folders_of(tmp_path):
        yield lambda text: PretendedSweep(tmp_path, text)


@pytest.fixture
def pretended_folders(unfinished: "Unfinished") -> Iterator[None]:
    """While a test runs, nnU-Net's folders are those of the unfinished sweep."""
    with folders_of(unfinished.sweep.root):
        yield


UNFINISHED = """
dataset: 4
configuration: 3d_fullres
folds: [0, 1]
axes: {norm: [InstanceNorm, BRN], batch: [16, 2]}
fixed: {epochs: 3}
baseline: {norm: InstanceNorm, batch: 2}
"""


class Unfinished(NamedTuple):
    """A sweep of four models in two folds: five of its trainings are done, one runs, two have not begun."""

    sweep: PretendedSweep
    found: Collection
    moved: dict[tuple[str, int, int], float]


@pytest.fixture(scope="session")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Unfinished:
    """Collected once: it is not to be changed."""
    root = tmp_path_factory.mktemp("unfinished")
    moved = {
        ("InstanceNorm", 2, 0): 0.8,
        ("InstanceNorm", 2, 1): 0.6,
        ("InstanceNorm", 16, 0): 0.4,
        ("InstanceNorm", 16, 1): 0.4,
        ("BRN", 16, 1): 0.1,
    }
    tiles = measured(0.0, 0.0, 0.0, "no")
    alone = tiles | {"tile_mismatch_with_tile_statistics": measured(0.0, 0.04, 7.5, "7.5")["tile_mismatch"]}
    with folders_of(root):
        sweep = PretendedSweep(root, UNFINISHED)
        for run in sweep.grid().runs:
            norm, batch = run.point.values["norm"], run.point.values["batch_size"]
            if (norm, batch, run.fold) in moved:
                report = (
                    alone if norm == "InstanceNorm" else measured(0.02, 0.0, 1e-6, "no (float32 rounding, 1.0e-06)")
                )
                sweep.finish(run, moved=moved[norm, batch, int(run.fold)], report=report, seconds=float(batch))
            elif batch == 16:
                sweep.train(run, epochs=2, moved=0.1)
        return Unfinished(sweep, collect(sweep.grid(), Options(tolerance=0.5), progress=False), moved)
