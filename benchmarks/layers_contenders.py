"""What ``layers.py`` compares, and the feature maps that a stock 3d_fullres network hands to its norms."""

import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunet_norm.layers import BatchRenorm3d, GroupNorm

STOCK_PLANS = Path(__file__).parents[1] / "tests" / "stock_plans" / "nnUNetPlans.json"
CONFIGURATION = "3d_fullres"

NEVER = 10**9
"""Steps of warm-up: more than there will be."""


class ExplicitBatchRenorm3d(BatchRenorm3d):
    """The formula of Batch Renormalization as one writes it down, differentiated by autograd."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape ``(N, C, D, H, W)``."""
        x32 = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        mean = x32.mean(axes)
        var = x32.var(axes, unbiased=False)
        with torch.no_grad():
            limits = self.limits()
            running_std = torch.sqrt(self.running_var + self.eps)
            r = torch.clamp(torch.sqrt(var + self.eps) / running_std, 1 / limits.r_max, limits.r_max)
            d = torch.clamp((mean - self.running_mean) / running_std, -limits.d_max, limits.d_max)
            count = x.numel() / x.size(1)
            weight = (1 / (self.num_batches_tracked + 1)).clamp(min=self.momentum)
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(var * (count / (count - 1)), weight)
            self.num_batches_tracked.add_(1)
        normalized = (x32 - mean.view(shape)) / torch.sqrt(var.view(shape) + self.eps)
        y = (normalized * r.view(shape) + d.view(shape)) * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


CONTENDERS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "batch_norm": ("BatchNorm", nn.BatchNorm3d),
    "batch_renorm": ("BatchRenorm, limits open", lambda c: BatchRenorm3d(c, warmup_steps=0, ramp_steps=0)),
    "batch_renorm_warmup": ("BatchRenorm, warm-up", lambda c: BatchRenorm3d(c, warmup_steps=NEVER)),
    "instance_norm": ("InstanceNorm", lambda c: nn.InstanceNorm3d(c, affine=True)),
    "group_norm": ("GroupNorm, groups of 16", GroupNorm),
    "explicit": ("BatchRenorm, explicit formula", lambda c: ExplicitBatchRenorm3d(c, warmup_steps=0, ramp_steps=0)),
}
"""Title, and what makes the norm of a number of channels."""

ORACLES = {"batch_renorm": "explicit", "batch_renorm_warmup": "batch_norm"}
"""What a contender must be equal to in double precision; the others to themselves."""


@dataclass(frozen=True)
class FeatureMap:
    """What a norm of the network is given.

    Attributes:
        shape: ``(N, C, D, H, W)`` of the norm's input.
        source: Shape of the input of the convolution before it.
        kernel: Of that convolution.
        stride: Of that convolution.
    """

    shape: tuple[int, ...]
    source: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def as_input(self) -> "FeatureMap":
        """The same map, whatever the convolution before it."""
        return FeatureMap(self.shape, (), (), ())


def stock_plans(patch: Sequence[int] | None, batch: int | None) -> dict[str, Any]:
    """The stock plans, with another patch or batch in the configuration if asked for."""
    plans = json.loads(STOCK_PLANS.read_text())
    if patch is not None:
        plans["configurations"][CONFIGURATION]["patch_size"] = list(patch)
    if batch is not None:
        plans["configurations"][CONFIGURATION]["batch_size"] = batch
    return plans


def feature_maps(plans: dict[str, Any], blocks: bool) -> dict[FeatureMap, int]:
    """The inputs of the network's norms, largest first, and how many norms are given such a one.

    The network is run without data (``device="meta"``). A norm that has several names is one norm.
    """
    made = plans["configurations"][CONFIGURATION]
    architecture = made["architecture"]
    arguments = (architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"])
    with torch.device("meta"):
        network = get_network_from_plans(*arguments, 1, 2, deep_supervision=True)
        image = torch.empty(made["batch_size"], 1, *made["patch_size"])
    found: list[FeatureMap] = []

    def record(conv: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(FeatureMap(tuple(output.shape), tuple(inputs[0].shape), conv.kernel_size, conv.stride))

    norms = {id(m.norm): m.conv for m in network.modules() if hasattr(m, "norm") and hasattr(m, "conv")}
    for conv in norms.values():
        conv.register_forward_hook(record)
    network(image)
    assert len(found) == len(norms), "every norm of a stock network follows a convolution and is run once"
    maps = found if blocks else [one.as_input for one in found]
    counts = {one: maps.count(one) for one in maps}
    return dict(sorted(counts.items(), key=lambda item: -torch.Size(item[0].shape).numel()))


def contender(name: str, of: FeatureMap) -> nn.Module:
    """A norm for ``of`` with statistics that are not those of the batch, in its block if the map has a convolution."""
    channels = of.shape[1]
    generator = torch.Generator().manual_seed(channels)
    norm = CONTENDERS[name][1](channels)
    with torch.no_grad():
        for key, tensor in norm.state_dict().items():
            if key in ("weight", "running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif key in ("bias", "running_mean"):
                tensor.uniform_(-0.5, 0.5, generator=generator)
            elif key == "num_batches_tracked":
                tensor.fill_(100)
    if not of.source:
        return norm
    conv = nn.Conv3d(of.source[1], channels, of.kernel, of.stride, tuple(k // 2 for k in of.kernel))  # type: ignore[arg-type]
    return nn.Sequential(conv, norm, nn.LeakyReLU(inplace=True))


def compiled(module: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """``module`` compiled, in a function whose code is its own.

    The compiler looks up what it made by the code, entry by entry: those of other layers would be looked at first.
    """

    def call(x: Tensor) -> Tensor:
        return module(x)

    own = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def largest_error(name: str, of: FeatureMap, mode: str) -> float:
    """How far output and gradients are off those in double precision, over the largest value of each.

    In single precision. A norm is compared with the explicit formula or torch's own, in eager mode.
    """
    of = FeatureMap(of.shape, (), (), ())
    tested, exact = contender(name, of), contender(ORACLES.get(name, name), of).double()
    x = torch.randn(of.shape, generator=torch.Generator().manual_seed(0)) * 1.3 + 0.2
    grad = torch.randn(of.shape, generator=torch.Generator().manual_seed(1))
    run = tested if mode == "eager" else compiled(tested, f"{name}_checked")

    def results(module: Any, parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = x.to(dtype).requires_grad_()
        y = module(inputs)
        return [y.detach(), *torch.autograd.grad(y, [inputs, *parameters], grad.to(dtype))]

    found = results(run, list(tested.parameters()), torch.float32)
    expected = results(exact, list(exact.parameters()), torch.float64)
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
