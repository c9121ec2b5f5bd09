"""The console script ``nnunet-norm``: finds the command that was asked for and turns refusals into one line.

Each command is a module of :mod:`nnunet_norm.commands` with a docstring (its help), ``add_arguments(parser)`` and
``run(args)``. Only the module of the command that runs is imported, so that ``nnunet-norm trainers-dir`` answers at once.
"""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from nnunet_norm import __version__
from nnunet_norm.errors import NnunetNormError

COMMANDS = {
    "trainers-dir": "print the folder to export as nnUNet_extTrainer",
    "trainers": "list every trainer name of this package",
    "plan": "derive a new plans file from an existing one",
    "train": "train with one process per GPU, on one machine or several, and go on after a crash",
    "predict": "predict without seams, as if every image went through the network in one piece",
    "recalibrate": "give a trained model the statistics of other images: a new domain, a batch, a single image",
    "diagnose": "say whether a trained model has a normalization problem, and show why in one report",
    "export": "write a model that stock nnU-Net runs without this package, or pretrained weights for a training",
    "evaluate": "compare predictions with references: Dice, surface Dice at a tolerance, Hausdorff distance",
    "ensemble": "average models, and find which single model or pair is best",
    "sweep": "train a grid of models, on this machine or a cluster, and report on it",
    "demo": "train, predict and compare InstanceNorm and BatchRenorm on a brain template, on the CPU",
}
"""Every command and its line in ``nnunet-norm -h``."""

USER_ERROR = 2
"""Exit code of a refusal."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose refusals are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        self.exit(USER_ERROR, f"{self.prog}: {message}; see {self.prog} -h\n")


def _module_of(command: str) -> str:
    return "nnunet_norm.commands." + command.replace("-", "_")


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``argv``; the arguments of a command are added only if it is the one named."""
    parser = OneLineParser(
        prog="nnunet-norm", description="Normalization without seams for nnU-Net.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, summary in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=summary, description=summary, allow_abbrev=False)
        # After the command too, where people look for it; SUPPRESS keeps the value given before the command.
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if command in argv:
            module = importlib.import_module(_module_of(command))
            subparser.description = module.__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it ended well, 2 after a refusal that stands on stderr in one line."""
    argv = sys.argv[1:] if argv is None else argv
    # timm, which nnU-Net imports with its architectures, uses it; a refusal should not stand below somebody else's warning.
    warnings.filterwarnings("ignore", "`torch.jit.interface` is deprecated", FutureWarning)
    args = build_parser(argv).parse_args(argv)
    try:
        importlib.import_module(_module_of(args.command)).run(args)
    except NnunetNormError as error:
        if args.debug:
            raise
        print(f"nnunet-norm {args.command}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"nnunet-norm {args.command}: interrupted; finished work is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":  # jobs of a cluster are started so, with the Python that submitted them
    sys.exit(main())
