"""Train a grid of models, on this machine or a cluster; see how far it is; report on it.

    nnunet-norm sweep run GRID        train what is not finished
    nnunet-norm sweep status GRID     how far every training is
    nnunet-norm sweep report GRID     tables and figures

GRID is a YAML file, or a recipe of plans/ that has a grid. Results lie where nnU-Net would put them; the rest is in
nnUNet_results/DATASET/sweeps/NAME__CONFIGURATION.
"""

from __future__ import annotations

import argparse
import importlib

ACTIONS = {
    "run": "train what is not finished, by one of three engines",
    "status": "say how far every training is",
    "report": "write tables and figures about what is finished",
}
"""Every action and its line in the help; each is a module of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions, each with its own arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, summary in ACTIONS.items():
        module = importlib.import_module(f"nnunet_norm.commands.sweep_{action}")
        subparser = actions.add_parser(
            action,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(subparser)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for."""
    importlib.import_module(f"nnunet_norm.commands.sweep_{args.action}").run(args)
