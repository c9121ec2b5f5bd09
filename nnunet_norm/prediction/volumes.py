"""Volumes that are too large for memory, predicted from disk to disk, whole or in parts by several processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from nnunet_norm.errors import InputImageError, OutputError, TilingError
from nnunet_norm.prediction import checks
from nnunet_norm.prediction.cases import RECORD
from nnunet_norm.prediction.predictor import HaloPredictor
from nnunet_norm.prediction.volume_labels import class_names, labels_of_part
from nnunet_norm.prediction.volume_parts import FOLDER, Parts
from nnunet_norm.prediction.work_folder import WorkFolder
from nnunet_norm.stages.regions import Region
from nnunet_norm.volumes import (
    Intensities,
    LabelVolume,
    NormalizedVolume,
    Volume,
    ZarrImage,
    discard_unfinished,
    find_volumes,
    is_finished,
    label_layout,
    measure_intensities,
    parts,
    provenance_of,
    refuse_resampling,
    refuse_unknown_normalization,
    unfinished_path,
)
from nnunet_norm.writing import write_json

logger = logging.getLogger(__name__)

INTENSITIES = "intensities.json"
"""What the streamed pass over a volume found, beside the marks of its parts."""


@dataclass(frozen=True)
class VolumeOptions:
    """How volumes are predicted.

    Attributes:
        level: of an OME-Zarr image, see ``ZarrImage``.
        save_probabilities: store them beside the labels.
        resume: leave out what is finished, and continue what was killed; else everything is predicted anew.
        num_parts: into how many parts every volume is divided, or the volumes among themselves if there are at least as many.
        part_id: which of them is predicted here.
    """

    level: int | str | None = None
    save_probabilities: bool = False
    resume: bool = False
    num_parts: int = 1
    part_id: int = 0


class VolumePrediction:
    """Predicts volumes with a loaded ``HaloPredictor``."""

    def __init__(self, predictor: HaloPredictor, source: str, output: str, options: VolumeOptions) -> None:
        """Look at everything that can be wrong before anything is computed.

        Args:
            predictor: with a model.
            source: a volume, or a folder of volumes.
            output: folder of the segmentations.
            options: see ``VolumeOptions``.

        Raises:
            InputImageError: a volume is missing, damaged, or not what the model takes.
            PlansError: the plans would resample a volume, or normalize it in a way that needs all of it at once.
            TilingError: options that volumes, or parts of them, cannot have.
            OutputError: the output cannot be written, or is there already and is not to be replaced.
        """
        self.predictor, self.output, self.options = predictor, Path(output), options
        self.all_volumes = self.volumes = find_volumes(source)
        # As many volumes as parts: then every process has whole volumes, and nothing is computed twice.
        self.divides = options.num_parts > 1 and len(self.volumes) < options.num_parts
        if not self.divides:
            self.volumes = self.volumes[options.part_id :: options.num_parts]
        self._refuse()
        for volume in self.volumes:
            image = self.image_of(volume)
            refuse_resampling(image, predictor.plans_manager, predictor.configuration_manager)
            self.boxes_of(image)
            self._refuse_itself(volume)
        refuse_unknown_normalization(predictor.plans_manager, predictor.configuration_manager)
        checks.check_output_folder(output)

    def _refuse_itself(self, volume: Volume) -> None:
        """Refuse an output that would replace its input."""
        target, source = self.target_of(volume).resolve(), volume.path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(
                f"the prediction of {str(volume.path)!r} would replace the image: choose another folder (-o)"
            )

    def _refuse(self) -> None:
        """Refuse what no volume can have."""
        predictor = self.predictor
        if predictor.population == "batch":
            raise TilingError(
                "--population batch is for images in memory: give the model those statistics first (nnunet-norm recalibrate)"
            )
        previous = predictor.configuration_manager.previous_stage_name
        if previous is not None:
            raise InputImageError(f"a cascade ({previous!r} comes first) cannot be predicted on volumes on disk")
        predictor.check_options()
        if not self.divides:
            return
        field = predictor.field
        if field.normalizes_tiles:
            raise TilingError(
                f"-num_parts {self.options.num_parts} divides a volume, and this network normalizes every tile by its own "
                "quantiles (input_normalization tile_quantile), which would be other tiles: predict it in one part"
            )
        if field.tile_statistics:
            raise TilingError(
                f"-num_parts {self.options.num_parts} divides a volume, and {field.tile_statistics[0]} takes the statistics "
                "of all of it, which every convolution would have to gather from all parts: predict it in one part, or give "
                "the model stored statistics (nnunet-norm recalibrate)"
            )
        if field.unbounded is not None:
            raise TilingError(
                f"-num_parts {self.options.num_parts} divides a volume, and {field.unbounded} sees all of it: predict it in "
                "one part"
            )

    def image_of(self, volume: Volume) -> ZarrImage:
        """The volume on the disk."""
        return ZarrImage(
            volume.path, channels=len(checks.channel_names(self.predictor.dataset_json)), level=self.options.level
        )

    def run(self) -> None:
        """Predict the volumes, or this process's parts of them.

        Raises:
            InputImageError, TilingError, OutputError: see ``HaloPredictor``.
        """
        self.predictor._write_what_ensembling_reads(self.output, {"volumes": [str(v.path) for v in self.volumes]})
        for volume in self.volumes:
            self._predict(volume)

    def verify(self) -> None:
        """See that all parts of all volumes are there, and give the outputs their names.

        Raises:
            OutputError: parts that are missing or damaged, and how to predict them.
        """
        for volume in self.all_volumes:
            if self.is_complete(volume):
                continue
            if not unfinished_path(self.target_of(volume)).exists():
                raise OutputError(
                    f"{self.target_of(volume).name}: part 0 of {self._num_parts} is not finished, nor any other: nothing of "
                    f"it is in {str(self.output)!r}; predict it, then verify again"
                )
            self._finish(self.parts_of(volume))

    def is_complete(self, volume: Volume) -> bool:
        """Whether a volume's segmentation is finished; one that is being made anew is not.

        Raises:
            OutputError: it is, and was made otherwise.
        """
        target = self.target_of(volume)
        if unfinished_path(target).exists() or not is_finished(target):
            return False
        if provenance_of(target) != json.loads(json.dumps(self._provenance(self.image_of(volume)))):
            raise OutputError(
                f"{str(target)!r} is there already, and was made with another model, image or options: remove it, or leave "
                "--continue_prediction out"
            )
        shutil.rmtree(target / FOLDER, ignore_errors=True)  # of a process that was killed when all was done
        logger.info("%s is complete", target.name)
        return True

    def target_of(self, volume: Volume) -> Path:
        """The final name of a volume's segmentation."""
        return self.output / f"{volume.case}.zarr"

    def _predict(self, volume: Volume) -> None:
        number = self.options.part_id if self.divides else 0
        name = f"{volume.case}.zarr" + (f".part_{number}" if self.divides else "")
        with self._work(name) as work:  # only now it is sure that nobody else is at it
            if self.options.resume and self.is_complete(volume):
                return
            if not self.options.resume and not self.divides:
                discard_unfinished(self.target_of(volume))
            finished = self.parts_of(volume)
            if self.options.resume and finished.is_whole(number):
                logger.info("part %d of %d of %s is there already", number, len(finished.boxes), volume.case)
            else:
                self._predict_part(volume, finished, number, work)
            if not finished.missing():
                self._finish(finished)

    def parts_of(self, volume: Volume) -> Parts:
        """The output of a volume, made or found, and its parts."""
        image, target = self.image_of(volume), self.target_of(volume)
        labels = LabelVolume(
            target,
            shape=image.shape[1:],
            class_names=class_names(self.predictor.dataset_json),
            provenance=self._provenance(image),
            num_probabilities=self._num_probabilities,
            spacing=image.spacing,
            units=image.units,
            translation=image.translation,
            num_parts=self._num_parts,
            # What was begun replaces what is there, also if another process continues it.
            overwrite=not self.options.resume or unfinished_path(target).exists(),
        )
        return Parts(labels, self.boxes_of(image))

    def boxes_of(self, image: ZarrImage) -> list[Region]:
        """The parts that a volume is divided into.

        Raises:
            TilingError: there are fewer shards than parts.
        """
        shard, _ = label_layout(image.shape[1:], self._num_probabilities, self._num_parts)
        return parts(image.shape[1:], shard, self._num_parts)

    @property
    def _num_parts(self) -> int:
        return self.options.num_parts if self.divides else 1

    @property
    def _num_probabilities(self) -> int:
        return self.predictor.label_manager.num_segmentation_heads if self.options.save_probabilities else 0

    def _provenance(self, image: ZarrImage) -> dict[str, Any]:
        """What produced the output: the same for all parts of it."""
        return {
            "image": image.identity(),
            "probabilities": self._num_probabilities,
            "trainer": self.predictor.trainer_name,
            "plans": self.predictor.plans_manager.plans_name,
            "dataset": self.predictor.plans_manager.dataset_name,
            **self.predictor.identity(),
        }

    def _predict_part(self, volume: Volume, finished: Parts, number: int, work: WorkFolder) -> None:
        image, labels, box = self.image_of(volume), finished.labels, finished.boxes[number]
        finished.unmark(number)
        normalized = NormalizedVolume(
            image, self._intensities(image, finished.folder), self.predictor.plans_manager.transpose_forward
        )
        made = labels_of_part(
            self.predictor,
            normalized,
            box,
            work,
            probabilities=self.options.save_probabilities,
            num_parts=self._num_parts,
        )
        segmentation, probabilities = made.arrays if isinstance(made.arrays, tuple) else (made.arrays, None)
        finished.mark(number, labels.write(box, segmentation, probabilities))
        self._record(volume, number if self.divides else None)

    @contextmanager
    def _work(self, name: str) -> Iterator[WorkFolder]:
        """The work folder of a part; it stays after an error if there is something to continue with."""
        parent = self.predictor.scratch or self.output
        work = WorkFolder(parent, str(self.output / name), resume=self.options.resume)
        try:
            yield work
        except BaseException:
            work.close(remove=not work.has_manifest)
            raise
        work.close(remove=True)

    def _intensities(self, image: ZarrImage, folder: Path) -> Intensities:
        """What normalizes the volume: one pass over it, by whichever process comes first."""
        file, predictor = folder / INTENSITIES, self.predictor
        with FileLock(folder / f"{INTENSITIES}.lock"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                return Intensities.from_dict(json.loads(file.read_text(encoding="utf-8")))
            found = measure_intensities(
                image,
                predictor.plans_manager,
                predictor.configuration_manager,
                input_normalization=predictor.input_normalization,
                progress=predictor.allow_tqdm,
            )
            write_json(file, found.as_dict(), indent=None)
        return found

    def _record(self, volume: Volume, part: int | None) -> None:
        """Tell how it was predicted."""
        file = self.output / (f"{RECORD}.json" if part is None else f"{RECORD}_part_{part}.json")
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        write_json(file, told | {volume.case: self.predictor.record()})

    def _finish(self, finished: Parts) -> None:
        """Give the output its name; of several processes that see it complete, one does."""
        target = finished.labels.path
        with FileLock(target.with_name(f".{target.name}.finishing.lock")) as lock:
            if finished.labels.unfinished.exists():
                finished.verify()
                finished.labels.finish()
                shutil.rmtree(target / FOLDER, ignore_errors=True)  # only now the marks are not needed any more
                logger.info("%s is complete", target.name)
            with suppress(OSError):
                os.unlink(lock.lock_file)
