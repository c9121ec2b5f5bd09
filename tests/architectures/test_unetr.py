"""MONAI's UNETR as this package builds it: the very network, its norms exchanged, and what it does not take."""

import pytest
import torch
from monai.networks.blocks import CrossAttentionBlock, TransformerBlock
from monai.networks.nets import UNETR
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import nn

from nnunet_norm.architectures import build_unetr, is_unetr, refuse_patch, trains_unetr
from nnunet_norm.errors import PlansError
from nnunet_norm.layers import NORMS, checkpoint_stages, convert_norm, find_norms, set_input_normalization
from nnunet_norm.receptive_field import trace_at

SIZES = {"feature_size": 2, "hidden_size": 12, "mlp_dim": 16, "num_heads": 3}
PATCHES = [(32, 48), (16, 32, 16)]


def configuration(patch, norm="InstanceNorm", **kwargs):
    return {
        "patch_size": list(patch),
        "nnunet_norm": {"unetr": SIZES},
        "architecture": {
            "arch_kwargs": {
                "norm_op": f"torch.nn.{norm}{len(patch)}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True, **kwargs},
            }
        },
    }


@pytest.mark.parametrize("patch", PATCHES)
def test_it_is_monais_network(patch):
    """Equality with MONAI's own class, for the same weights, in 2d and 3d; what is left out is not used."""
    torch.manual_seed(0)
    ours = build_unetr(configuration(patch), 2, 3).eval()
    affine = ("instance", {"affine": True})
    theirs = UNETR(2, 3, patch, spatial_dims=len(patch), norm_name=affine, **SIZES).eval()
    weights = {key.replace("out.seg_layers.", "out."): value for key, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert {key.split(".")[3] for key in missing} == {"norm_cross_attn"}
    image = torch.randn((2, 2, *patch))
    with torch.inference_mode():
        assert torch.equal(ours(image), theirs(image))
    assert is_unetr(ours)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_the_convolutions_is_exchanged_and_none_of_the_transformer(norm):
    """No InstanceNorm is left in any of MONAI's blocks, whatever they call it; LayerNorms and all other keys stay."""
    network = build_unetr(configuration((32, 32)), 1, 2)
    before = {name: type(module) for name, module in network.named_modules()}
    if norm == "ghost_batch_norm":
        convert_norm(network, norm, normalization_batch_size=1)
    else:
        convert_norm(network, norm)
    changed = {name for name, module in network.named_modules() if type(module) is not before[name]}
    instance = {name for name, kind in before.items() if kind is nn.InstanceNorm2d}
    assert len(instance) == 21
    assert changed == (set() if norm == "instance_norm" else instance)


def test_the_norm_of_the_plans_is_built_with_its_arguments():
    """For nnUNetTrainerNorm_UNETR: BatchNorm with an eps and a momentum of its own, and no norm at all."""
    network = build_unetr(configuration((32, 32), "BatchNorm", eps=1e-3, momentum=0.03), 1, 2)
    found = {(type(norm), norm.eps, norm.momentum) for norm in find_norms(network).values()}
    assert found == {(nn.BatchNorm2d, 1e-3, 0.03)}
    without = configuration((32, 32))
    without["architecture"]["arch_kwargs"]["norm_op"] = None
    assert not find_norms(build_unetr(without, 1, 2))
    without["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.BatchNrom2d"
    with pytest.raises(PlansError, match=r"^plans: norm_op is 'torch\.nn\.BatchNrom2d', which cannot be imported"):
        build_unetr(without, 1, 2)


def test_every_parameter_that_wants_a_gradient_gets_one():
    """Processes that train together wait for the gradient of every such parameter."""
    network = build_unetr(configuration((32, 32)), 1, 2)
    network(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    assert sum(p.requires_grad for p in network.parameters()) > 100


def test_keys_do_not_depend_on_monais_version(monkeypatch):
    """MONAI 1.4 builds every block with a cross-attention that nothing runs: later ones do not."""
    before = build_unetr(configuration((16, 16)), 1, 2).state_dict()

    class Block(TransformerBlock):
        def __init__(self, hidden_size, mlp_dim, num_heads, *args, **kwargs):
            super().__init__(hidden_size, mlp_dim, num_heads, *args, **kwargs)
            self.cross_attn = CrossAttentionBlock(hidden_size=hidden_size, num_heads=num_heads)

    monkeypatch.setattr("monai.networks.nets.vit.TransformerBlock", Block)
    assert any("cross_attn.to_q" in key for key in UNETR(1, 2, (16, 16), spatial_dims=2, **SIZES).state_dict())
    assert build_unetr(configuration((16, 16)), 1, 2).state_dict().keys() == before.keys()
    assert not [key for key in before if "cross_attn" in key]


def test_weights_start_a_training_with_other_labels(tmp_path):
    """nnU-Net's own loader leaves the last layer out and asks for all others."""
    model, other = (build_unetr(configuration((16, 16)), 1, labels) for labels in (2, 5))
    torch.save({"network_weights": model.state_dict()}, tmp_path / "weights.pth")
    head = {key: value.clone() for key, value in other.state_dict().items() if key.startswith("out.")}
    load_pretrained_weights(other, str(tmp_path / "weights.pth"))
    given, found = model.state_dict(), other.state_dict()
    assert all(torch.equal(found[key], head.get(key, given[key])) for key in found)
    assert list(head) == ["out.seg_layers.conv.conv.weight", "out.seg_layers.conv.conv.bias"]


def test_every_segment_that_is_computed_again_has_something_to_compute():
    """Twelve blocks of the transformer and eight of convolutions, with and without an input normalization."""
    network = build_unetr(configuration((32, 32)), 1, 2)
    assert checkpoint_stages(network) == 20
    set_input_normalization(network, "tile_quantile", 1)
    assert checkpoint_stages(network) == 20


def test_a_patch_that_is_not_made_of_tokens_is_refused_with_one_that_is():
    """One line that says what to type: MONAI's tokens have 16 voxels on every axis, also on a thin one."""
    with pytest.raises(PlansError) as refusal:
        build_unetr(configuration((8, 96, 100)), 1, 2, where="configuration 3d_fullres")
    assert str(refusal.value) == (
        "configuration 3d_fullres: patch size 8x96x100 is not made of whole tokens of UNETR, 16 voxels on every axis: derive "
        "plans with nnunet-norm plan --patch-size 16 96 112"
    )
    refuse_patch((16, 96, 112), "")


@pytest.mark.parametrize("patch", PATCHES)
def test_its_field_is_unbounded_and_that_of_one_extent(patch):
    """The attention is named as what sees everything; the total stride is that of the tokens."""
    field = trace_at(build_unetr(configuration(patch, "BatchNorm"), 1, 2).eval(), patch)
    assert (field.only_extent, field.stride) == (patch, (16,) * len(patch))
    assert field.unbounded == "vit.blocks.0.attn (SABlock: bmm)"
    assert field.tile_statistics == ()


def test_trainers_are_told_by_their_names():
    """The word right behind the norm, and not one that contains it."""
    assert trains_unetr("nnUNetTrainerBRN_UNETR_DiceTopK_5epochs")
    others = ("BRN", "BRN_5epochs", "BRN_UNETRv2", "UNETR", "_UNETR", "_UNETR_5epochs", "")
    assert not any(trains_unetr(f"nnUNetTrainer{name}") for name in others)
    assert not trains_unetr("MyTrainer_UNETR")
    assert not is_unetr(nn.Identity())
