"""``CasePredictor``: nnU-Net's predictor with checked inputs, atomic outputs and errors in one line.

What goes through the network, and how, is left as it is; ``HaloPredictor`` changes that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_norm.layers import confirm_normalized_images, get_input_normalization
from nnunet_norm.prediction import checks
from nnunet_norm.prediction.items import ItemPredictor
from nnunet_norm.prediction.model_folder import check_model_folder, model_errors, trainers_on_search_path
from nnunet_norm.prediction.safe_loading import check_architecture, restricted_loading
from nnunet_norm.prediction.work_folder import remove_finished
from nnunet_norm.prediction.workers import PreprocessedCases, PreprocessedGroups, Preprocessing
from nnunet_norm.writing import write_json

RECORD = "halo_prediction"
"""Beginning of the name of the file that tells how each case was predicted."""


class CasePredictor(ItemPredictor):
    """nnU-Net's predictor, hardened at its borders: the model folder, the images that come in, the files that go out."""

    trust_checkpoint: bool = False
    """Whether a model's checkpoint and plans may run code of their own when they are read."""

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str,
        use_folds: Sequence[int | str] | None,
        checkpoint_name: str = "checkpoint_final.pth",
    ) -> None:
        """Load a trained model as nnU-Net does; this package's trainers are found without ``nnUNet_extTrainer``.

        Args:
            model_training_output_dir: the folder that holds plans.json, dataset.json and the folds.
            use_folds: folds to average; None for all that are there.
            checkpoint_name: the checkpoint's file name in every fold.

        Raises:
            ModelFolderError: something is missing, or a checkpoint does not fit the network of the plans; or the model would
                run code of its own, unless ``trust_checkpoint``.
            SetupError: the model's trainer cannot be found.
        """
        check_model_folder(model_training_output_dir, use_folds, checkpoint_name)
        if not self.trust_checkpoint:
            check_architecture(model_training_output_dir)
        with model_errors(model_training_output_dir):
            with trainers_on_search_path(), restricted_loading(trust=self.trust_checkpoint):
                super().initialize_from_trained_model_folder(model_training_output_dir, use_folds, checkpoint_name)
            # The first fold's weights were loaded; now it shows whether the others fit, not after the first image.
            for weights in (*self.list_of_parameters[1:], self.list_of_parameters[0]):
                self.bare_network.load_state_dict(weights)
        confirm_normalized_images(self.bare_network)  # ``preprocessing`` normalizes them
        self._fit_loaded_model()

    @property
    def input_normalization(self) -> str | None:
        """Of the network, as its trainer has built it; None for nnU-Net's own."""
        found = get_input_normalization(self.bare_network)
        return None if found is None else found.kind

    def _fit_loaded_model(self) -> None:
        """Change what was loaded from a folder into what predicts; here nothing."""

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
    ) -> list[Any]:
        """nnU-Net's method with its parameters; 0 processes do the work in this one.

        A case that cannot be predicted is left out and named in the error that ends the call, after all others.

        Raises:
            InputImageError: before anything starts, what is missing; at the end, the cases that were left out.
            OutputError: a file cannot be written; nothing half-written is left under a final name.
        """
        arguments = {name: value for name, value in dict(locals()).items() if name != "self"}
        cases = list_of_lists_or_source_folder
        if isinstance(cases, str):
            cases = checks.find_cases(cases, self.dataset_json["file_ending"])
        output = output_folder_or_list_of_truncated_output_files
        self._check(cases, folder_with_segs_from_prev_stage)
        if output is not None:
            checks.check_output_folder(_folder_of(output))
            self._write_what_ensembling_reads(Path(_folder_of(output)), arguments)
        inputs, outputs, previous = self._manage_input_and_output_lists(
            cases, output, folder_with_segs_from_prev_stage, overwrite, part_id, num_parts, save_probabilities
        )
        if isinstance(output, str) and not overwrite:
            self._remove_what_is_left(cases, output)
        if not inputs:
            return []
        part = f"_part_{part_id}" if num_parts > 1 else ""
        with self._statistics_settled(cases, inputs, folder_with_segs_from_prev_stage, num_processes_preprocessing):
            iterator = self._internal_get_data_iterator_from_lists_of_filenames(
                inputs, previous, outputs, num_processes_preprocessing
            )
            with self._recording(output, part, overwrite=overwrite), self._continuing(resume=not overwrite):
                return self.predict_from_data_iterator(iterator, save_probabilities, num_processes_segmentation_export)

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
    ) -> list[Any]:
        """``predict_from_files`` without further processes."""
        return self.predict_from_files(
            list_of_lists_or_source_folder,
            output_folder_or_list_of_truncated_output_files,
            save_probabilities,
            overwrite,
            0,
            0,
            folder_with_segs_from_prev_stage,
        )

    def _internal_get_data_iterator_from_lists_of_filenames(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str | None] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> PreprocessedCases | PreprocessedGroups:
        return self._preprocessed(
            input_list_of_lists, seg_from_prev_stage_files, output_filenames_truncated, num_processes
        )

    def _preprocessed(
        self,
        input_list_of_lists: list[list[str]],
        seg_from_prev_stage_files: list[str | None] | None,
        output_filenames_truncated: list[str] | None,
        num_processes: int,
    ) -> PreprocessedCases:
        nothing: list[None] = [None] * len(input_list_of_lists)
        cases = zip(
            input_list_of_lists,
            seg_from_prev_stage_files or nothing,
            output_filenames_truncated or nothing,
            strict=True,
        )
        return PreprocessedCases(self.preprocessing, list(cases), num_processes)

    @property
    def preprocessing(self) -> Preprocessing:
        """What every case goes through before the network."""
        return Preprocessing(
            self.plans_manager,
            self.configuration_manager,
            self.dataset_json,
            self.verbose_preprocessing,
            self.input_normalization,
        )

    @contextmanager
    def _statistics_settled(
        self,
        cases: list[list[str]],
        inputs: list[list[str]],
        previous_stage_folder: str | None,
        num_processes: int,
    ) -> Iterator[None]:
        """Inside, there are the statistics that normalize ``inputs``, some of ``cases``: here those of the model."""
        del cases, inputs, previous_stage_folder, num_processes
        yield

    def _check(self, cases: list[list[str]], previous_stage_folder: str | None) -> None:
        ending = self.dataset_json["file_ending"]
        checks.check_channels(cases, self.dataset_json, self.plans_manager.image_reader_writer_class())
        checks.check_previous_stage(
            previous_stage_folder, self.configuration_manager.previous_stage_name, cases, ending
        )

    def _write_what_ensembling_reads(self, folder: Path, arguments: dict[str, Any]) -> None:
        """The files that nnU-Net leaves beside its predictions, for postprocessing and ensembling."""
        recursive_fix_for_json_export(arguments)
        write_json(folder / "predict_from_raw_data_args.json", arguments)
        write_json(folder / "dataset.json", self.dataset_json)
        write_json(folder / "plans.json", self.plans_manager.plans)

    def _remove_what_is_left(self, cases: list[list[str]], output: str) -> None:
        """Remove the work folders of cases that are finished, whose process was killed before it could."""
        ending = self.dataset_json["file_ending"]
        targets = [os.path.join(output, checks.case_name(case, ending)) for case in cases]
        remove_finished(self.work_parent or output, [path for path in targets if os.path.isfile(path + ending)])

    @contextmanager
    def _continuing(self, *, resume: bool) -> Iterator[None]:
        """Inside, cases are continued where a killed process left them, if that is wanted."""
        self.resume = resume
        try:
            yield
        finally:
            self.resume = False

    @contextmanager
    def _recording(self, output: str | list[str] | None, part: str, *, overwrite: bool) -> Iterator[None]:
        """Tell inside how each case was predicted, in a file of this part's own; a continued one keeps what it tells."""
        if output is not None:
            self.record_file = Path(_folder_of(output), f"{RECORD}{part}.json")
            if overwrite:
                self.record_file.unlink(missing_ok=True)
        try:
            yield
        finally:
            self.record_file = None


def _folder_of(output: str | list[str]) -> str:
    """The output folder, which is named itself or is that of the first file."""
    return output if isinstance(output, str) else os.path.dirname(output[0]) or os.curdir
