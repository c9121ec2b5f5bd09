"""The trainers in two real processes: what they make of the halves of a batch is what one process makes of the whole."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from nnunetv2.run.run_training import get_trainer_from_args

sys.path.append(str(Path(__file__).parents[1]))
from two_processes import found_by_both, one_of_two

SECONDS = 200
DATASET, BATCH, STEPS = "Dataset990_Abdomen", 4, 3
NORMS = {
    "GN": {},
    "InstanceNorm": {},
    "BatchNorm": {},
    "BRN": {"batch_renorm": {"sync": "full", "warmup": 0, "ramp": 0}},
}
"""Trainers, and plans of norms over the batch that normalize with that of both."""


def steps_of(norm, share):
    """Weights, running statistics and mean losses after some steps with a part of each batch."""
    trainer = get_trainer_from_args(
        DATASET, "3d_fullres", 0, f"nnUNetTrainer{norm}_10epochs", norm, device=torch.device("cpu")
    )
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    trainer.lr_scheduler.step(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        data = torch.randn(BATCH, 1, 16, 16, 16, generator=generator)
        sizes = [[round(16 * s) for s in scale] for scale in trainer._get_deep_supervision_scales()]
        target = [torch.randint(0, 3, (BATCH, 1, *size), generator=generator).float() for size in sizes]
        trainer.train_step({"data": data[share], "target": [of_scale[share] for of_scale in target]})
    return {key: value.clone() for key, value in trainer.bare_network.state_dict().items()}


def main(rank, folder):
    half = BATCH // 2
    with one_of_two(rank, folder, SECONDS):
        found = {norm: steps_of(norm, slice(rank * half, (rank + 1) * half)) for norm in NORMS}
        torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("batch_dice", [False, True])
def test_two_processes_step_as_one_does(dataset, tmp_path_factory, batch_dice):
    for norm, changes in NORMS.items():
        plans = dataset.plans(name=norm, batch_size=BATCH, seed=0, **changes)
        plans["configurations"]["3d_fullres"]["batch_dice"] = batch_dice
        (dataset.folder / f"{norm}.json").write_text(json.dumps(plans))
    folder = tmp_path_factory.mktemp("processes")
    variables = {name: value for name, value in os.environ.items() if name.startswith("nnUNet_")}
    first, second = found_by_both(__file__, folder, SECONDS, **variables)
    for norm in NORMS:
        expected = steps_of(norm, slice(None))
        for key, value in first[norm].items():
            assert torch.equal(value, second[norm][key]), f"{norm}: {key} is not the same in both"
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-5, msg=f"{norm}: {key}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
