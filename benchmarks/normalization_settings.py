"""What ``normalization.py`` trains: rows (norm and input normalization) and settings (data and network)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunet_datasets import Dataset
from PIL import Image
from trainings import Training
from whole_image_statistics_data import cases_of

from nnunet_norm.errors import SetupError

Case = tuple[str, str, Any, Any]


@dataclass(frozen=True)
class Row:
    """A row of the tables.

    Attributes:
        norm: as it stands in the trainer's name.
        inputs: how the input is normalized: a value of the plans' key, or nothing for nnU-Net's own way, the z-score of the
            whole image.
    """

    norm: str
    inputs: str = ""

    @property
    def plan(self) -> tuple[str, ...]:
        """Flags of ``nnunet-norm plan``."""
        return ("--input-normalization", self.inputs) if self.inputs else ()


ROWS = {
    "InstanceNorm": Row("InstanceNorm"),
    "BatchNorm": Row("BatchNorm"),
    "BatchRenorm": Row("BRN"),
    "GroupNorm": Row("GN"),
    "InstanceNorm, tracked": Row("INTracked"),
    "PreciseBN": Row("PreciseBN"),
    "FrozenBN": Row("FrozenBN"),
    "Identity": Row("NoNorm"),
    "BatchNorm, image quantiles": Row("BatchNorm", "image_quantile"),
    "BatchNorm, tile quantiles": Row("BatchNorm", "tile_quantile"),
    "InstanceNorm, image quantiles": Row("InstanceNorm", "image_quantile"),
    "InstanceNorm, tile quantiles": Row("InstanceNorm", "tile_quantile"),
}

VNC_LABELS = {"background": 0, "membrane": 1, "mitochondria": 2, "glia": 3, "synapse": 4}
VNC_SPACING, ISBI_SPACING = (50.0, 4.6, 4.6), (50.0, 4.0, 4.0)
"""Nanometres (z, y, x); the sections of VNC are 45 to 50 thick."""


@dataclass(frozen=True)
class Network:
    """The small network of a setting: a U-Net's stages, patch size, features of the first stage, batch size.

    Attributes:
        unetr: of a UNETR, which has no stages that could be chosen, the sizes of its transformer by their names.
    """

    stages: int
    patch: tuple[int, ...]
    features: int = 16
    batch: int = 2
    unetr: tuple[tuple[str, int], ...] = ()

    @property
    def plan(self) -> tuple[str, ...]:
        """Flags of ``nnunet-norm plan``."""
        sizes: list[object] = ["--base-features", self.features]
        if self.unetr:  # its plans are those of a U-Net nevertheless, whose strides must suit the patch
            sizes = ["--unetr", *[f"{key}={value}" for key, value in self.unetr]]
        sizes = ["--num-stages", self.stages, "--patch-size", *self.patch, *sizes, "--batch-size", self.batch]
        return tuple(map(str, sizes))

    @property
    def name(self) -> str:
        """For names of plans."""
        inside = "unetr" + "_".join(str(v) for _, v in self.unetr) if self.unetr else f"{self.stages}s_{self.features}f"
        return f"{inside}_{'x'.join(map(str, self.patch))}_b{self.batch}"

    @property
    def words(self) -> str:
        """For readers."""
        kind = f"{self.stages} stages, {self.features} features at the first"
        if self.unetr:
            kind = "UNETR, " + ", ".join(f"{key} {value}" for key, value in self.unetr)
        return f"{kind}, patch {' x '.join(map(str, self.patch))}, batch {self.batch}"


SMALL_2D, SMALL_3D, SMALL_MRI = Network(4, (128, 128)), Network(4, (8, 96, 96)), Network(3, (32, 40, 32))
SMALL_UNETR = (("feature_size", 8), ("hidden_size", 96), ("mlp_dim", 192), ("num_heads", 4))
UNETR_2D, UNETR_MRI = Network(4, (128, 128), unetr=SMALL_UNETR), Network(3, (32, 48, 32), unetr=SMALL_UNETR)
GHOST_2D = Network(4, (64, 64), batch=16)
"""Wu and Johnson 2021 normalize parts of a batch with statistics of their own; the whole batch stays what it is."""


@dataclass(frozen=True)
class Setting:
    """One dataset with one configuration and one architecture.

    Attributes:
        source: name of the data, see :func:`cases`; empty for a dataset that nnU-Net has already.
        dataset: as nnU-Net is to know it.
        network: its size.
        architecture: what stands behind the norm in the trainer's name.
        ghost: network and batch for the normalization batch sizes; None: those are not trained.
        other: the setting whose images the models are tried on as well.
    """

    source: str
    dataset: Dataset
    network: Network
    architecture: str = ""
    ghost: Network | None = None
    other: str = ""


MEMBRANE = {"background": 0, "membrane": 1}
HIPPOCAMPUS = {"background": 0, "anterior": 1, "posterior": 2}
VNC_2D = Dataset("Dataset005_VNC", "2d", "EM", VNC_LABELS, ".png", ())
ISBI_2D = Dataset("Dataset006_ISBI2012", "2d", "EM", MEMBRANE, ".png", ())
VNC_3D = Dataset("Dataset015_VNCStack", "3d_fullres", "EM", VNC_LABELS, ".nii.gz", (), VNC_SPACING)
ISBI_3D = Dataset("Dataset016_ISBI2012Stack", "3d_fullres", "EM", MEMBRANE, ".nii.gz", (), ISBI_SPACING)
HIPPOCAMPUS_3D = Dataset("Dataset004_Hippocampus", "3d_fullres", "MRI", HIPPOCAMPUS, ".nii.gz", ())
SETTINGS = {
    "vnc_2d": Setting("vnc_2d", VNC_2D, SMALL_2D, ghost=GHOST_2D, other="isbi_2d"),
    "isbi_2d": Setting("isbi_2d", ISBI_2D, SMALL_2D, ghost=GHOST_2D, other="vnc_2d"),
    "vnc_3d": Setting("vnc_3d", VNC_3D, SMALL_3D, other="isbi_3d"),
    "isbi_3d": Setting("isbi_3d", ISBI_3D, SMALL_3D, other="vnc_3d"),
    "hippocampus_3d": Setting("hippocampus_3d", HIPPOCAMPUS_3D, SMALL_MRI),
    "vnc_2d_unetr": Setting("vnc_2d", VNC_2D, UNETR_2D, "_UNETR", other="isbi_2d"),
    "isbi_2d_unetr": Setting("isbi_2d", ISBI_2D, UNETR_2D, "_UNETR", other="vnc_2d"),
    "hippocampus_3d_unetr": Setting("hippocampus_3d", HIPPOCAMPUS_3D, UNETR_MRI, "_UNETR"),
}
NORMALIZATION_BATCHES = (1, 2, 4, 8, 16)

SOURCES = {
    "vnc": "groundtruth-drosophila-vnc (CC BY-NC-SA 3.0): sections of the ventral nerve cord of Drosophila, 4.6 nm a pixel",
    "isbi": "ISBI 2012 challenge: sections of the nerve cord of a Drosophila larva, 4 nm a pixel",
    "hippocampus": "Medical Segmentation Decathlon, Task04 (CC BY-SA 4.0): MRI of the hippocampus",
}
"""Where images come from, by the beginning of ``Setting.source``."""

FOLDERS = {"vnc": "vnc_sstem", "isbi": "isbi2012_em", "hippocampus": "hippocampus_msd04"}
"""Of the images; likewise."""

VNC_ROLES = {"train": range(14), "val": range(17, 20)}
ISBI_ROLES = {"train": range(22), "val": range(25, 30)}
"""Sections; those between are used for nothing, so that no section of the validation touches one that was seen."""


def cases(source: str, data: Path) -> list[Case]:
    """Every case as (name, "train" or "val", image, labels), both as arrays (z, y, x) or files.

    Raises:
        SetupError: the images are not in ``data``.
    """
    folder = data / FOLDERS[source.split("_")[0]]
    if not folder.is_dir():
        raise SetupError(f"--data {data} has no folder {folder.name}: give the folder that has it")
    if source == "hippocampus_3d":
        roles = {"train": "train", "test": "val"}
        return [(name, roles[role], *files) for name, role, *files in cases_of("hippocampus", data) if role in roles]
    read, roles, sides = {
        "vnc": (vnc, VNC_ROLES, ((0, 640), (704, 1024))),
        "isbi": (isbi2012, ISBI_ROLES, ((0, 320), (352, 512))),
    }[source.split("_")[0]]
    image, labels = read(data)
    if source.endswith("2d"):
        return [(f"section_{i:02}", role, image[i : i + 1], labels[i : i + 1]) for role in roles for i in roles[role]]
    return list(_halves(image, labels, *sides))


def _halves(image, labels, seen, held_out):
    """The stack cut along x, with unused columns between; what is trained on is cut along y again: nnU-Net wants cases."""
    for number, rows in enumerate(np.array_split(np.arange(image.shape[1]), 2)):
        box = (slice(None), slice(rows[0], rows[-1] + 1), slice(*seen))
        yield f"part_{number}", "train", image[box], labels[box]
    box = (slice(None), slice(None), slice(*held_out))
    yield "held_out", "val", image[box], labels[box]


def vnc(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels (20, 1024, 1024)."""
    names = [f"{i:02}.png" for i in range(20)]
    return tuple(_stack(data / FOLDERS["vnc"] / sub, names) for sub in ("raw", "labels"))


