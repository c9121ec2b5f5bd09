"""``ItemPredictor``: nnU-Net's predictor that turns what an iterator yields into files, image by image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.helpers import empty_cache
from torch import nn
from tqdm import tqdm

from nnunet_norm.errors import InputImageError, TilingError
from nnunet_norm.prediction.assembly import in_memory
from nnunet_norm.prediction.case_labels import CaseLabels
from nnunet_norm.prediction.execution import Sink
from nnunet_norm.prediction.export import write_prediction
from nnunet_norm.prediction.work_folder import Work, WorkFolder, digest_of
from nnunet_norm.prediction.workers import PreprocessedCases, PreprocessedGroups, Workers, settled
from nnunet_norm.receptive_field.trace import unwrapped
from nnunet_norm.writing import write_json


class ItemPredictor(nnUNetPredictor):
    """Predicts preprocessed images, has their labels made box by box, and their files written beside the next image.

    What goes through the network, and how, is left as it is; ``HaloPredictor`` changes that.
    """

    resume: bool = False
    """Whether what a killed process left of a case is continued, while files are predicted."""

    work_parent: str | None = None
    """Where the cases' work folders lie; None: beside the output."""

    check: Callable[[], None] = staticmethod(int)  # type: ignore[assignment]
    """Called again and again while an image is predicted; raises what shall end the prediction."""

    record_file: Path | None = None
    """Where to tell how each case was predicted, while files are predicted."""

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile.

        Under DDP a wrapped forward would broadcast buffers while ranks predict different numbers of tiles.
        """
        return unwrapped(self.network)

    def record(self) -> dict[str, Any] | None:
        """How the last image was predicted, for the record beside the predictions; None if there is nothing to tell."""
        return None

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
    ) -> list[Any]:
        """Predict what the iterator yields: dicts with ``data`` (C, x, y, z), ``data_properties`` and ``ofile``.

        Returns:
            Per predicted case None if it was written to ``ofile``; where that is None, the segmentation (with
            probabilities: both) at the image's original shape.

        Raises:
            InputImageError: at the end, the cases that were left out.
            OutputError: a file cannot be written.
        """
        failures: list[str] = []
        results: list[Future[Any]] = []
        with Workers(num_processes_segmentation_export, "segmentation export", "-nps") as workers:
            for item in data_iterator:
                try:
                    results.append(self._predict(item, save_probabilities, workers))
                except (InputImageError, TilingError) as error:  # options that suit no image were refused before
                    failures.append(f"case {os.path.basename(item['ofile'] or '')!r}: {error}")
                    continue
                self._note(item["ofile"])
            returned = [workers.result(f) for f in tqdm(results, desc="writing", disable=not self.allow_tqdm)]
        self.__dict__.pop("check", None)  # the next call has other workers
        if isinstance(data_iterator, MultiThreadedAugmenter):
            data_iterator._finish()
        if isinstance(data_iterator, PreprocessedCases | PreprocessedGroups):
            failures += data_iterator.failures
        empty_cache(self.device)
        if failures:
            count = f"{len(failures)} case{'s' * (len(failures) != 1)}"
            others = " (the others are)" if returned else ""
            raise InputImageError(f"{count} not predicted{others}: {'; '.join(failures)}")
        return data_iterator.in_order(returned) if isinstance(data_iterator, PreprocessedGroups) else returned

    def _predict(self, item: dict[str, Any], probabilities: bool, workers: Workers) -> Future[Any]:
        """Predict a case, and have it written; the future gives what ``predict_from_data_iterator`` returns for it."""
        workers.check()
        self.check = workers.check  # an export that fails ends also what is predicted meanwhile
        image, properties, output = _loaded(item["data"]), item["data_properties"], item["ofile"]
        if output is None:
            labels = self._labels(properties, image.shape, probabilities)
            self.predict_to(labels.sink, image)
            labels.finish()
            return settled(labels.arrays)
        work = WorkFolder(self.work_parent or os.path.dirname(output) or os.curdir, output, resume=self.resume)
        try:
            identity = {"image": digest_of(image), "probabilities": probabilities}
            work.require(self.identity() | identity)
            labels = self._labels(properties, image.shape, probabilities, work)
            # Logits that are held in memory are lost with the process: there is nothing to go on with.
            self.predict_to(labels.sink, image, Work(work.path, identity) if labels.streams else None)
            labels.finish()
            written = workers.submit(
                write_prediction,
                *(work.arrays["segmentation"], work.arrays.get("probabilities"), properties),
                *(self.plans_manager.image_reader_writer_class, output, self.dataset_json["file_ending"]),
            )
        except BaseException as error:
            hopeless = isinstance(error, InputImageError)  # it would fail a second time, too
            work.close(remove=hopeless or not work.has_manifest)
            raise
        written.add_done_callback(lambda done: work.close(remove=done.exception() is None or not work.has_manifest))
        return written

    def _labels(
        self,
        properties: dict[str, Any],
        image_shape: Sequence[int],
        probabilities: bool,
        work: WorkFolder | None = None,
    ) -> CaseLabels:
        """What makes labels of a case's logits; in the files of its work folder if it has one."""
        return CaseLabels(
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            properties,
            image_shape[1:],
            probabilities=probabilities,
            allocate=in_memory if work is None else work.allocate,
        )

    def identity(self) -> dict[str, Any]:
        """What a prediction depends on, apart from the image; JSON."""
        return {}

    def predict_to(self, sink: Sink, image: torch.Tensor, work: Work | None = None) -> None:
        """Give the logits of a preprocessed image (C, x, y, z) to a sink, box by box; here in one piece."""
        del work
        sink.add(tuple(slice(0, n) for n in image.shape[1:]), self.predict_logits_from_preprocessed_data(image))

    def _note(self, output: str | None) -> None:
        """Add how the case was predicted to the record."""
        how = self.record()
        if self.record_file is None or output is None or how is None:
            return
        cases = load_json(str(self.record_file)) if self.record_file.is_file() else {}
        write_json(self.record_file, cases | {os.path.basename(output): how})


def _loaded(data: torch.Tensor | str) -> torch.Tensor:
    """The image; nnU-Net's iterators may hand over the name of a file, to be removed when it is read."""
    if not isinstance(data, str):
        return data
    image = torch.from_numpy(np.load(data))
    os.remove(data)
    return image
