"""The demo's steps, each with a sign on disk that it is done, so that a second run goes on where the first ended."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from nnunet_norm.demo import data, tilings
from nnunet_norm.demo.process import run_logged
from nnunet_norm.demo.workspace import CONFIGURATION, DATASET, PLANS, TRAINERS, Workspace
from nnunet_norm.errors import NnunetNormError, OutputError
from nnunet_norm.planning import derive_plans, load_plans, save_plans
from nnunet_norm.writing import is_whole_checkpoint

DATASET_ID = str(int(DATASET[7:10]))

ITERATIONS = 100
"""Optimizer steps per epoch; nnU-Net's 250 would not fit into minutes on a CPU."""

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")

TEST_CASE = next(f"brain_z{slab.start:03d}_0" for slab in data.SLABS if slab.role == "test")

SLICE = 4
"""The slice of the test slab that the figure shows: lateral ventricles, basal ganglia and cortex together."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        title: what the user reads.
        done: whether its result is there, whole.
        run: makes the result.
    """

    title: str
    done: Callable[[], bool]
    run: Callable[[], None]


def steps(space: Workspace, lock: int | None = None) -> list[Step]:
    """All steps up to the predictions and tilings, in their order."""
    programs = Programs(space, lock)
    result = [
        Step("cut cases from the ICBM152 template", (space.raw / "dataset.json").exists, partial(make_dataset, space)),
        Step("plan and preprocess (nnUNetv2_plan_and_preprocess)", space.preprocessed.exists, programs.preprocess),
        Step("derive small plans", (space.preprocessed / f"{PLANS}.json").exists, partial(make_plans, space)),
    ]
    for norm in TRAINERS:
        title = f"train {norm} (nnUNetv2_train -tr {space.trainer(norm)})"
        result.append(Step(title, partial(is_trained, space.fold(norm)), partial(programs.train, norm)))
    for norm in TRAINERS:
        for way, program in ((tilings.GAUSSIAN, "nnUNetv2_predict"), (tilings.HALO, "nnunet-norm predict")):
            title = f"predict with {norm}, {way} ({program})"
            result.append(Step(title, segmentation(space, norm, way).exists, partial(programs.predict, norm, way)))
    for norm in TRAINERS:
        title = f"compare two tilings with {norm}"
        result.append(Step(title, tilings_file(space, norm).exists, partial(programs.compare_tilings, norm)))
    return result


def run_steps(todo: Sequence[Step]) -> None:
    """Run what is not done yet, and say what is going on.

    Raises:
        NnunetNormError: a step failed, or ended without its result.
    """
    for number, step in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {step.title}"
        if step.done():
            print(f"{head}: done before", flush=True)
            continue
        print(head, flush=True)
        start = time.monotonic()
        try:
            step.run()
        except OSError as error:
            raise OutputError(f"step {step.title!r} could not write its result: {error}") from error
        if not step.done():
            raise NnunetNormError(f"step {step.title!r} ended without its result: see the logs beside the results")
        print(f"      {time.monotonic() - start:.0f} s", flush=True)


def make_dataset(space: Workspace) -> None:
    """Write the raw dataset."""
    template, labels = data.load_template()
    data.write_dataset(data.cut_cases(template, labels, space.settings.seed), space.raw)


def make_plans(space: Workspace) -> None:
    """Derive plans that two cores train in minutes: 3 stages, 8 features, a patch of one tile."""
    plans = derive_plans(
        load_plans(space.preprocessed, "nnUNetPlans"),
        CONFIGURATION,
        plans_name=PLANS,
        batch_size=12,
        patch_size=(tilings.TILE_SIZE, tilings.TILE_SIZE),
        num_stages=3,
        base_features=8,
        iterations_per_epoch=ITERATIONS,
        val_iterations_per_epoch=5,
        seed=space.settings.seed,
    )
    save_plans(plans, space.preprocessed)


def is_trained(fold: Path) -> bool:
    """Whether the final checkpoint is whole and the final validation has written its results."""
    return (
        is_whole_checkpoint(fold / "checkpoint_final.pth")
        and (fold / "validation" / "summary.json").exists()
        and (fold / "validation" / "norm_report.json").exists()
    )


def continue_flag(fold: Path) -> list[str]:
    """What ``nnUNetv2_train`` must be told to go on: nothing, ``--c``, or ``--val`` if only the validation is missing.

    A checkpoint that an interruption left half-written is deleted, so that nnU-Net takes the next one that it knows.
    """
    whole = []
    for name in CHECKPOINTS:
        if is_whole_checkpoint(fold / name):
            whole.append(name)
        else:
            (fold / name).unlink(missing_ok=True)
    if not whole:
        return []
    return ["--val"] if whole[0] == "checkpoint_final.pth" else ["--c"]


