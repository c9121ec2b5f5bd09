import json
import os
import re
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_models import visible, write_model

from nnunet_norm.cli import main
from nnunet_norm.errors import ModelFolderError
from nnunet_norm.prediction import HaloPredictor
from nnunet_norm.prediction.model_writing import configuration_of
from nnunet_norm.prediction.model_writing import write_model as write_changed_model
from nnunet_norm.prediction.recalibration import Recalibration
from nnunet_norm.prediction.safe_loading import load_checkpoint, restricted_loading
from nnunet_norm.prediction.stock_model import stock_export
from nnunet_norm.training.pretrained import export_pretrained

CHECKPOINT = "checkpoint_final.pth"


class Calls:
    """Pickled as a call of a function, which is how a checkpoint runs code."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def load(folder, **options):
    made = HaloPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)
    made.initialize_from_trained_model_folder(str(folder), None)
    return made


def hostile(folder, trace):
    """A model that predicts as any other, and touches a file when its checkpoint is read."""
    write_model(folder)
    path = folder / "fold_0" / CHECKPOINT
    torch.save(torch.load(path) | {"logging": Calls(os.system, f"touch {trace}")}, path)
    return folder


READERS = {
    "predict": lambda folder, out, trust: load(folder, trust_checkpoint=trust),
    "recalibrate": lambda folder, out, trust: Recalibration(
        folder, device=torch.device("cpu"), progress=False, trust_checkpoint=trust
    ),
    "export": lambda folder, out, trust: stock_export(folder, trust_checkpoint=trust),
    "export --pretrained": lambda folder, out, trust: export_pretrained(
        folder, 0, CHECKPOINT, out / "weights.pth", trust_checkpoint=trust
    ),
    "configuration": lambda folder, out, trust: configuration_of(folder, 0, CHECKPOINT, trust_checkpoint=trust),
    "writing": lambda folder, out, trust: write_changed_model(
        folder, out / "written", folds=[0], trust_checkpoint=trust
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_that_would_run_code_is_refused_and_has_not_run_it(tmp_path, reader):
    """On every way to read a model; the same file does run its code for those who trust it."""
    trace, out = tmp_path / "it_ran", tmp_path / "out"
    out.mkdir()
    folder = hostile(tmp_path / "model", trace)
    expected = r"^checkpoint '.*fold_0/checkpoint_final.pth' would call posix.system when .* --trust-checkpoint$"
    with pytest.raises(ModelFolderError, match=expected):
        READERS[reader](folder, out, False)
    assert not trace.exists()
    assert visible(out) == []
    with pytest.raises(ModelFolderError, match="stock nnU-Net as it is") if reader == "export" else nullcontext():
        READERS[reader](folder, out, True)
    assert trace.exists()


@pytest.mark.parametrize("command", ["predict", "recalibrate", "export"])
def test_the_commands_refuse_in_one_line_and_have_the_flag(tmp_path, capsys, command):
    """Exit status and message, nothing run; with the flag the checkpoint is read."""
    trace = tmp_path / "it_ran"
    folder = hostile(tmp_path / "model", trace)
    (tmp_path / "images").mkdir()
    flags = {
        "predict": ["-i", tmp_path / "images", "-o", tmp_path / "out", "-f", "0", "-device", "cpu"],
        "recalibrate": ["-i", tmp_path / "images", "-o", tmp_path / "out", "-device", "cpu"],
        "export": ["-o", tmp_path / "out"],
    }[command]
    call = [command, "-m", folder, *flags]
    assert main([str(word) for word in call]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet-norm ")]
    assert re.search(r"would call posix.system when .* --trust-checkpoint$", line)
    assert not trace.exists()
    main([str(word) for word in (*call, "--trust-checkpoint")])
    assert trace.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: Calls(eval, "1 + 1"), "would call eval"),
        (lambda: Calls(getattr, 1.0, "hex"), "would call getattr"),
        (lambda: np.ones(3), r"would call numpy\._core\.multiarray\._reconstruct|would call numpy\.core"),
        (lambda: np.dtype("O"), "numpy.dtype 'O8' is not that of a number"),
        (
            lambda: Calls(np.float64(1).__reduce__()[0], np.dtype("f8"), b"123"),
            "a number of 3 bytes, and float64 has 8",
        ),
    ],
)
def test_nothing_but_tensors_and_plain_values_is_read(tmp_path, content, expected):
    """Neither builtins, nor arrays and types of numpy that are no numbers, nor numbers of a wrong length."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"network_weights": content()}, path)
    with pytest.raises(ModelFolderError, match=expected):
        load_checkpoint(path)


@pytest.mark.parametrize("place", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_what_nnunet_logs_is_read_as_it_was_written(tmp_path, place):
    """numpy's numbers of every kind, under the names that numpy 1 and numpy 2 give them; types and values are kept."""
    numbers = [np.float64(0.1), np.float32(-3), np.int64(2**40), np.bool_(True), np.uint8(7), np.array(1.5, ">f8")[()]]
    content = {"logging": {"mean_fg_dice": numbers}, "_best_ema": np.float64("nan"), "state": torch.arange(3)}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    renamed = tmp_path / "renamed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
                data = data.replace(b"c" + written + b"\n", b"c" + place.encode() + b"\n")
            new.writestr(name, data)
    read = load_checkpoint(renamed)
    assert read["logging"]["mean_fg_dice"] == numbers
    assert np.isnan(read["_best_ema"])
    assert [type(number) for number in read["logging"]["mean_fg_dice"]] == [type(number) for number in numbers]
    assert torch.equal(read["state"], content["state"])


def test_a_damaged_checkpoint_says_so_and_not_that_it_runs_code(tmp_path):
    """Bytes at its beginning are lost, as on a bad disk; the index at the end is whole."""
    folder = write_model(tmp_path / "model")
    path = folder / "fold_0" / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[:30] = b"\0" * 30
    path.write_bytes(data)
    with pytest.raises(ModelFolderError, match=r"checkpoint '.*checkpoint_final.pth' is not whole: copy it again"):
        load(folder)


@pytest.mark.parametrize("key", ["nonlin", "network_class_name"])
def test_plans_that_would_call_something_else_than_layers_are_refused(tmp_path, key):
    """nnU-Net calls what the plans name with the plans' arguments, so plans could start a program."""
    trace = tmp_path / "it_ran"
    folder = write_model(tmp_path / "model")
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    if key == "nonlin":
        architecture["arch_kwargs"] |= {"nonlin": "subprocess.Popen", "nonlin_kwargs": {"args": ["touch", str(trace)]}}
    else:
        architecture["network_class_name"] = "subprocess.Popen"
    (folder / "plans.json").write_text(json.dumps(plans))
    expected = rf"plans.json' names subprocess.Popen as {key}, which is no class of layers .* --trust-checkpoint"
    for read in (load, lambda model: export_pretrained(model, 0, CHECKPOINT, tmp_path / "weights.pth")):
        with pytest.raises(ModelFolderError, match=expected):
            read(folder)
    assert not trace.exists()


def test_loading_is_as_before_afterwards(tmp_path):
    """``torch.load`` and torch's list of what is safe are restored, after an error too, and while nothing is restricted."""
    before, safe = torch.load, set(torch.serialization.get_safe_globals())
    with restricted_loading(trust=True):
        assert torch.load is before
    with restricted_loading():
        assert torch.load is not before
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pth")
    assert torch.load is before
    assert set(torch.serialization.get_safe_globals()) == safe
