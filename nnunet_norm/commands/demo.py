"""Train InstanceNorm and BatchRenorm on a brain template and compare their predictions, tile by tile.

Needs no data, no GPU and under 10 minutes on two cores. Everything stays in one folder, nnU-Net's own folders included; run
again, the demo reuses what is there, and goes on where it was interrupted. Needs: pip install "nnunet_norm[demo]".
"""

import argparse
import signal
from pathlib import Path
from types import FrameType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Output folder, length of the trainings, seed."""
    parser.add_argument("-o", type=Path, default=Path("nnunet_norm_demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of acquisitions and trainings (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the demo, and end the running program on SIGTERM as on Ctrl-C."""
    from nnunet_norm.demo.run import run_demo

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        run_demo(args.o, epochs=args.epochs, seed=args.seed)
    finally:
        signal.signal(signal.SIGTERM, before)
