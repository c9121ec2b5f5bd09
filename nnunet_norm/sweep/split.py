"""The split of the cross-validation, before several trainings want it at once."""

from __future__ import annotations

from types import SimpleNamespace

from nnunet_norm.planning import resolve_configuration
from nnunet_norm.sweep.grid import Grid


def write_split(grid: Grid) -> None:
    """Have nnU-Net write ``splits_final.json`` if it is not there, as its first training would.

    Of several that begin together each would write it, and read what another one is writing.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    if set(grid.folds) == {"all"} or (grid.preprocessed / "splits_final.json").is_file():
        return
    cases = resolve_configuration(dict(grid.points[0].plans), grid.configuration)["data_identifier"]
    trainer = SimpleNamespace(
        fold=0,
        dataset_class=None,
        preprocessed_dataset_folder=str(grid.preprocessed / cases),
        preprocessed_dataset_folder_base=str(grid.preprocessed),
        folder_with_segs_from_previous_stage=None,
        print_to_log_file=lambda *_: None,
    )
    nnUNetTrainer.do_split(trainer)
