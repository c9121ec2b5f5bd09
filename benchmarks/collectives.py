"""What it costs to merge BatchRenorm's statistics across the processes of one training.

    python benchmarks/collectives.py [--backend gloo] [--processes 2] [--patch 32 32 32] [--rounds 15] [--out FOLDER]
    python benchmarks/collectives.py --backend nccl --device cuda --processes 4 --patch 128 128 128 --features 32 --stages 6

Training steps of a U-Net under DistributedDataParallel: forward, backward with deep supervision, SGD. The contenders differ
in what the processes share: gradients only (``sync="none"``), running statistics too (``sync="running"``, the default), or
also the statistics that normalize (``sync="full"``); BatchNorm and, where torch has a kernel (CUDA), SyncBatchNorm beside
them. They take turns within a round, in another order in each; a step is as long as that of the slowest process. With gloo
all processes share the cores of one machine: that says what the calls cost, not what a network between machines does.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from reporting import command, machine, parser_of, spread, table, versions
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_norm.layers import convert_norm, find_norms
from nnunet_norm.writing import write_json, written_beside

CONTENDERS = {
    "none": 'BatchRenorm, sync="none"',
    "running": 'BatchRenorm, sync="running"',
    "full": 'BatchRenorm, sync="full"',
    "batch_norm": "BatchNorm",
    "sync_batch_norm": "SyncBatchNorm",
}
LEARNING_RATE = 1e-6
"""Outputs are drawn to zero: with nnU-Net's rate they would run away, and statistics that are not finite are not taken in."""

WARM_UP = 3


def network(name: str, args: argparse.Namespace) -> nn.Module:
    """A plain U-Net as nnU-Net builds them, its BatchRenorm in the middle of its schedule."""
    torch.manual_seed(0)
    stages = args.stages
    widths = [min(args.features * 2**i, 320) for i in range(stages)]
    net = PlainConvUNet(
        *(1, stages, widths, nn.Conv3d, 3, [1] + [2] * (stages - 1), 2, 3, 2),
        conv_bias=True,
        norm_op=nn.BatchNorm3d,
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    if name == "sync_batch_norm":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net if name == "batch_norm" else convert_norm(net, "batch_renorm", sync=name, warmup_steps=0, ramp_steps=0)


class Training:
    """The training of one contender in this process."""

    def __init__(self, name: str, args: argparse.Namespace, rank: int) -> None:
        device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
        self.device = device
        net = network(name, args).to(device)
        self.network = DistributedDataParallel(net, device_ids=[rank] if args.device == "cuda" else None)
        self.optimizer = torch.optim.SGD(self.network.parameters(), LEARNING_RATE, momentum=0.99, nesterov=True)
        self.x = torch.randn(args.batch, 1, *args.patch, generator=torch.Generator().manual_seed(rank)).to(device)

    def step(self) -> None:
        """Forward, backward, SGD."""
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = sum(y.square().mean() for y in self.network(self.x))
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """Of one step of the slowest process."""
        self._wait()
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=self.device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item()

    def _wait(self) -> None:
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def deviation(self) -> float:
        """The largest difference between the processes' running statistics, after a step and before the next forward.

        DistributedDataParallel hands those of the first process to all at the next forward: what differs here is lost then.
        """
        worst = 0.0
        for norm in find_norms(self.network).values():
            for buffer in (norm.running_mean, norm.running_var):
                assert isinstance(buffer, Tensor)
                every = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
                dist.all_gather(every, buffer)
                differences = torch.stack([(other - every[0]).abs().max() for other in every])
                assert differences.isfinite().all()
                worst = max(worst, differences.max().item())
        return worst


def process(rank: int, args: argparse.Namespace, port: int, target: str) -> None:
    """One of the processes; the first writes what was measured to ``target``."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(args.threads // args.processes, 1))
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(args.backend, rank=rank, world_size=args.processes)
    names = [name for name in CONTENDERS if name != "sync_batch_norm" or args.device == "cuda"]
    trainings = {name: Training(name, args, rank) for name in names}
    for training in trainings.values():
        for _ in range(WARM_UP):
            training.step()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(trainings[name].seconds())
    found = {name: {"seconds": taken[name], "deviation": trainings[name].deviation()} for name in names}
    if rank == 0:
        write_json(target, {"norms": len(find_norms(trainings["none"].network)), "contenders": found})
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    settings, contenders, norms = result["settings"], result["contenders"], result["norms"]
    alone = contenders["none"]["seconds"]
    rows = [
        ["", "ms per step", 'over sync="none"', "µs more per norm", "running statistics of the processes differ by"]
    ]
    for name, found in contenders.items():
        more = [(a - b) / norms * 1e6 for a, b in zip(found["seconds"], alone, strict=True)]
        ratios = [a / b for a, b in zip(found["seconds"], alone, strict=True)]
        cells = [CONTENDERS[name], spread([s * 1000 for s in found["seconds"]]), spread(ratios, "x")]
        rows.append([*cells, "" if name == "none" else f"{median(more):.0f}", f"{found['deviation']:.2g}"])
    patch, word = (
        " x ".join(map(str, settings["patch"])),
        "GPUs" if settings["device"] == "cuda" else "processes on the CPU",
    )
    told = result["machine"] | result["versions"]
    parts = [
        "# Merging BatchRenorm's statistics across processes",
        f"`{result['command']}`",
        "\n".join(f"- {key}: {json.dumps(value)}" for key, value in told.items()),
        f"{settings['processes']} {word}, {settings['backend']}; {settings['threads']} threads in all. A 3d U-Net of "
        f"{settings['stages']} stages with {norms} norms, {settings['features']} channels at the first, batch "
        f"{settings['batch']} per process, patch {patch}. {settings['rounds']} rounds; load average {result['load']:.1f}.",
        table(rows),
        'Median (least to most) over the rounds; ratios within a round. `sync="running"` makes one collective call per norm '
        'in the forward pass, `sync="full"` one more in the backward pass. The last column: the largest difference after the '
        "last step. Where it is not 0, DistributedDataParallel overwrites the statistics of all processes but the first at "
        "the next forward, so that those of their batches are lost.",
        settings["note"],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2, help="per process")
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 32, 32])
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all processes together")
    parser.add_argument("--note", default="", help="what else is to be said, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    path = args.out / f"collectives_{args.backend}.json"
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "measured.json"
        mp.spawn(process, (args, free_port(), str(target)), nprocs=args.processes)
        found = json.loads(target.read_text())
    about = {
        "command": command("collectives.py", sys.argv[1:], ("--out",)),
        "machine": machine(args.device),
        "versions": versions(),
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "load": load,
    }
    result = about | found
    write_json(path, result, indent=2)
    with written_beside(path.with_suffix(".md")) as beside:
        beside.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
