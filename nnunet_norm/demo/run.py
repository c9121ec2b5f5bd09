"""The whole demo: the steps, then the table and the figure."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from nnunet_norm.demo import data, figure, table, tilings
from nnunet_norm.demo.steps import SLICE, TEST_CASE, Step, run_steps, segmentation, steps, tilings_file
from nnunet_norm.demo.workspace import TRAINERS, DemoSettings, Workspace
from nnunet_norm.errors import SetupError
from nnunet_norm.settings import LARGEST_SEED


def run_demo(folder: Path, *, epochs: int, seed: int) -> None:
    """Run what is not done yet in ``folder`` and print the table.

    Raises:
        NnunetNormError: a value out of range, a missing package, a folder that cannot be used, a program that failed.
    """
    if epochs < 1:
        raise SetupError(f"--epochs {epochs}: a training needs at least 1")
    if not 0 <= seed <= LARGEST_SEED:
        raise SetupError(f"--seed {seed}: it must be from 0 to {LARGEST_SEED}")
    space = Workspace(folder.absolute(), DemoSettings(epochs=epochs, seed=seed))
    space.prepare()
    with space.locked() as lock:
        print(
            f"Everything stays in {space.folder}; what the programs say, in {space.logs}.\n{data.SIMULATED}", flush=True
        )
        run_steps(
            [
                *steps(space, lock),
                Step("write the table", space.table.exists, lambda: make_table(space)),
                Step("draw the figure", space.figure.exists, lambda: make_figure(space)),
            ]
        )
    print(f"\n{table.table_of(space.table)}\n\n{table.notes()}\n{table.EXPLANATION}\n")
    print(f"table:  {space.table}\nfigure: {space.figure}")


def reference(space: Workspace) -> Path:
    """The labels of the test case."""
    return space.raw / "labelsTs" / f"{TEST_CASE}.nii.gz"


def make_table(space: Workspace) -> None:
    """Gather what the steps have left and write the table."""
    rows = []
    for norm in TRAINERS:
        with np.load(tilings_file(space, norm)) as found:
            numbers = json.loads(str(found["numbers"]))
        dices = {way: table.dice_per_tissue(segmentation(space, norm, way), reference(space)) for way in numbers}
        rows += table.rows_of(norm, numbers, dices, space.fold(norm) / "validation" / "norm_report.json")
    table.write_table(rows, space.table)


def make_figure(space: Workspace) -> None:
    """Draw the test slice in both tilings of both norms."""
    maps, verdicts = {}, {}
    for norm in TRAINERS:
        with np.load(tilings_file(space, norm)) as found:
            maps[norm], image = found[tilings.HALO], found["image"]
            verdicts[norm] = json.loads(str(found["numbers"]))[tilings.HALO]["verdict"]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(reference(space))))[SLICE]
    figure.save(figure.draw(figure.Picture(image, labels, maps, verdicts)), space.figure)