def segmentation(space: Workspace, norm: str, way: str) -> Path:
    """The predicted labels of the test case."""
    return space.folder / "predictions" / f"{norm}_{_file_name(way)}" / f"{TEST_CASE}.nii.gz"


def tilings_file(space: Workspace, norm: str) -> Path:
    """The numbers and maps of :func:`nnunet_norm.demo.tilings.measure`."""
    return space.folder / "tilings" / f"{norm}.npz"


def _file_name(words: str) -> str:
    return words.lower().replace(" ", "_")


@dataclass(frozen=True)
class Programs:
    """The subprocesses of the demo.

    Attributes:
        space: where everything is.
        lock: descriptor of the folder's lock, inherited by the programs.
    """

    space: Workspace
    lock: int | None = None

    def _run(
        self, name: str, command: Sequence[str], on_line: Callable[[str], None] = lambda line: None, **changes: str
    ) -> None:
        run_logged(command, self.space.logs / f"{name}.log", self.space.environment(**changes), on_line, self.lock)

    def preprocess(self) -> None:
        """Plan and preprocess into a folder beside the final one.

        The planner hands ``nnUNet_n_proc_DA`` to torch as a number of threads, where 0 is not allowed.
        """
        beside = self.space.folder / ".partial_preprocessed"
        shutil.rmtree(beside, ignore_errors=True)
        self.space.preprocessed.parent.mkdir(exist_ok=True)
        command = ["nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", CONFIGURATION, "-npfp", "1", "-np", "1"]
        self._run("preprocess", command, nnUNet_preprocessed=str(beside), nnUNet_n_proc_DA="1")
        os.replace(beside / DATASET, self.space.preprocessed)
        shutil.rmtree(beside)

    def train(self, norm: str) -> None:
        """Train fold 0, or go on with it, with a progress bar of epochs."""
        fold = self.space.fold(norm)
        command = ["nnUNetv2_train", DATASET_ID, CONFIGURATION, "0", "-tr", self.space.trainer(norm), "-p", PLANS]
        with tqdm(total=self.space.settings.epochs, unit="epoch", desc=f"      {norm}", leave=False) as bar:

            def on_line(line: str) -> None:
                started = re.search(r": Epoch (\d+)\s*$", line)
                if started:
                    bar.update(int(started[1]) - bar.n)
                elif "Epoch time" in line:
                    bar.update(1)
                elif "Pseudo dice" in line:
                    dices = re.findall(r"\(([^)]+)\)", line)
                    bar.set_postfix_str("Dice " + ", ".join(f"{float(value):.2f}" for value in dices))
                elif ": predicting " in line:
                    bar.set_postfix_str("final validation")

            self._run(f"train_{norm}", [*command, *continue_flag(fold), "-device", "cpu"], on_line)

    def predict(self, norm: str, way: str) -> None:
        """Predict the test case into a folder beside the final one."""
        final = segmentation(self.space, norm, way).parent
        beside = final.with_name(f".partial_{final.name}")
        shutil.rmtree(beside, ignore_errors=True)
        program = ["nnUNetv2_predict"]
        options: list[str] = []
        if way == tilings.HALO:
            program = ["nnunet-norm", "predict"]
            size = str(tilings.TILE_SIZE)
            options = ["--tile-size", size, size, "--halo", str(tilings.HALO_SIZE)]
            if norm == "InstanceNorm":  # which has no statistics of its own: here those of each tile, as in nnU-Net
                options += ["--population", "tile"]
        images = self.space.raw / "imagesTs"
        where = ["-i", str(images), "-o", str(beside), "-d", DATASET_ID, "-c", CONFIGURATION, "-f", "0"]
        model = [
            "-tr",
            self.space.trainer(norm),
            "-p",
            PLANS,
            "--disable_tta",
            "-device",
            "cpu",
            "-npp",
            "1",
            "-nps",
            "1",
        ]
        self._run(f"predict_{final.name}", [*program, *where, *model, *options])
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)

    def compare_tilings(self, norm: str) -> None:
        """Run :mod:`nnunet_norm.demo.tilings`."""
        output = tilings_file(self.space, norm)
        output.parent.mkdir(exist_ok=True)
        image = self.space.raw / "imagesTs" / f"{TEST_CASE}_0000.nii.gz"
        model = self.space.fold(norm).parent
        arguments = ["--model", str(model), "--image", str(image), "--output", str(output), "--z", str(SLICE)]
        # -P: started in a checkout, as the README does, it would import the checkout's folder and not what is installed.
        self._run(f"tilings_{norm}", [sys.executable, "-P", "-m", "nnunet_norm.demo.tilings", *arguments])
