"""Where the demo keeps everything, what it was asked for, and the environment of the programs that it calls."""

import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nnunet_norm.errors import OutputError, SetupError
from nnunet_norm.writing import write_json

try:
    import fcntl
except ImportError:  # Windows: two demos at once in one folder are then not noticed
    fcntl = None  # type: ignore[assignment]

DATASET = "Dataset001_BrainDemo"
CONFIGURATION = "2d"
PLANS = "demo"

RECIPE = 1
"""Raised whenever data or plans of the demo change, so that results of two versions never meet in one table."""

TRAINERS = {"InstanceNorm": "nnUNetTrainerInstanceNorm", "BatchRenorm": "nnUNetTrainerBRN"}
"""The two norms, as they are called in table and figure, and their trainers."""


@dataclass(frozen=True)
class DemoSettings:
    """What may be chosen about a demo.

    Attributes:
        epochs: length of each training.
        seed: of the simulated acquisitions and of both trainings.
    """

    epochs: int = 6
    seed: int = 0

    def as_dict(self) -> dict[str, int]:
        """For ``demo.json``."""
        return {"recipe": RECIPE, **asdict(self)}


@dataclass(frozen=True)
class Workspace:
    """The demo's folder: nnU-Net's three folders, logs, predictions and the results.

    Attributes:
        folder: absolute path of the output folder.
        settings: what was asked for.
    """

    folder: Path
    settings: DemoSettings

    @property
    def raw(self) -> Path:
        """The raw dataset."""
        return self.folder / "nnUNet_raw" / DATASET

    @property
    def preprocessed(self) -> Path:
        """The preprocessed dataset, with the plans."""
        return self.folder / "nnUNet_preprocessed" / DATASET

    @property
    def logs(self) -> Path:
        """One log per command."""
        return self.folder / "logs"

    @property
    def table(self) -> Path:
        """The table as Markdown."""
        return self.folder / "table.md"

    @property
    def figure(self) -> Path:
        """The figure."""
        return self.folder / "seams.png"

    def trainer(self, norm: str) -> str:
        """Name of the trainer of ``norm`` with the number of epochs."""
        return f"{TRAINERS[norm]}_{self.settings.epochs}epochs"

    def fold(self, norm: str) -> Path:
        """The results folder of fold 0."""
        model = f"{self.trainer(norm)}__{PLANS}__{CONFIGURATION}"
        return self.folder / "nnUNet_results" / DATASET / model / "fold_0"

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of nnU-Net's programs: ours for everything of nnU-Net's, the user's for the rest.

        Data augmentation runs in the training process itself (``nnUNet_n_proc_DA=0``), which makes a seeded training
        repeatable and spares two cores the start of eight workers. Threads of OpenMP that wait must sleep: by default they
        spin, and a second program on two cores then slows small networks down by a factor of ten and more.
        """
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        path = os.pathsep.join([sysconfig.get_path("scripts"), inherited.get("PATH", os.defpath)])
        own = {
            "PATH": path,
            "PYTHONUNBUFFERED": "1",
            "MPLBACKEND": "Agg",
            "OMP_WAIT_POLICY": "PASSIVE",
            "nnUNet_raw": str(self.folder / "nnUNet_raw"),
            "nnUNet_preprocessed": str(self.folder / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.folder / "nnUNet_results"),
            "nnUNet_extTrainer": str(files("nnunet_norm.trainers")),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
        }
        return {**inherited, **own, **changes}

    def prepare(self) -> None:
        """Make the folder, or accept it if it belongs to a demo with the same settings.

        Raises:
            OutputError: the folder cannot be written, holds something else, or a demo with other settings.
        """
        marker = self.folder / "demo.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                if any(self.folder.iterdir()):
                    raise OutputError(
                        f"-o {self.folder} holds other files and no demo: choose an empty or a new folder"
                    )
                write_json(marker, self.settings.as_dict())
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"-o {self.folder} cannot be written: {error.strerror}") from error
        there = read_json(marker)
        if there != self.settings.as_dict():
            raise OutputError(
                f"-o {self.folder} holds a demo with {_words(there)}, and {_words(self.settings.as_dict())} was asked for: "
                "choose another folder with -o"
            )

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """Keep a second demo out while this one, or a program that it left behind, works in the folder.

        Yields:
            The descriptor that holds the lock; a program that inherits it keeps the lock for as long as it runs.

        Raises:
            SetupError: another one is at work.
        """
        if fcntl is None:
            yield None
            return
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SetupError(
                    f"-o {self.folder} is in use by another demo, or by a program that an interrupted one left running: "
                    "wait for it, or end it"
                ) from error
            yield file.fileno()


def _words(settings: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in settings.items()) if isinstance(settings, dict) else "no settings"
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file that the demo or nnU-Net wrote.

    Raises:
        OutputError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise OutputError(f"{path} cannot be read ({error}): delete it, or choose another folder with -o") from error
