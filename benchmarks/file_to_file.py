"""From file to file: peak memory and seconds of nnunet-norm predict beside nnUNetv2_predict, and of volumes on disk.

    python benchmarks/file_to_file.py --out FOLDER [--what nifti zarr large killed] [--sizes 128 192 256] [--classes 16 60]

Every run is the real program, in processes of its own, on the same model (random weights with settled statistics) and the
same image; memory is the anonymous and shared memory of all of them together, sampled twenty times a second.

* nifti: NIfTI to NIfTI, the plans' spacing other than the image's on every axis, growing volumes, 16 and 60 classes.
* zarr: zarr to zarr, volumes of 256 cubed, 512 cubed and 1024 x 512 x 512 voxels, with a fixed --max-memory.
* large: a volume whose logits would not fit into this machine's memory.
* killed: predictions that are killed (kill -9) at twenty random moments and continued, in either execution plan.

FOLDER/file_to_file.json and .md are written after every run; what they tell of other kinds of runs stays. FOLDER also
holds the images while the benchmark runs.
"""

import argparse
import filecmp
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
import zarr
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from prediction import plans as benchmark_plans
from prediction import smooth_image
from reporting import amount, command, machine, parser_of, table, versions

from nnunet_norm.layers import convert_norm
from nnunet_norm.writing import write_json, written_beside

VOLUMES = {"256 cubed": (256, 256, 256), "512 cubed": (512, 512, 512), "1024 x 512 x 512": (1024, 512, 512)}
LARGE = (768, 512, 512)
NOTED = "; ".join(
    [
        "import sys",
        "from nnunet_norm.prediction import journal",
        "journal.NOTE_EVERY = 0.2",
        "from nnunet_norm.cli import main",
        "sys.exit(main())",
    ]
)
"""The program, noting points five times a second: on these small volumes nothing would be noted in thirty."""


