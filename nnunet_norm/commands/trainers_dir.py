"""Print the folder with this package's trainers.

Tell nnU-Net about it once per shell:

    export nnUNet_extTrainer="$(nnunet-norm trainers-dir)"
"""

import argparse
from importlib.resources import files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> None:
    """Print the folder that holds ``nnunet_norm_trainers.py``, wherever pip has put it."""
    print(files("nnunet_norm.trainers"))
