"""Preprocessing before and exporting after the network, in processes of their own or, with 0 workers, in this one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_norm.errors import InputImageError, SetupError
from nnunet_norm.inputs import normalize_image, warn_of_constant
from nnunet_norm.layers import IMAGE
from nnunet_norm.prediction.checks import check_image, read_image, read_segmentation

QUEUED_AT_MOST = 2
"""Tasks that wait beside those that run, so that arrays do not pile up in memory (nnU-Net's number)."""


@dataclass(frozen=True)
class Preprocessing:
    """What every case is preprocessed with.

    Attributes:
        plans_manager: nnU-Net's, of the plans.
        configuration_manager: nnU-Net's, of the configuration.
        dataset_json: the dataset's description.
        verbose: of nnU-Net's preprocessor.
        input_normalization: that of the network, whatever the plans say: a trainer of nnU-Net's own does not read them.
    """

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    verbose: bool
    input_normalization: str | None = None

    def __call__(self, files: Sequence[str], previous: str | None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Read, check and preprocess one case as nnU-Net does.

        Args:
            files: one per channel.
            previous: the previous stage's segmentation, which a cascade takes as further channels.

        Returns:
            The image (C, x, y, z) and its properties.

        Raises:
            InputImageError: it cannot be read, has other channels than the model's, or values that are not finite.
        """
        reader = self.plans_manager.image_reader_writer_class()
        image, properties = read_image(files, self.dataset_json["file_ending"], reader)
        check_image(image, files, self.dataset_json)
        stage = read_segmentation(previous, reader) if previous else None
        preprocessor = self.configuration_manager.preprocessor_class(verbose=self.verbose)
        data, segmentation, properties = preprocessor.run_case_npy(
            image, stage, properties, self.plans_manager, self.configuration_manager, self.dataset_json
        )
        data = np.ascontiguousarray(data, dtype=np.float32)
        if self.input_normalization == IMAGE:
            warn_of_constant(f"image {os.path.basename(files[0])!r}", normalize_image(data))
        if previous:
            labels = self.plans_manager.get_label_manager(self.dataset_json).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(segmentation[0], labels, data.dtype)))
        return data, properties


class PreprocessedCases:
    """Cases in order, as the dicts that nnU-Net's predictor takes: ``data``, ``data_properties``, ``ofile``.

    A case that cannot be predicted is left out; ``failures`` tells why, in one line each, when the iteration is over.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        cases: Sequence[tuple[Sequence[str], str | None, str | None]],
        workers: int,
    ) -> None:
        """Nothing starts yet.

        Args:
            preprocessing: what every case goes through.
            cases: per case its files, the previous stage's segmentation, and the output without file ending.
            workers: processes; 0 preprocesses each case in this process when it is asked for.
        """
        self.preprocessing = preprocessing
        self.cases = cases
        self.workers = min(workers, len(cases))
        self.failures: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with Workers(self.workers, "preprocessing", "-npp", finishes=False) as workers:
            waiting: deque[tuple[str | None, Future[Any]]] = deque()
            for case in itertools.chain(self.cases, itertools.repeat(None, self.workers)):
                if case is not None:
                    files, previous, output = case
                    waiting.append((output, workers.submit(self.preprocessing, list(files), previous)))
                if len(waiting) > self.workers or (case is None and waiting):
                    yield from self._finished(workers, *waiting.popleft())

    def _finished(self, workers: Workers, output: str | None, future: Future[Any]) -> Iterator[dict[str, Any]]:
        try:
            data, properties = workers.result(future)
        except InputImageError as error:
            self.failures.append(str(error))
        else:
            yield {"data": torch.from_numpy(data), "data_properties": properties, "ofile": output}


class PreprocessedGroups:
    """Groups of cases, one after another, each after something that has to be done before its first case is predicted."""

    def __init__(self, groups: Sequence[tuple[Callable[[], None], Sequence[int], PreprocessedCases]]) -> None:
        """Nothing starts yet.

        Args:
            groups: what is called before, the cases' places in the order of the call, and the cases.
        """
        self.groups = groups
        self.failures: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for prepare, _, cases in self.groups:
            prepare()
            yield from cases
            self.failures += cases.failures

    def in_order(self, results: Sequence[Any]) -> list[Any]:
        """Results of all cases, put from the order of the groups into that of the call."""
        places = [place for _, group, _ in self.groups for place in group]
        return [result for _, result in sorted(zip(places, results, strict=True), key=lambda pair: pair[0])]


class Workers:
    """Some processes (spawned, as CUDA needs it) with the same interface as none: then a task runs when submitted.

    Leaving the block waits for what was submitted. After an error it does so only where the work is worth finishing: finished
    predictions are to be written, and what nobody will predict needs no preprocessing.
    """

    def __init__(self, count: int, purpose: str, flag: str, *, finishes: bool = True) -> None:
        """Start no process before the first task.

        Args:
            count: processes; 0 for none.
            purpose: what they do, for an error message.
            flag: how the user sets ``count``.
            finishes: after an error, too, what was submitted is done.
        """
        self.count, self.purpose, self.flag, self.finishes = count, purpose, flag, finishes
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches every process of a terminal; this one ends the others, in order and without their tracebacks.
        self.executor = (
            ProcessPoolExecutor(
                count, mp_context=context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
            )
            if count
            else None
        )
        self.pending: set[Future[Any]] = set()

    def submit(self, task: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start a task; waits while ``QUEUED_AT_MOST`` already wait for a free process."""
        if self.executor is None:
            return _run_here(task, *args)
        self.check()
        while len(self.pending) >= self.count + QUEUED_AT_MOST:
            wait(self.pending, return_when=FIRST_COMPLETED)
            self.check()
        try:
            future = self.executor.submit(task, *args)
        except BrokenProcessPool as error:
            raise self._ended_from_outside() from error
        self.pending.add(future)
        return future

    def check(self) -> None:
        """Raise what a task raised that nobody has asked about yet, unless it is about one case alone."""
        for future in [future for future in self.pending if future.done()]:
            self.pending.discard(future)
            if future.cancelled() or not isinstance(future.exception(), InputImageError):
                self.result(future)

    def result(self, future: Future[Any]) -> Any:
        """The task's result, or its own exception.

        Raises:
            SetupError: the process was ended from outside.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise self._ended_from_outside() from error

    def each(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Every item with the task's result, as they are finished.

        Raises:
            SetupError: as :meth:`result`.
            Others: of the task.
        """
        running: dict[Future[Any], Any] = {}
        for item in items:
            running[self.submit(task, item)] = item
            for future in [future for future in running if future.done()]:
                yield running.pop(future), self.result(future)
        for future in as_completed(running):
            yield running[future], self.result(future)

    def _ended_from_outside(self) -> SetupError:
        return SetupError(
            f"a {self.purpose} process was ended from outside, by the operating system if memory ran out: "
            f"use fewer ({self.flag} below {self.count})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.executor is None:
            return
        if kind is not None and not self.finishes:
            running = list((self.executor._processes or {}).values())  # the executor itself can end them from 3.14 on
            self.executor.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
        self.executor.shutdown(wait=True)


def settled(result: Any) -> Future[Any]:
    """A future that has its result."""
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _run_here(task: Callable[..., Any], *args: Any) -> Future[Any]:
    try:
        return settled(task(*args))
    except InputImageError as error:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future
