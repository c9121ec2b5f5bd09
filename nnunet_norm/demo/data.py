"""The demo's images: slabs cut from the ICBM152 template, with a simulated acquisition on top.

What is real: the T1 template and its grey- and white-matter maps (ICBM152 2009a, nonlinear, symmetric, 1 mm), which
nilearn carries inside its package, so that nothing is downloaded. What is simulated: the template is one average brain, so
"cases" are axial slabs of it, and every case gets its own contrast (gamma), smooth bias field and Rician noise. What
keeps the comparison honest: the slabs of training, validation and test do not share a slice and lie 8 mm apart. They are
cut along the body axis because the template is symmetric: a held-out hemisphere would be a mirror image of a training case.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813

from nnunet_norm.errors import OutputError, SetupError
from nnunet_norm.writing import write_json, written_beside

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)

LABELS = {"background": 0, "grey matter": 1, "white matter": 2}
"""Background is all that is neither grey nor white matter: air, skull (stripped) and cerebrospinal fluid."""

CHANNEL = "rescale_to_0_1"
"""nnU-Net's name for the normalization of a channel: every case by its own minimum and maximum. A z-score over the case,
as for MRI of whole heads, would depend on how much air the slab of a case happens to contain."""

SPACING = (1.0, 1.0, 1.0)
"""Millimetres, (z, y, x)."""

FIELD_OF_VIEW = (256, 224)
"""Every slice (y, x) is padded to this with air, as a scanner's field of view would have it."""

SIMULATED = (
    "One average brain (ICBM152 2009a, 1 mm), cut into axial slabs; contrast, bias field and noise of each case are "
    "simulated. The test slab shares no slice with training and lies 8 mm away from it."
)
"""The sentence that stands beside every result of the demo."""


@dataclass(frozen=True)
class Slab:
    """An axial slab of the template and what it is used for.

    Attributes:
        start: first slice (z, in voxels of the template).
        stop: one past the last slice.
        role: ``train``, ``val`` or ``test``.
        acquisitions: number of simulated acquisitions, each a case.
    """

    start: int
    stop: int
    role: str
    acquisitions: int


SLABS = (
    Slab(12, 40, "train", 2),
    Slab(40, 68, "train", 2),
    Slab(76, 96, "test", 1),
    Slab(108, 120, "val", 2),
    Slab(124, 152, "train", 2),
)


@dataclass(frozen=True)
class Case:
    """One simulated acquisition of a slab.

    Attributes:
        name: nnU-Net's case identifier.
        role: ``train``, ``val`` or ``test``.
        image: ``(z, y, x)``, arbitrary units as an MR scanner gives them.
        labels: ``(z, y, x)``, see :data:`LABELS`.
    """

    name: str
    role: str
    image: FloatArray
    labels: LabelArray