def isbi2012(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels (30, 512, 512); 1 is membrane."""
    names = [f"{i}.png" for i in range(30)]
    image, inside = (_stack(data / FOLDERS["isbi"] / "train" / sub, names) for sub in ("image", "label"))
    return image, (inside == 0).astype(np.uint8)


def _stack(folder, names):
    return np.stack([np.asarray(Image.open(folder / name).convert("L")) for name in names])


def training(row: str, seed: int, setting: Setting, epochs: int, iterations: int, work: Path) -> Training:
    """The training of a row."""
    which = ROWS[row]
    parts = ["norms", setting.network.name, f"{iterations}it", f"seed{seed}", which.inputs]
    plans = "_".join(filter(None, parts))
    length = ["--iterations-per-epoch", iterations, "--val-iterations-per-epoch", max(iterations // 10, 1)]
    changes = tuple(map(str, [*setting.network.plan, *length, "--seed", seed, *which.plan]))
    trainer = f"nnUNetTrainer{which.norm}{setting.architecture}"
    return Training(f"{row}, seed {seed}", setting.dataset, trainer, epochs, plans, changes, work)


def ghost_training(size: int, seed: int, setting: Setting, epochs: int, iterations: int, work: Path) -> Training:
    """The training of GhostBN that normalizes ``size`` samples of a batch at a time."""
    assert setting.ghost is not None
    found = training("BatchNorm", seed, replace(setting, network=setting.ghost), epochs, iterations, work)
    return replace(
        found,
        title=f"GhostBN by {size}, seed {seed}",
        trainer=f"nnUNetTrainerGhostBN{setting.architecture}",
        plans=f"{found.plans}_ghost{size}",
        changes=(*found.changes, "--normalization-batch-size", str(size)),
    )


@dataclass(frozen=True)
class Wanted:
    """A training of one call, of any length.

    Attributes:
        name: of the setting.
        setting: the setting.
        what: a key of ``ROWS``, or the samples that GhostBN normalizes together.
        seed: of the training.
    """

    name: str
    setting: Setting
    what: str | int
    seed: int

    @property
    def cost(self) -> float:
        """Voxels of an iteration, as a share of those of a row of the setting."""
        networks = (self.setting.network if isinstance(self.what, str) else self.setting.ghost, self.setting.network)
        one, row = (math.prod(network.patch) * network.batch for network in networks)
        return one / row

    def training(self, epochs: int, iterations: int, work: Path) -> Training:
        """Of so many epochs."""
        make = training if isinstance(self.what, str) else ghost_training
        return make(self.what, self.seed, self.setting, epochs, iterations, work)
