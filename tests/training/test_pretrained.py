"""Pretrained weights move between norms, through nnU-Net's own loader."""

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunet_norm.errors import ModelFolderError, OutputError
from nnunet_norm.layers import find_norms
from nnunet_norm.training.pretrained import export_pretrained

NORMS = ("BRN", "GN", "InstanceNorm", "INTracked", "BatchNorm", "NoNorm")
FIRST = "encoder.stages.0.0.convs.0.norm"


def trained(dataset, name):
    trainer = dataset.trainer(name)
    trainer.num_iterations_per_epoch = 1
    trainer.run_training()
    return trainer


@pytest.mark.parametrize("source", NORMS)
def test_weights_of_every_norm_start_a_training_with_every_norm(dataset, source, tmp_path):
    model = trained(dataset, f"nnUNetTrainer{source}_1epochs")
    export_pretrained(model.output_folder_base, 0, "checkpoint_final.pth", tmp_path / "weights.pth")
    for target in NORMS:
        trainer = dataset.trainer(f"nnUNetTrainer{target}_1epochs")
        trainer.initialize()
        load_pretrained_weights(trainer.network, str(tmp_path / "weights.pth"))
        mine, theirs = trainer.network.state_dict(), model.network.state_dict()
        assert torch.equal(
            mine["encoder.stages.0.0.convs.0.conv.weight"], theirs["encoder.stages.0.0.convs.0.conv.weight"]
        )
        if target != "NoNorm" and source != "NoNorm":
            assert torch.equal(mine[f"{FIRST}.weight"], theirs[f"{FIRST}.weight"])
        for norm in find_norms(trainer.network).values():
            if getattr(norm, "num_batches_tracked", None) is not None:
                assert norm.num_batches_tracked == 0


def test_from_instance_norm_the_statistics_start_afresh_and_from_brn_they_are_kept(dataset, tmp_path):
    for source in ("InstanceNorm", "BRN"):
        model = trained(dataset, f"nnUNetTrainer{source}_1epochs")
        export_pretrained(model.output_folder_base, 0, "checkpoint_final.pth", tmp_path / "weights.pth")
        weights = torch.load(tmp_path / "weights.pth")["network_weights"]
        mean, var = weights[f"{FIRST}.running_mean"], weights[f"{FIRST}.running_var"]
        if source == "InstanceNorm":
            assert torch.equal(mean, torch.zeros(4))
            assert torch.equal(var, torch.ones(4))
        else:
            assert torch.equal(mean, model.network.state_dict()[f"{FIRST}.running_mean"])
            assert model.network.state_dict()[f"{FIRST}.num_batches_tracked"] == 1
        assert weights[f"{FIRST}.num_batches_tracked"] == 0


def test_a_checkpoint_of_another_architecture_is_refused(dataset, tmp_path):
    model = trained(dataset, "nnUNetTrainerGN_1epochs")
    path = f"{model.output_folder}/checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    key = "encoder.stages.1.0.convs.0.conv.weight"
    checkpoint["network_weights"][key] = torch.zeros(3, 3)
    torch.save(checkpoint, path)
    with pytest.raises(ModelFolderError, match=rf"{key} is \(3, 3\) and should be \(8, 4, 3, 3, 3\)"):
        export_pretrained(model.output_folder_base, 0, "checkpoint_final.pth", tmp_path / "weights.pth")
    assert not (tmp_path / "weights.pth").exists()


def test_a_place_that_cannot_be_written_is_refused(dataset, tmp_path):
    model = trained(dataset, "nnUNetTrainerGN_1epochs")
    with pytest.raises(OutputError, match=r"nowhere/weights.pth cannot be written"):
        export_pretrained(model.output_folder_base, 0, "checkpoint_final.pth", tmp_path / "nowhere" / "weights.pth")