def write_model(folder: Path, *, classes: int, width: int, stages: int, spacing: float) -> Path:
    """A model folder of nnU-Net with BatchNorm, its statistics settled on noise."""
    options = argparse.Namespace(ndim=3, stages=stages, width=width, patch=[64, 64, 64])
    architecture = benchmark_plans(options)["configurations"]["benchmark"]["architecture"]
    architecture["arch_kwargs"]["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration: dict[str, Any] = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [64, 64, 64],
        "spacing": [spacing] * 3,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture,
        "batch_dice": False,
    }
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = resampling | {"order": order, "is_seg": what == "seg"}
    plans = {
        "dataset_name": "Dataset901_Benchmark",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
        "configurations": {"3d_fullres": configuration},
    }
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {f"class_{i}": i for i in range(1, classes)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    torch.manual_seed(0)
    arguments = (architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"])
    network = convert_norm(
        get_network_from_plans(*arguments, 1, classes, deep_supervision=False), "batch_norm", momentum=0.5
    )
    with torch.no_grad():
        for seed in range(4):
            network.train()(smooth_image([64, 64, 64], seed)[None])
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def write_volume(path: Path, shape: tuple[int, ...]) -> None:
    """A zarr of 16 bit, smooth within blocks of 128 cubed, written block by block."""
    array = zarr.create_array(str(path), shape=shape, chunks=(64, 64, 64), shards=(128, 128, 128), dtype="int16")
    block = (smooth_image([128, 128, 128], 0)[0].numpy() * 200 + 1000).astype(np.int16)
    for origin in np.ndindex(*(-(-n // 128) for n in shape)):
        array[tuple(slice(128 * o, 128 * o + 128) for o in origin)] = block + 10 * sum(origin)


def memory_of(pid: int) -> int:
    """Anonymous and shared memory of a process and its children, in bytes."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return total
    return total + sum(memory_of(int(child)) for child in children)


def disk_of(folder: Path) -> int:
    """Bytes that a folder takes, hidden files included."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_blocks * 512
            except OSError:
                continue
    return total


def measured(line: list[str], output: Path) -> dict[str, Any]:
    """Run a program; seconds, peak memory and disk, and whether it ended well."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "nnUNet_def_n_proc": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    log = output.with_suffix(".log")
    begin, most, disk = time.monotonic(), 0, 0
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            if int((time.monotonic() - begin) * 20) % 20 == 0:
                disk = max(disk, disk_of(output))
            time.sleep(0.05)
    found = {"seconds": time.monotonic() - begin, "memory": most, "disk": disk, "status": process.returncode}
    if process.returncode:
        found["why"] = log.read_text()[-300:].strip().splitlines()[-1:]
    return found


class Benchmark:
    """All runs, written after each."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        before = args.out / "file_to_file.json"
        kept = json.loads(before.read_text()) if before.is_file() else {"runs": [], "commands": []}
        self.runs = [run for run in kept["runs"] if run["what"] not in args.what]
        self.commands = [*kept["commands"], command("file_to_file.py", sys.argv[1:], ("--out",))]

    def go(self) -> None:
        """Run what was asked for."""
        for what in self.args.what:
            getattr(self, what)()

    def keep(self, run: dict[str, Any]) -> None:
        """Write what there is so far."""
        self.runs.append(run)
        print({key: value for key, value in run.items() if key != "why"}, flush=True)
        content = {"machine": machine("cpu"), "versions": versions(), "runs": self.runs}
        content["commands"] = self.commands
        write_json(
            self.args.out / "file_to_file.json",
            json.loads(json.dumps(content).replace(str(self.work), "FOLDER")),
            indent=2,
        )
        with written_beside(self.args.out / "file_to_file.md") as beside:
            beside.write_text(report(content), encoding="utf-8")

    def line(self, program: str, model: Path, images: Path, output: Path, *more: str) -> list[str]:
        """A command line with the flags that both programs have."""
        folders = ["-m", str(model), "-i", str(images), "-o", str(output)]
        flags = ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_progress_bar", *more]
        return [str(Path(sys.executable).with_name(program)), *folders, *flags]

    def ours(self, model: Path, images: Path, output: Path, *more: str) -> list[str]:
        """The command line of nnunet-norm predict."""
        program, *others = self.line("nnunet-norm", model, images, output, *more)
        return [program, "predict", *others]

    def nifti(self) -> None:
        """nnU-Net's program and ours, on the same image."""
        for classes in self.args.classes:
            model = write_model(self.work / f"model_{classes}", classes=classes, width=16, stages=5, spacing=1.2)
            for size in self.args.sizes:
                images = self.work / f"images_{size}"
                images.mkdir(exist_ok=True)
                image = SimpleITK.GetImageFromArray(smooth_image([size] * 3, 1)[0].numpy())
                SimpleITK.WriteImage(image, str(images / "case_0000.nii.gz"))
                for name in ("nnU-Net", "nnunet-norm", "nnunet-norm, 2 GiB"):
                    output = self.work / f"out_{classes}_{size}_{name.replace(' ', '_')}"
                    if name == "nnU-Net":
                        program = "nnUNetv2_predict_from_modelfolder"
                        line = self.line(program, model, images, output, "--disable_tta")
                    else:
                        limit = ["--max-memory", "2G"] if "GiB" in name else []
                        line = self.ours(model, images, output, "--disable_tta", *limit)
                    run = {"what": "nifti", "name": name, "classes": classes, "shape": [size] * 3}
                    self.keep(run | measured(line, output))
                    shutil.rmtree(output, ignore_errors=True)

    def zarr(self) -> None:
        """Memory that does not grow with the volume."""
        model = write_model(self.work / "model_zarr", classes=16, width=8, stages=4, spacing=1.0)
        for name, shape in VOLUMES.items():
            self.volume(model, name, shape, "zarr", "2G")

    def large(self) -> None:
        """60 classes of single-precision logits that this machine's memory does not hold."""
        model = write_model(self.work / "model_large", classes=60, width=8, stages=4, spacing=1.0)
        self.volume(model, " x ".join(map(str, LARGE)), LARGE, "large", "2G")

    def volume(self, model: Path, name: str, shape: tuple[int, ...], what: str, limit: str) -> None:
        """One volume from zarr to zarr."""
        path, output = self.work / "volumes" / "case.zarr", self.work / "out"
        write_volume(path, shape)
        run = measured(self.ours(model, path, output, "--max-memory", limit), output)
        classes = len(json.loads((model / "dataset.json").read_text())["labels"])
        held = 4 * classes * math.prod(shape)
        self.keep(
            {"what": what, "name": name, "classes": classes, "shape": list(shape), "limit": limit, "logits": held} | run
        )
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(path)

    def killed(self) -> None:
        """Killed at random, continued, and compared with what was not, byte for byte."""
        model = write_model(self.work / "model_killed", classes=16, width=8, stages=4, spacing=1.0)
        path, drawn = self.work / "volumes" / "case.zarr", random.Random(0)
        write_volume(path, (128, 128, 128))
        ways = {"stages": ["--scratch", str(self.work / "scratch")], "tiles": ["--execution", "tiles", "--halo", "16"]}
        for name, more in ways.items():
            whole, output = self.work / f"whole_{name}", self.work / f"killed_{name}"
            straight = measured([sys.executable, "-c", NOTED, *self.ours(model, path, whole, *more)[1:]], whole)
            line = [sys.executable, "-c", NOTED, *self.ours(model, path, output, *more)[1:], "--continue_prediction"]
            kills = 0
            while True:
                process = subprocess.Popen(
                    line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
                )
                try:
                    process.wait(drawn.uniform(0.3, 1.0) * straight["seconds"] if kills < self.args.kills else None)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
                    continue
                if kills < self.args.kills:  # it was finished before it was killed often enough: once more
                    shutil.rmtree(output)
                    continue
                same = filecmp.dircmp(whole / "case.zarr", output / "case.zarr")
                run = {
                    "what": "killed",
                    "name": name,
                    "kills": kills,
                    "status": process.returncode,
                    "same": equal(same),
                }
                self.keep(run | {"classes": 16, "shape": [128] * 3, "seconds": straight["seconds"], "memory": 0})
                break


def equal(compared: "filecmp.dircmp[str]") -> bool:
    """Whether two folders hold the same files, byte for byte."""
    if compared.left_only or compared.right_only or compared.funny_files:
        return False
    _, differ, errors = filecmp.cmpfiles(compared.left, compared.right, compared.common_files, shallow=False)
    return not differ and not errors and all(equal(part) for part in compared.subdirs.values())


def report(content: dict[str, Any]) -> str:
    """The tables."""
    found, cpu = content["machine"], content["machine"]["cpu"]
    parts = [
        "# From file to file",
        f"`{'`, `'.join(content['commands'])}` on {found['cores']} cores of {cpu}, {amount(found['memory'])}.",
        "Memory is the most that all processes of the program had at a time, anonymous and shared; files that are mapped are "
        "not in it.",
    ]
    rows = [["classes", "image", "program", "seconds", "memory", "of nnU-Net's"]]
    for run in (run for run in content["runs"] if run["what"] == "nifti"):
        same = ("classes", "shape", "what")
        peer = next(r for r in content["runs"] if r["name"] == "nnU-Net" and all(r[key] == run[key] for key in same))
        ratio = (
            f"{run['seconds'] / peer['seconds']:.2f} of the time, {run['memory'] / peer['memory']:.2f} of the memory"
        )
        failed = "" if run["status"] == 0 else f" (ended with status {run['status']})"
        shape = " x ".join(map(str, run["shape"]))
        rows.append(
            [str(run["classes"]), shape, run["name"], f"{run['seconds']:.0f}{failed}", amount(run["memory"]), ratio]
        )
    if len(rows) > 1:
        parts += ["## NIfTI to NIfTI, resampled on every axis", table(rows)]
    rows = [["volume", "classes", "logits would take", "--max-memory", "memory", "disk", "seconds"]]
    for run in (run for run in content["runs"] if run["what"] in ("zarr", "large")):
        failed = "" if run["status"] == 0 else f" (ended with status {run['status']})"
        rows.append(
            [
                run["name"],
                str(run["classes"]),
                amount(run["logits"]),
                run["limit"],
                amount(run["memory"]),
                amount(run["disk"]),
                f"{run['seconds']:.0f}{failed}",
            ]
        )
    if len(rows) > 1:
        parts += ["## Zarr to zarr", table(rows)]
    rows = [["execution", "killed", "status at the end", "same bytes as without"]]
    for run in (run for run in content["runs"] if run["what"] == "killed"):
        rows.append([run["name"], f"{run['kills']} times", str(run["status"]), "yes" if run["same"] else "NO"])
    if len(rows) > 1:
        parts += ["## Killed with kill -9 at random moments, and continued", table(rows)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--what", nargs="+", choices=("nifti", "zarr", "large", "killed"), default=["nifti", "zarr", "large", "killed"]
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 192, 256])
    parser.add_argument("--classes", type=int, nargs="+", default=[16, 60])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".file_to_file_") as work:
        Benchmark(args, Path(work)).go()


if __name__ == "__main__":
    main()
