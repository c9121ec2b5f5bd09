"""List every trainer of this package and how nnU-Net finds them."""

import argparse
import importlib
from importlib.resources import files

from nnunet_norm.training.naming import options_line, trainer_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> None:
    """Print each name with its line, the options behind a name, and the line to export."""
    names = trainer_names(vars(importlib.import_module("nnunet_norm.trainers.nnunet_norm_trainers")))
    width = max(map(len, names))
    for name, summary in names.items():
        print(f"{name:{width}}  {summary}")
    print(f"\nEach also with {options_line()}. nnU-Net finds them after\n")
    print(f'    export nnUNet_extTrainer="{files("nnunet_norm.trainers")}"')
