"""The commands of ``amos.py``: ``nnunet-norm sweep run`` and ``report``, ``ensemble --find``, and what they found."""

import json
import os
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nnunet_norm.demo.process import run_logged
from nnunet_norm.ensembling.instructions import RESULTS
from nnunet_norm.evaluation import Options
from nnunet_norm.sweep.outcomes import Collection
from nnunet_norm.sweep.points import STOCK_LOSS
from nnunet_norm.writing import written_beside

QUIET = ("--disable_progress_bar",)


def levels(values: Mapping[str, Any]) -> dict[str, str]:
    """Norm, loss and setting of a point; the grid has None for nnU-Net's own loss."""
    return {axis: values[axis] or STOCK_LOSS for axis in ("norm", "loss", "setting")}


@dataclass(frozen=True)
class Found:
    """A sweep that was measured.

    Attributes:
        sweep: with all outcomes.
        ensemble: what ``ensemble --find`` wrote; None before all trainings are done.
    """

    sweep: Collection
    ensemble: dict[str, Any] | None


@dataclass(frozen=True)
class Sweep:
    """Where grids lie, and how they are measured.

    Attributes:
        work: folder of grids and of the log.
        tolerance: of the surface Dice, in mm.
    """

    work: Path
    tolerance: float

    def call(self, *arguments: str) -> None:
        """``nnunet-norm``, with this process's variables; what it says of runs is shown, all of it is in the log."""
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
        run_logged(("nnunet-norm", *arguments), self.work / "amos.log", environment, self._show)

    @staticmethod
    def _show(line: str) -> None:
        if re.match(r"done:|failed:|\d+ runs? |amos_", line):
            print(line, flush=True)

    def write(self, grid: Mapping[str, Any]) -> Path:
        """The grid as a file."""
        path = self.work / f"{grid['name']}.yaml"
        with written_beside(path) as beside:
            beside.write_text(yaml.safe_dump(dict(grid), sort_keys=False), encoding="utf-8")
        return path

    def measure(self, file: Path, candidates: int) -> Found:
        """Report on what is trained, and search for the best pair of ``candidates`` models if all is trained."""
        from nnunet_norm.sweep.collecting import collect  # reads nnU-Net's variables
        from nnunet_norm.sweep.grid import load_grid

        tolerance = ("--tolerance", str(self.tolerance))
        self.call("sweep", "report", str(file), *tolerance, *QUIET)
        grid = load_grid(str(file))
        found = collect(grid, Options(self.tolerance), progress=False)  # from the report's measurements
        complete = all(outcome.missing is None for outcome in found.outcomes)
        if not (candidates and complete and len(grid.points) > 1):
            return Found(found, None)
        chosen = ("--candidates", str(min(candidates, len(grid.points))))
        self.call("ensemble", "--find", "--sweep", str(file), *chosen, *tolerance, *QUIET)
        return Found(found, json.loads((grid.folder / RESULTS).read_text(encoding="utf-8")))
