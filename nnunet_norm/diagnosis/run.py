"""A diagnosis from beginning to end, in parts that are kept: an interrupted one continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_norm.diagnosis.cases import Chosen, LoadedCase, load
from nnunet_norm.diagnosis.fields import receptive_fields
from nnunet_norm.diagnosis.figures import draw_change
from nnunet_norm.diagnosis.findings import Verdict
from nnunet_norm.diagnosis.gradient_figure import caption, draw_gradient_map
from nnunet_norm.diagnosis.measure import measure_batches, measure_case
from nnunet_norm.diagnosis.model import DiagnosedModel
from nnunet_norm.diagnosis.report import write_html
from nnunet_norm.diagnosis.summary import summarized
from nnunet_norm.pages import as_png
from nnunet_norm.prediction.checks import check_output_folder
from nnunet_norm.training.patches import foreground_patches
from nnunet_norm.training.reporting import none_for_nan
from nnunet_norm.writing import write_json, written_beside

MAX_VOXELS = 2**22
"""Of a case, where nobody says how many: 160 x 160 x 160, or 16 slices of 512 x 512."""

PROBES = 4
"""Tiles on which the effective receptive field is measured."""

FIGURE = "receptive_field.png"
FIELD = "receptive_field.json"
JSON, HTML = "diagnosis.json", "diagnosis.html"


@dataclass(frozen=True)
class Finished:
    """What a diagnosis has left.

    Attributes:
        verdict: the answer.
        json: the numbers.
        html: the report.
    """

    verdict: Verdict
    json: Path
    html: Path


class Diagnosis:
    """Measures a model on some cases; every finished part lies in the output folder and is not made again."""

    def __init__(
        self,
        model: DiagnosedModel,
        chosen: Chosen,
        output: str | Path,
        *,
        max_voxels: int = MAX_VOXELS,
        progress: bool = True,
    ) -> None:
        """Look at the output folder; nothing is measured yet.

        Args:
            model: what is diagnosed.
            chosen: on which cases.
            output: folder for the report and its parts; made if need be.
            max_voxels: larger cases are cut to their middle.
            progress: show a progress bar.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.model, self.chosen, self.output = model, chosen, Path(output)
        self.max_voxels, self.progress = max_voxels, progress
        check_output_folder(str(output))
        check_output_folder(str(self.parts))
        self._loaded: LoadedCase | None = None

    @property
    def parts(self) -> Path:
        """Where finished parts lie."""
        return self.output / "parts"

    def receptive_field(self) -> dict[str, Any]:
        """Measure and draw the receptive fields: ``receptive_field.png`` (if there is an effective one) and ``.json``."""
        pictures = (self.output / FIGURE, self._picture("receptive_field"))
        kept = self._kept("receptive_field", self._of_case(0))
        if kept is not None and (kept["effective"] is None or all(picture.is_file() for picture in pictures)):
            return kept
        fields = receptive_fields(self.model.network, self._probes(self._case(0).image))
        found = fields.as_dict() | {"caption": None}
        if fields.effective is not None:
            patch, name = self.model.patch_size, f"{self.model.nnunet.trainer_name} ({fields.network})"
            found["caption"] = caption(fields, patch, name)
            for path, with_caption in zip(pictures, (True, False), strict=True):  # HTML has captions of its own
                with written_beside(path) as beside:
                    beside.write_bytes(as_png(draw_gradient_map(fields, patch, name, with_caption=with_caption)))
        self._keep("receptive_field", self._of_case(0), found)
        write_json(self.output / FIELD, found, indent=2)
        return found

    def run(self) -> Finished:
        """Measure everything that is not there yet, and write the report.

        Raises:
            InputImageError: a case cannot be read, or its labels do not fit.
            OutputError: a file cannot be written.
        """
        with tqdm(total=len(self.chosen.cases) + 2, disable=not self.progress) as bar:
            bar.set_description("receptive field")
            field = self.receptive_field()
            bar.update()
            cases = []
            for number in range(len(self.chosen.cases)):
                cases.append(self._measured(number, field["effective"], bar.set_description))
                bar.update()
            bar.set_description("train and eval mode")
            disparity = self._disparity()
            bar.update()
        found = summarized(self.model, self.chosen, cases, disparity, field, self.max_voxels)
        write_json(self.output / JSON, found, indent=2)
        write_html(self.output / HTML, found, self._figures())
        verdict = Verdict(found["verdict"]["kind"], found["verdict"]["sentence"])
        return Finished(verdict, self.output / JSON, self.output / HTML)

    def _measured(
        self, number: int, effective: Sequence[Sequence[int]] | None, say: Callable[[str], object]
    ) -> dict[str, Any]:
        """The numbers of one case, kept or new."""
        name, made_from = self.chosen.cases[number].name, self._of_case(number)
        kept = self._kept(_part(name), made_from)
        if kept is not None and self._patches(name).is_file():
            return kept
        say(f"{name}: preprocessing")
        case = self._case(number)
        sizes = self.model.tile_sizes([case.image.shape[1:]])
        found, patches, picture = measure_case(self.model, case, sizes, effective, say)
        with written_beside(self._patches(name)) as beside, beside.open("wb") as file:
            np.savez(file, patches=torch.stack(patches).numpy())
        if picture is not None:
            with written_beside(self._picture(_part(name))) as beside:
                beside.write_bytes(as_png(draw_change(picture, name, self.model.class_names)))
        self._keep(_part(name), made_from, found)
        return found

    def _disparity(self) -> dict[str, Any]:
        """Train/eval disparity on the patches of all cases."""
        made_from = {"cases": [self._of_case(number) for number in range(len(self.chosen.cases))]}
        kept = self._kept("disparity", made_from)
        if kept is not None:
            return kept
        patches: list[list[Tensor]] = []
        for case in self.chosen.cases:
            with np.load(self._patches(case.name)) as file:
                patches.append(list(torch.from_numpy(file["patches"])))
        found = measure_batches(self.model, patches)
        described = {
            "per_class": [none_for_nan(value) for value in found.per_class],
            "batch_statistics": [none_for_nan(value) for value in found.batch_statistics],
            "num_batches": found.num_batches,
            "batch_size": found.num_samples / found.num_batches if found.num_batches else None,
        }
        self._keep("disparity", made_from, described)
        return described

    def _case(self, number: int) -> LoadedCase:
        """A case, preprocessed; the last one is remembered."""
        case = self.chosen.cases[number]
        if self._loaded is None or self._loaded.name != case.name:
            self._loaded = None  # one case at a time in memory
            self._loaded = load(self.model.nnunet, case, self.max_voxels)
        return self._loaded

    def _probes(self, image: Tensor) -> Tensor:
        """Tiles (N, C, *patch) spread over an image."""
        everywhere = torch.ones(image.shape[1:], dtype=torch.bool)
        return torch.stack(foreground_patches(image, everywhere, PROBES, self.model.patch_size))

    def _figures(self) -> dict[str, bytes]:
        """The pictures that were kept, by what they show."""
        found = {
            name: self._picture(name) for name in ("receptive_field", *(_part(case.name) for case in self.chosen.cases))
        }
        return {name: path.read_bytes() for name, path in found.items() if path.is_file()}

    def _patches(self, name: str) -> Path:
        return self.parts / f"{_part(name)}.npz"

    def _picture(self, name: str) -> Path:
        return self.parts / f"{name}.png"

    @cached_property
    def _of_model(self) -> dict[str, Any]:
        """What every number depends on."""
        return {
            "version": version("nnunet_norm"),
            "checkpoint": _stamp([self.model.checkpoint]),
            "device": str(self.model.nnunet.device),
            "max_voxels": self.max_voxels,
        }

    def _of_case(self, number: int) -> dict[str, Any]:
        """What the numbers of a case depend on."""
        case = self.chosen.cases[number]
        files = [*case.files, *(file for file in (case.labels, case.previous) if file is not None)]
        return self._of_model | {"case": case.name, "files": _stamp(files)}

    def _kept(self, part: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
        """A finished part, if it was made from the same."""
        path = self.parts / f"{part}.json"
        if not path.is_file():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # somebody else's file; it is made again
            return None
        if not isinstance(kept, dict) or kept.get("made_from") != made_from:
            return None
        found: dict[str, Any] = kept["found"]
        return found

    def _keep(self, part: str, made_from: dict[str, Any], found: dict[str, Any]) -> None:
        write_json(self.parts / f"{part}.json", {"made_from": made_from, "found": found}, indent=1)


def _part(case: str) -> str:
    """Name of the part of a case."""
    return f"case_{case}"


def _stamp(files: Sequence[str | Path]) -> list[list[Any]]:
    """Path, size and time of files; they are what they were if all is equal."""
    return [[os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
