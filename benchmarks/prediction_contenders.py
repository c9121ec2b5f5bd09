"""What ``benchmarks/prediction.py`` compares: the ways to predict a whole image."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_norm.tiling import padded_shape

CONTENDERS = ("whole", "stages", "tiles", "monai", "nnunet", "whole_channels_last")
"""``whole_channels_last`` is the whole pass in the memory layout in which stages compute: it tells what that gains."""

POPULATIONS = {
    "batch_renorm": {"tiles": "stored", "stages": "stored"},
    "instance_norm": {"tiles": "tile", "stages": "image"},
}
"""Per norm, whose statistics the halo predictor's plans normalize with."""


class Contender(NamedTuple):
    """How to predict (C, z, y, x), and, afterwards, what was done."""

    predict: Callable[[Tensor], Tensor]
    plan: Callable[[], dict[str, Any]]


def flips(ndim: int, mirror: bool) -> list[tuple[int, ...]]:
    """The axes of (N, C, *spatial) that each pass is mirrored along; the first pass is not."""
    axes = range(2, ndim + 2)
    return [found for count in range(ndim + 1 if mirror else 1) for found in itertools.combinations(axes, count)]


def planes(image: Tensor, ndim: int) -> Iterator[Tensor]:
    """What the network takes at a time, (1, C, *spatial): the image, or the slices of a stack."""
    yield from [image[None]] if ndim == 3 else (image[:, z][None] for z in range(image.shape[1]))


def forward(net: nn.Module, job: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The network, mirrored passes averaged, on CUDA in half precision as nnU-Net does it."""
    passes = flips(job["ndim"], job["mirror"])

    def run(x: Tensor) -> Tensor:
        total = None
        for axes in passes:
            y = net(x.flip(axes)).flip(axes) if axes else net(x)
            total = y if total is None else total.add_(y)
        return total / len(passes) if len(passes) > 1 else total

    return run


def whole(net: nn.Module, job: dict[str, Any], channels_last: bool = False) -> Contender:
    """One pass over the image zero-padded at its far end to a multiple of the total stride."""
    run, ndim, device = forward(net, job), job["ndim"], torch.device(job["device"])
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[ndim] if channels_last else torch.contiguous_format
    net.to(memory_format=layout)

    def one(plane: Tensor) -> Tensor:
        extents = plane.shape[2:]
        padded = padded_shape(extents, [2 ** (job["stages"] - 1)] * ndim)
        x = functional.pad(
            plane, [w for n, p in zip(reversed(extents), reversed(padded), strict=True) for w in (0, p - n)]
        )
        logits = run(x.to(device).contiguous(memory_format=layout)).float()
        return logits[(0, slice(None), *(slice(0, n) for n in extents))].to("cpu")

    def predict(image: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device):
            found = [one(plane) for plane in planes(image, ndim)]
        return found[0] if ndim == 3 else torch.stack(found, 1)

    return Contender(predict, lambda: {"plan": "one pass", "layout": str(layout).removeprefix("torch.")})


def monai(net: nn.Module, job: dict[str, Any]) -> Contender:
    """MONAI's sliding window: Gaussian, half overlap, one window at a time as nnU-Net, everything on the device."""
    from monai.inferers.utils import sliding_window_inference

    run, device, patch = forward(net, job), torch.device(job["device"]), job["patch"]
    options = {"overlap": 0.5, "mode": "gaussian"}
    windows = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal windows
        windows += 1
        return run(x)

    def predict(image: Tensor) -> Tensor:
        nonlocal windows
        windows = 0
        with torch.inference_mode(), autocast(device):
            found = [
                sliding_window_inference(plane.to(device), patch, 1, counted, **options)[0].to("cpu")
                for plane in planes(image, job["ndim"])
            ]
        return found[0] if job["ndim"] == 3 else torch.stack(found, 1)

    return Contender(predict, lambda: {"plan": "sliding window", "patch": patch, "windows": windows} | options)


def nnunet(net: nn.Module, job: dict[str, Any]) -> Contender:
    """nnU-Net's predictor at its defaults."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    made = nnUNetPredictor(device=torch.device(job["device"]), use_mirroring=job["mirror"], allow_tqdm=False)
    hand_over(made, net, job)

    def plan() -> dict[str, Any]:
        windows = len(made._internal_get_sliding_window_slicers(tuple(job["shape"])))
        shown = {"patch": job["patch"], "windows": windows, "overlap": made.tile_step_size, "mode": "gaussian"}
        return {"plan": "sliding window"} | shown

    return Contender(made.predict_logits_from_preprocessed_data, plan)


def halo(net: nn.Module, job: dict[str, Any], execution: str) -> Contender:
    """The halo predictor with one of its plans of execution."""
    from nnunet_norm.prediction import HaloPredictor

    tiles = {"tile_size": job["tile_size"], "halo": job["halo"]} if execution == "tiles" else {}
    made = HaloPredictor(
        device=torch.device(job["device"]),
        use_mirroring=job["mirror"],
        allow_tqdm=False,
        execution=execution,
        population=POPULATIONS[job["norm"]][execution],
        scratch=job["scratch"],
        max_memory=job["max_memory"],
        **tiles,
    )
    hand_over(made, net, job)
    return Contender(made.predict_logits_from_preprocessed_data, lambda: made.last_plan.as_dict())


def hand_over(predictor: Any, net: nn.Module, job: dict[str, Any]) -> None:
    """Give a predictor its network as nnU-Net's trainer does."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(job["plans"])
    labels = {"background": 0} | {f"class {i}": i for i in range(1, job["classes"])}
    dataset = {"channel_names": {"0": "image"}, "labels": labels, "file_ending": ".nii.gz"}
    predictor.manual_initialization(
        *(net, manager, manager.get_configuration("benchmark"), [net.state_dict()], dataset, "nnUNetTrainer"),
        tuple(range(job["ndim"])),
    )


def make_contender(net: nn.Module, job: dict[str, Any]) -> Contender:
    name = job["contender"]
    if name.startswith("whole"):
        return whole(net, job, channels_last=name == "whole_channels_last")
    return {"monai": monai, "nnunet": nnunet}[name](net, job) if name in ("monai", "nnunet") else halo(net, job, name)


def autocast(device: torch.device) -> Any:
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()
