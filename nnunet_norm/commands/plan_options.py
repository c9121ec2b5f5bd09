"""Flags of ``nnunet-norm plan`` that change plans: one for each option of ``derive_plans``."""

import argparse
from dataclasses import fields
from typing import Any

from nnunet_norm.layers import INPUT_NORMALIZATIONS
from nnunet_norm.planning.schedule import LR_SCALINGS
from nnunet_norm.settings import UnetrSettings

OPTIONS = {
    "batch_size": "--batch-size",
    "batch_dice": "--batch-dice",
    "patch_size": "--patch-size",
    "micro_batch_size": "--micro-batch-size",
    "activation_checkpointing": "--activation-checkpointing",
    "replan_topology": "--replan-topology",
    "num_stages": "--num-stages",
    "base_features": "--base-features",
    "features_per_stage": "--features-per-stage",
    "norm_op": "--norm-op",
    "iterations_per_epoch": "--iterations-per-epoch",
    "val_iterations_per_epoch": "--val-iterations-per-epoch",
    "keep_samples": "--keep-samples",
    "initial_lr": "--lr",
    "lr_scaling": "--lr-scaling",
    "warmup_epochs": "--warmup-epochs",
    "checkpoint_minutes": "--checkpoint-minutes",
    "seed": "--seed",
    "disparity_batches": "--disparity-batches",
    "population_samples": "--population-samples",
    "reestimate_every": "--reestimate-every",
    "frozen_share": "--frozen-share",
    "normalization_batch_size": "--normalization-batch-size",
    "domain_statistics": "--domain-statistics",
    "input_normalization": "--input-normalization",
    "batch_renorm": "--batch-renorm",
    "unetr": "--unetr",
}
"""Parameters of ``derive_plans`` and the flags that give them."""


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Everything that can change, in three groups."""
    _add_batch_and_network(parser.add_argument_group("batch, patch and network"))
    _add_training(parser.add_argument_group("training"))
    _add_norms(parser.add_argument_group("norms"))


def _add_batch_and_network(changes: argparse._ArgumentGroup) -> None:
    changes.add_argument("--batch-size", type=int, metavar="N", help="samples per optimizer step, over all GPUs")
    changes.add_argument(
        "--batch-dice",
        action=argparse.BooleanOptionalAction,
        help="the Dice loss of the whole batch, or the mean over its samples",
    )
    changes.add_argument(
        "--micro-batch-size", type=int, metavar="N", help="samples of a GPU at once; gradients are added up"
    )
    changes.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute activations again for the gradient: less memory, more time",
    )
    changes.add_argument(
        "--patch-size", type=int, nargs="+", metavar="N", help="voxels per axis, in the order of the plans"
    )
    changes.add_argument(
        "--replan-topology", action="store_true", help="strides and kernels as nnU-Net would choose them"
    )
    changes.add_argument("--num-stages", type=int, metavar="N", help="keep this many of the finest stages")
    changes.add_argument(
        "--base-features", type=int, metavar="N", help="of the first stage; doubled up to the plan's cap"
    )
    changes.add_argument("--features-per-stage", type=int, nargs="+", metavar="N", help="instead, one number per stage")
    changes.add_argument(
        "--unetr",
        type=_size,
        action=_OnceEach,
        nargs="+",
        metavar="KEY=N",
        help=f"sizes of UNETR (trainers with _UNETR): {', '.join(item.name for item in fields(UnetrSettings))}",
    )
    changes.add_argument("--norm-op", metavar="PATH", help="dotted path of a norm (train it with nnUNetTrainerNorm)")


def _add_training(changes: argparse._ArgumentGroup) -> None:
    changes.add_argument("--iterations-per-epoch", type=int, metavar="N", help="optimizer steps per epoch")
    changes.add_argument("--val-iterations-per-epoch", type=int, metavar="N", help="validation batches per epoch")
    changes.add_argument(
        "--keep-samples",
        action="store_true",
        help="iterations, of validation too, by old/new batch size: as many samples are seen",
    )
    changes.add_argument(
        "--lr", "--initial-lr", dest="initial_lr", type=float, metavar="F", help="learning rate at the start"
    )
    changes.add_argument("--lr-scaling", choices=LR_SCALINGS, help="instead, what it had, scaled with the batch size")
    changes.add_argument(
        "--warmup-epochs", type=int, metavar="N", help="epochs over which the learning rate rises; 0: none"
    )
    changes.add_argument(
        "--checkpoint-minutes", type=float, metavar="F", help="between checkpoints; 0: one each epoch (default: 10)"
    )
    changes.add_argument(
        "--input-normalization",
        choices=INPUT_NORMALIZATIONS,
        help="quantiles 0.01 and 0.98 become 0 and 1: of every image, or of every tile (for comparison: it makes seams)",
    )
    changes.add_argument("--seed", type=int, metavar="N", help="of weights; with nnUNet_n_proc_DA=0 of all else too")


def _add_norms(changes: argparse._ArgumentGroup) -> None:
    changes.add_argument("--disparity-batches", type=int, metavar="N", help="batches on which disparity is measured")
    changes.add_argument(
        "--population-samples", type=int, metavar="N", help="patches for PreciseBN's and FrozenBN's statistics"
    )
    changes.add_argument("--reestimate-every", type=int, metavar="N", help="epochs between PreciseBN's estimates")
    changes.add_argument("--frozen-share", type=float, metavar="F", help="of FrozenBN's epochs, at the end")
    changes.add_argument("--normalization-batch-size", type=int, metavar="N", help="samples that GhostBN normalizes by")
    changes.add_argument(
        "--domain-statistics",
        action="store_true",
        help="running statistics for each experimental batch of the dataset (nnUNetTrainerBEN)",
    )
    changes.add_argument(
        "--batch-renorm",
        type=_setting,
        action=_OnceEach,
        nargs="+",
        metavar="KEY=V",
        help="momentum, r_max, d_max, warmup, ramp, sync",
    )


class _OnceEach(argparse.Action):
    """Pairs of key and value, of which no key may be given twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        keys = [key for key, _ in values]
        for key in keys:
            if keys.count(key) > 1:
                raise argparse.ArgumentError(self, f"{key} is given {keys.count(key)} times: give it once")
        setattr(namespace, self.dest, values)


def _size(text: str) -> tuple[str, int]:
    key, _, value = text.partition("=")
    try:
        return key, int(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=WHOLE NUMBER, e.g. hidden_size=384") from error


def _setting(text: str) -> tuple[str, float | str]:
    key, _, value = text.partition("=")
    if key == "sync" and value:
        return key, value
    try:
        return key, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=NUMBER, e.g. r_max=2") from error
