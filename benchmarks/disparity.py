"""What the disparity hook costs, as a share of an epoch.

    python benchmarks/disparity.py [--patch 48 48 48] [--features 16] [--stages 4] [--repeats 5]

A network like nnU-Net's trains with each norm on random batches, on the CPU or, where there is one, a CUDA GPU. Timed in
turn, so that a machine that changes its speed changes all of it: a training step (forward, backward with deep
supervision, SGD), a validation forward pass, and one measurement of disparity. From their times follows the share of an
epoch of 250 training and 50 validation steps that the default number of measurements takes. Without augmentation and loss
the share is an upper bound.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_norm.layers import convert_norm
from nnunet_norm.training.disparity import default_disparity_batches, measure_disparity

ITERATIONS, VAL_ITERATIONS = 250, 50
NORMS = ("instance_norm", "batch_norm", "batch_renorm", "group_norm")


def network(norm, stages, features):
    torch.manual_seed(0)
    widths = [min(features * 2**i, 320) for i in range(stages)]
    net = PlainConvUNet(
        *(1, stages, widths, nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, 3, 2),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    return convert_norm(net, norm)


def seconds(action, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(norm, args, device):
    net = network(norm, args.stages, args.features).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99, nesterov=True)
    x = torch.randn(2, 1, *args.patch, device=device)

    def train():
        net.train()
        optimizer.zero_grad()
        sum(y.square().mean() for y in net(x)).backward()
        optimizer.step()

    def validate():
        net.eval()
        with torch.no_grad():
            net(x)

    def disparity():
        net.eval()
        measure_disparity(net, x, regions=False)

    for action in (train, validate, disparity):
        action()
    shares = []
    count = default_disparity_batches(ITERATIONS, VAL_ITERATIONS)
    for _ in range(args.repeats):
        step, forward, measurement = (seconds(action, device) for action in (train, validate, disparity))
        shares.append(count * measurement / (ITERATIONS * step + VAL_ITERATIONS * forward))
    return {"batches": count, "share": statistics.median(shares), "least": min(shares), "most": max(shares)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[48, 48, 48])
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", type=Path, default=Path(__file__).parent / "results" / "disparity.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    result = {
        "machine": f"{machine}, {platform.machine()}",
        "torch": torch.__version__,
        "patch": args.patch,
        "features": args.features,
        "stages": args.stages,
        "repeats": args.repeats,
        "norms": {norm: measure(norm, args, device) for norm in NORMS},
    }
    print(json.dumps(result, indent=2))
    args.o.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