def load_template() -> tuple[FloatArray, LabelArray]:
    """The T1 template in [0, 1] and its labels, both ``(z, y, x)``, from the files inside nilearn's package.

    The label of a voxel is the most probable of grey matter, white matter and neither.

    Raises:
        SetupError: nilearn is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn announces its own deprecations on import; none concerns the user
        try:
            from nilearn import datasets
        except ImportError as error:
            raise SetupError(f'nilearn is missing ({error}): pip install "nnunet_norm[demo]"') from error
        template, grey, white = (
            np.asarray(load(resolution=1).get_fdata(dtype=np.float32)).T
            for load in (
                datasets.load_mni152_template,
                datasets.load_mni152_gm_template,
                datasets.load_mni152_wm_template,
            )
        )
    labels = np.argmax(np.stack([1 - grey - white, grey, white]), axis=0).astype(np.uint8)
    return pad_to_field_of_view(template), pad_to_field_of_view(labels)


def pad_to_field_of_view(volume: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """``volume`` ``(z, y, x)`` in the middle of slices of :data:`FIELD_OF_VIEW`, with zeros around it."""
    missing = [wanted - n for wanted, n in zip(FIELD_OF_VIEW, volume.shape[1:], strict=True)]
    return np.pad(volume, [(0, 0), *((n // 2, n - n // 2) for n in missing)])


def bias_field(shape: Sequence[int], rng: np.random.Generator, strength: float = 0.15) -> FloatArray:
    """A smooth multiplicative field, ``exp`` of a random polynomial of degree 2 in the coordinates.

    Args:
        shape: ``(z, y, x)``.
        rng: source of the coefficients.
        strength: largest absolute logarithm of the field.
    """
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    terms = (z, y, x, z * y, z * x, y * x, y * y, x * x)
    exponent = np.zeros(tuple(shape), dtype=np.float32)
    for term, weight in zip(terms, rng.uniform(-1, 1, len(terms)), strict=True):
        exponent += np.float32(weight) * term
    exponent -= exponent.mean()
    return np.exp(exponent * np.float32(strength / max(float(np.abs(exponent).max()), 1e-6)))


def simulate_acquisition(template: FloatArray, rng: np.random.Generator, noise: float = 0.04) -> FloatArray:
    """What a scanner might have made of ``template``: ``|gain * bias * template**gamma + complex noise|``.

    The magnitude of a signal with complex Gaussian noise is Rician, so that air is dark but never constant.

    Args:
        template: intensities in [0, 1].
        rng: source of everything that is random.
        noise: standard deviation of either part of the noise, relative to the brightest tissue.
    """
    gamma, gain = rng.uniform(0.8, 1.4), rng.uniform(300, 900)
    clean = np.power(template, np.float32(gamma)) * bias_field(template.shape, rng)
    real, imaginary = (rng.normal(0, noise, template.shape).astype(np.float32) for _ in range(2))
    return np.asarray(gain * np.hypot(clean + real, imaginary), dtype=np.float32)


def cut_cases(template: FloatArray, labels: LabelArray, seed: int, slabs: Sequence[Slab] = SLABS) -> list[Case]:
    """Every slab of ``slabs`` as often as it says, each with an acquisition of its own; the same for the same seed."""
    cases = []
    for slab in slabs:
        for acquisition in range(slab.acquisitions):
            rng = np.random.default_rng((seed, slab.start, acquisition))
            cases.append(
                Case(
                    name=f"brain_z{slab.start:03d}_{acquisition}",
                    role=slab.role,
                    image=simulate_acquisition(template[slab.start : slab.stop], rng),
                    labels=labels[slab.start : slab.stop],
                )
            )
    return cases


def splits(cases: Sequence[Case]) -> list[dict[str, list[str]]]:
    """nnU-Net's ``splits_final.json``: one fold, with the slabs that :data:`SLABS` reserves for validation."""
    return [{role: [case.name for case in cases if case.role == role] for role in ("train", "val")}]


def dataset_json(cases: Sequence[Case]) -> dict[str, object]:
    """nnU-Net's ``dataset.json`` for the cases that are trained and validated on."""
    return {
        "channel_names": {"0": CHANNEL},
        "labels": LABELS,
        "numTraining": sum(case.role != "test" for case in cases),
        "file_ending": ".nii.gz",
        "name": "BrainDemo",
        "description": SIMULATED,
        "reference": "ICBM152 2009a (Fonov et al. 2011, doi 10.1016/j.neuroimage.2010.07.033), from nilearn",
    }


def write_image(array: npt.NDArray[np.generic], path: Path) -> None:
    """Write ``array`` ``(z, y, x)`` as NIfTI with :data:`SPACING`, beside ``path`` first.

    Raises:
        OutputError: it cannot be written; SimpleITK knows no other error for that than ``RuntimeError``.
    """
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    with written_beside(path) as beside:
        try:
            sitk.WriteImage(image, str(beside))
        except RuntimeError as error:
            raise OutputError(f"{path} cannot be written: {str(error).splitlines()[-1]}") from error


def write_dataset(cases: Sequence[Case], folder: Path) -> None:
    """Write ``cases`` as an nnU-Net raw dataset; ``dataset.json`` comes last and says that the folder is complete."""
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case in cases:
        suffix = "Ts" if case.role == "test" else "Tr"
        write_image(case.image, folder / f"images{suffix}" / f"{case.name}_0000.nii.gz")
        write_image(case.labels, folder / f"labels{suffix}" / f"{case.name}.nii.gz")
    write_json(folder / "splits_final.json", splits(cases))
    write_json(folder / "dataset.json", dataset_json(cases))
