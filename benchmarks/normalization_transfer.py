"""Models of one electron microscope on the images of another: membranes of VNC and of ISBI 2012."""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunet_datasets import write_image
from normalization_measure import mismatch
from normalization_models import Trained, stamp_of
from normalization_settings import MEMBRANE, Setting, cases
from trainings import Training

from nnunet_norm.diagnosis.cases import Chosen, cases_of_folder
from nnunet_norm.diagnosis.model import DiagnosedModel
from nnunet_norm.layers import find_norms, tracks_statistics
from nnunet_norm.prediction.recalibration import Recalibration
from nnunet_norm.writing import write_json

CLASS = MEMBRANE["membrane"]
"""In both datasets."""


def make_images(other: Setting, data: Path, work: Path) -> Path:
    """Images of the other dataset, with its membranes alone as labels, for training and for validation."""
    folder = work / "transfer" / other.source
    if (folder / "made.json").exists():
        return folder
    ending, spacing = other.dataset.ending, other.dataset.spacing
    names = []
    for name, role, image, labels in cases(other.source, data):
        for sub in ("images", "labels"):
            (folder / role / sub).mkdir(parents=True, exist_ok=True)
        write_image(image, folder / role / "images" / f"{name}_0000{ending}", spacing)
        write_image((labels == CLASS).astype(np.uint8), folder / role / "labels" / f"{name}{ending}", spacing)
        names.append(name)
    write_json(folder / "made.json", {"cases": names})
    return folder


def there(folder: Path) -> Callable[[DiagnosedModel], Chosen]:
    """The other dataset's validation images."""
    images, labels = (str(folder / "val" / sub) for sub in ("images", "labels"))
    return lambda model: cases_of_folder(model.nnunet, images, labels, len(list((folder / "val" / "images").iterdir())))


def transfer(run: Training, folder: Path, adapted: Path) -> dict[str, Any]:
    """Dice of membranes on the other dataset, with the model's own statistics and with those of the other's images.

    Args:
        run: the training.
        folder: from :func:`make_images`.
        adapted: folder for the model that has other statistics, estimated on the other's training images without labels
            (adaptive batch normalization); written where the model has stored statistics.
    """
    trained = Trained(run.fold.parent, there(folder))
    found = {"as_trained": _membranes(trained), "blending": trained.dice(trained.model.predict_as_nnunet)[CLASS - 1]}
    found["mismatch"] = mismatch(trained)["verdict"]
    if not any(map(tracks_statistics, find_norms(trained.network).values())):
        return found | {"adapted": None}
    _adapt(run, folder, adapted)
    return found | {"adapted": _membranes(Trained(adapted, there(folder)))}


def _adapt(run: Training, folder: Path, adapted: Path) -> None:
    """Make the adapted model, unless it is there and was made of this very checkpoint."""
    stamp, kept = stamp_of(run), adapted.with_name(f"{adapted.name}.json")
    if adapted.exists() and kept.exists() and json.loads(kept.read_text()) == stamp:
        return
    kept.unlink(missing_ok=True)
    if adapted.exists():
        shutil.rmtree(adapted)
    recalibration = Recalibration(run.fold.parent, folds=[0], device=torch.device("cpu"), progress=False)
    (target,) = recalibration.targets(folder / "train" / "images", output=adapted)
    adapted.parent.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(StringIO()):  # nnU-Net tells where it found the trainer
        recalibration.write(target)
    write_json(kept, stamp)


def _membranes(trained: Trained) -> float | None:
    def predict(image: torch.Tensor) -> torch.Tensor:
        return trained.model.halo.predict_with(trained.best_plan(image), image).cpu()

    return trained.dice(predict)[CLASS - 1]
