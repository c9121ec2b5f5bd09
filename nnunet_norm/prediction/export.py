"""Writing predictions so that a file under its final name is always whole: written beside, read back, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_pickle
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_norm.errors import OutputError
from nnunet_norm.prediction import nifti
from nnunet_norm.prediction.work_folder import MappedArray


def export_prediction_atomically(
    predicted_array_or_file: NDArray[Any] | torch.Tensor,
    properties_dict: dict[str, Any],
    configuration_manager: ConfigurationManager,
    plans_manager: PlansManager,
    dataset_json_dict_or_file: dict[str, Any] | str,
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int = default_num_processes,
) -> None:
    """Drop-in for nnU-Net's ``export_prediction_from_logits``: the same files, atomic and verified.

    The files are written into a temporary folder beside the output. The segmentation is read back and compared, because
    not every writer notices a full disk. Then the files are renamed into place, the segmentation last: where it lies, the
    case is complete, which ``--continue_prediction`` relies on.

    Args:
        predicted_array_or_file: logits (K, x, y, z) of the preprocessed image.
        properties_dict: what preprocessing told about the image.
        configuration_manager: the model's configuration.
        plans_manager: the model's plans.
        dataset_json_dict_or_file: the model's dataset.json.
        output_file_truncated: the output without the file ending.
        save_probabilities: also write ``.npz`` (key ``probabilities``) and ``.pkl`` for ensembling.
        num_threads_torch: threads for resampling.

    Raises:
        OutputError: a file cannot be written, or is not what was written; nothing is left behind.
    """
    dataset_json = (
        load_json(dataset_json_dict_or_file)
        if isinstance(dataset_json_dict_or_file, str)
        else dataset_json_dict_or_file
    )
    converted = convert_predicted_logits_to_segmentation_with_correct_shape(
        predicted_array_or_file,
        plans_manager,
        configuration_manager,
        plans_manager.get_label_manager(dataset_json),
        properties_dict,
        return_probabilities=save_probabilities,
        num_threads_torch=num_threads_torch,
    )
    segmentation, probabilities = converted if save_probabilities else (converted, None)
    write_prediction(
        segmentation,
        probabilities,
        properties_dict,
        plans_manager.image_reader_writer_class,
        output_file_truncated,
        dataset_json["file_ending"],
    )


def write_prediction(
    segmentation: NDArray[Any] | MappedArray,
    probabilities: NDArray[Any] | MappedArray | None,
    properties: dict[str, Any],
    reader_writer_class: type,
    target: str,
    file_ending: str,
) -> None:
    """Write the files of a case whole or not at all; see ``export_prediction_atomically``.

    Args:
        segmentation: in the image's own geometry.
        probabilities: (K, x, y, z), also there; they are compressed piece by piece.
        properties: what preprocessing told about the image.
        reader_writer_class: nnU-Net's, for these images.
        target: the output without the file ending.
        file_ending: with its dot.

    Raises:
        OutputError: a file cannot be written, or is not what was written; nothing is left behind.
    """
    labels, shares = (
        array.open() if isinstance(array, MappedArray) else array for array in (segmentation, probabilities)
    )
    assert labels is not None
    name = os.path.basename(target) + file_ending
    with _written_together(target, last=name) as folder:
        if shares is not None:
            beside = os.path.join(folder, os.path.basename(target))
            np.savez_compressed(beside + ".npz", probabilities=shares)
            save_pickle(properties, beside + ".pkl")
        reader_writer = reader_writer_class()
        try:
            reader_writer.write_seg(labels, os.path.join(folder, name), properties)
        except RuntimeError as error:  # what ITK raises for whatever keeps it from writing
            raise OutputError(_cannot_write(target, error)) from error
        _compare(reader_writer, os.path.join(folder, name), labels)


@contextmanager
def _written_together(target: str, *, last: str) -> Iterator[str]:
    """A hidden folder beside ``target``; its files move there when the block ends well, ``last`` after the others.

    What a killed process left of it is removed.

    Raises:
        OutputError: in place of any OSError, also of the block.
    """
    parent = os.path.dirname(target) or os.curdir
    folder = os.path.join(parent, f".{os.path.basename(target)}.writing")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
        try:
            yield folder
            for name in sorted(os.listdir(folder), key=lambda name: (name == last, name)):
                os.replace(os.path.join(folder, name), os.path.join(parent, name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(_cannot_write(target, error)) from error


def _compare(reader_writer: Any, file: str, segmentation: NDArray[Any]) -> None:
    """Refuse a file that does not hold the segmentation.

    Raises:
        OutputError: it cannot be read back, or reads differently.
    """
    try:
        if nifti.is_hidden(file, reader_writer):
            nifti.stored_values(file)
        found = reader_writer.read_seg(file)[0]
    except Exception as error:
        # The file was written a moment ago by the same class: whatever keeps it from being read, it is not whole.
        raise OutputError(_cannot_write(file, "it cannot be read back")) from error
    if found[0].shape != segmentation.shape or not np.array_equal(found[0], segmentation):
        raise OutputError(_cannot_write(file, "it reads back differently"))


def _cannot_write(target: str, why: object) -> str:
    text = getattr(why, "strerror", None) or str(why) or type(why).__name__
    return (
        f"{os.path.basename(target)} cannot be written ({text.strip().splitlines()[-1].strip()}): "
        f"make room on the disk or choose another output folder"
    )
