"""Several processes train hippocampus through final validation: as two machines, one of them killed; and what they refuse."""

import json
import socket
import subprocess

import pytest
import torch

pytestmark = pytest.mark.integration

NAME, PLANS, CASES, LIMIT = "Dataset004_Hippocampus", "processes", 6, 300

PROBE = '''
"""BatchRenorm for three epochs; the second process is killed in the middle of the second one, once."""

import os
import signal
from pathlib import Path

import torch

from nnunet_norm.training import NormTrainer


class nnUNetTrainerProbe(NormTrainer):
    norm, epochs = "batch_renorm", 3

    def train_step(self, batch):
        mark = Path(self.output_folder) / "killed"
        if (self.local_rank, self.current_epoch, self._step_of_epoch) == (1, 1, 1) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch)

    def on_train_end(self):
        super().on_train_end()
        torch.save(self.bare_network.state_dict(), Path(self.output_folder) / f"weights_of_{self.local_rank}.pt")
'''


@pytest.fixture(scope="module")
def hippocampus(workspace):
    """A dataset with small plans whose first fold has one validation case: fewer than there are processes."""
    cases = [case[0] for case in workspace.add_hippocampus(NAME, CASES)]
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "1")
    options = ("--patch-size", "16", "16", "16", "--num-stages", "3", "--base-features", "4", "--batch-size", "3")
    steps = ("--iterations-per-epoch", "2", "--val-iterations-per-epoch", "1", "--plans-name", PLANS)
    workspace.run("nnunet-norm", "plan", "-d", "4", "-c", "3d_fullres", *options, *steps)
    folder = workspace.root / "preprocessed" / NAME
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    plans["configurations"]["3d_fullres"]["nnunet_norm"]["checkpoint_minutes"] = 0
    (folder / f"{PLANS}.json").write_text(json.dumps(plans))
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[1:], "val": cases[:1]}]))
    (workspace.root / "probes").mkdir()
    (workspace.root / "probes" / "probe_trainer.py").write_text(PROBE)
    workspace.env["nnUNet_extTrainer"] += f":{workspace.root / 'probes'}"
    return workspace


def two_machines(workspace, *options, second=()):
    """``nnunet-norm train`` as if on two machines that meet at a free port: the code and the output of both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    command = ["nnunet-norm", "train", "4", "3d_fullres", "0", "-p", PLANS, "-device", "cpu", *options]
    command += ["--nnodes", "2", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1", "--node-rank"]
    machines = [
        subprocess.Popen(
            [*command, str(rank)],
            env=workspace.env | {"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"} | dict(second if rank else ()),
            cwd=workspace.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [machine.communicate(timeout=LIMIT)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    return [machine.returncode for machine in machines], outputs


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(hippocampus):
    """Both machines start again from it, finish, and validate; statistics and weights are the same to the last bit."""
    codes, outputs = two_machines(hippocampus, "-tr", "nnUNetTrainerProbe", "--max-restarts", "2")
    assert codes == [0, 0], "\n".join(outputs)
    folder = hippocampus.model(NAME, "nnUNetTrainerProbe", PLANS, "3d_fullres") / "fold_0"
    assert (folder / "killed").exists()
    log = "".join(path.read_text() for path in sorted(folder.glob("training_log_*.txt")))
    assert "The training goes on with epoch 1, from checkpoint_" in log
    assert [log.count(f" Epoch {epoch} \n") for epoch in range(3)] == [1, 2, 1]
    first, second = (torch.load(folder / f"weights_of_{rank}.pt") for rank in range(2))
    assert any(name.endswith("running_var") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(value.isfinite().all() for value in first.values())
    assert {int(value) for name, value in first.items() if name.endswith("num_batches_tracked")} == {6}
    trained = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(value, first[name]) for name, value in trained.items())
    report = json.loads((folder / "validation" / "norm_report.json").read_text())
    assert report["num_cases"] == 1
    assert len(json.loads((folder / "validation" / "summary.json").read_text())["metric_per_case"]) == 1


def test_machines_with_other_plans_refuse_before_anything_is_written(hippocampus, tmp_path):
    """Each says what differs, and where, in one line; a shell gets the code of a refusal."""
    other = tmp_path / NAME
    there = hippocampus.root / "preprocessed" / NAME
    other.mkdir()
    for path in there.iterdir():
        (other / path.name).symlink_to(path)
    (other / f"{PLANS}.json").unlink()
    plans = json.loads((there / f"{PLANS}.json").read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 4
    (other / f"{PLANS}.json").write_text(json.dumps(plans))
    codes, outputs = two_machines(
        hippocampus, "-tr", "nnUNetTrainerGN", "--backend", "gloo", second={"nnUNet_preprocessed": str(tmp_path)}
    )
    refusals = [line for output in outputs for line in output.splitlines() if "nnunet_norm.training.launch: " in line]
    assert codes == [2, 2], "\n".join(outputs)
    assert len(refusals) == 2
    assert all("plans: not the same for all processes; 1 on " in line for line in refusals)
    assert all("Traceback" not in output for output in outputs)
    assert not hippocampus.model(NAME, "nnUNetTrainerGN", PLANS, "3d_fullres").exists()
