"""Real images and the real programs, run as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import one_node_slurm
from programs import Programs, is_program

DATA = Path(os.environ.get("NNUNET_NORM_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def images(name):
    """The folder of one of the data sets; skips where it is not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} in {DATA}; set NNUNET_NORM_DATA")
    return DATA / name


HIPPOCAMPUS = {"background": 0, "Anterior": 1, "Posterior": 2}

LIGHT = ("trainers-dir",)
"""Verbs that import nothing heavy."""


class Workspace:
    """nnU-Net's three folders, and its programs with them."""

    begun = set()  # programs that have run once in this session

    def __init__(self, root):
        self.root = root
        self.forked = None
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        self.env |= {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
        self.env |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "PYTHONUNBUFFERED": "1"}
        self.env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + self.env["PATH"]
        self.env["nnUNet_extTrainer"] = self.run("nnunet-norm", "trainers-dir").stdout.strip()

    def run(self, *command, fails=False, **variables):
        """Run a program to its end; its output, or a failure of the test that shows it."""
        done = self._run([str(c) for c in command], variables)
        if (done.returncode != 0) != fails:
            pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done

    def _run(self, command, variables):
        """The first run of a program (or verb of nnunet-norm) is its script's, from the first import; later ones fork."""
        program = tuple(command[: 2 if command[0] == "nnunet-norm" else 1])
        again, same = program in self.begun, variables.keys() <= {"nnUNet_n_proc_DA"}  # read when augmentation begins
        self.begun.add(program)
        if not (again and same and is_program(command[0])) or program[-1] in LIGHT:
            return subprocess.run(command, env=self.env | variables, cwd=self.root, capture_output=True, text=True)
        if self.forked is None or self.forked.env != self.env:
            self.end()
            self.forked = Programs(self.env, self.root)
        return self.forked.run(command, variables)

    def end(self):
        """End what programs are forked from."""
        if self.forked is not None:
            self.forked.end()

    def train(self, dataset, configuration, fold, trainer, plans, *options):
        # Without workers the augmentation runs in the training process: nothing to start, and seeds that repeat.
        return self.run(
            *("nnUNetv2_train", dataset, configuration, fold, "-tr", trainer, "-p", plans, "-device", "cpu", *options),
            nnUNet_n_proc_DA="0",
        )

    def killed_while_training(self, line, *command):
        """Start a program, wait for a line of its output, and kill it without warning."""
        process = subprocess.Popen(
            [str(c) for c in command],
            env=self.env | {"nnUNet_n_proc_DA": "0"},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        output = []
        limit = threading.Timer(
            300, os.killpg, (process.pid, signal.SIGKILL)
        )  # a silent hang would block the loop below
        limit.start()
        for text in process.stdout:
            output.append(text)
            if line in text:
                break
        limit.cancel()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert line in output[-1], "".join(output)

    def model(self, dataset, trainer, plans, configuration):
        return self.root / "results" / dataset / f"{trainer}__{plans}__{configuration}"

    def add_dataset(self, name, channels, labels, file_ending, cases, test=()):
        """Copy cases ``(name, image, labels)`` and test images ``(name, image)`` into nnU-Net's raw format."""
        folder = self.root / "raw" / name
        for sub in ("imagesTr", "labelsTr", "imagesTs"):
            (folder / sub).mkdir(parents=True)
        for case, image, segmentation in cases:
            shutil.copy(image, folder / "imagesTr" / f"{case}_0000{file_ending}")
            if callable(segmentation):
                segmentation(folder / "labelsTr" / f"{case}{file_ending}")
            else:
                shutil.copy(segmentation, folder / "labelsTr" / f"{case}{file_ending}")
        for case, image in test:
            shutil.copy(image, folder / "imagesTs" / f"{case}_0000{file_ending}")
        description = {
            "channel_names": channels,
            "labels": labels,
            "numTraining": len(cases),
            "file_ending": file_ending,
        }
        (folder / "dataset.json").write_text(json.dumps(description))
        return folder

    def add_hippocampus(self, name, training, test=0):
        """The first hippocampus MRI as a dataset; its cases ``(name, image, labels)``. Skips where there are none."""
        source = images("hippocampus_msd04")
        files = sorted(path.name for path in (source / "images").glob("*.nii.gz"))[: training + test]
        cases = [(file.removesuffix(".nii.gz"), source / "images" / file, source / "labels" / file) for file in files]
        tested = [case[:2] for case in cases[training:]]
        self.add_dataset(name, {"0": "MRI"}, HIPPOCAMPUS, ".nii.gz", cases[:training], tested)
        return cases


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    space = Workspace(tmp_path_factory.mktemp("nnunet"))
    yield space
    space.end()


@pytest.fixture(scope="module")
def real_images():
    return images


@pytest.fixture(scope="module")
def slurm(request, tmp_path_factory):
    """A real SLURM of one node, with as many cores as the module's CPUS says, 2 if it says nothing; SLURM_CONF names it."""
    one_node_slurm.require()
    with one_node_slurm.running(tmp_path_factory.mktemp("slurm"), getattr(request.module, "CPUS", 2)) as folder:
        yield folder
