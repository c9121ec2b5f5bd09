"""What is refused of the flags of ``nnunet-norm ensemble``, before anything is imported that takes long."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnunet_norm.errors import EnsembleError, SetupError

PREDICTING = (
    *("-chk", "--disable_tta", "--population", "--batches", "--controls", "--max-memory", "-npp", "-nps", "-device"),
    *("--keep_members", "--trust-checkpoint"),
)
SEARCHING = ("--sweep", "-c", "--metric", "--candidates", "--tolerance", "--hd95")


def check_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags that are missing, contradict each other, or would be ignored.

    Args:
        args: as they were given.
        parser: of the command, with its defaults.

    Raises:
        EnsembleError, SetupError: the first of them.
    """
    if args.np < 0 or min(args.npp, args.nps) < 0:
        raise SetupError(f"-np {args.np}, -npp {args.npp} and -nps {args.nps} must not be negative")
    if args.candidates is not None and args.candidates < 1:
        raise SetupError(f"--candidates {args.candidates} must be at least 1")
    if args.find:
        _check_search(args, parser)
    else:
        _check_average(args, parser)


def _check_search(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _refuse(args, parser, ("-i", "-o"), "with --find, which reads validations and writes beside them")
    ignored = ("--save_npz", "--postprocessing", "-pp_pkl_file", *PREDICTING)
    _refuse(args, parser, ignored, "with --find, which predicts nothing")
    if (args.m is None) == (args.sweep is None):
        raise EnsembleError("--find needs models: give either -d and -m, or --sweep")
    if args.m:
        _refuse(args, parser, ("-c",), "with -m, as a model's name says its configuration")


def _check_average(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _refuse(args, parser, SEARCHING, "without --find")
    for name in ("i", "o"):
        if not getattr(args, name):
            raise EnsembleError(
                f"-{name} is missing: give {'folders to average' if name == 'i' else 'the folder to write'}"
            )
    if not args.m:
        _refuse(args, parser, ("-d", "-f", *PREDICTING), "without -m, as nothing is predicted")
    if args.m and len(args.i) > 1:
        raise EnsembleError(
            f"-i {' '.join(args.i)}: with -m, give one folder of images; leave -m out to average predictions"
        )
    many = len(args.m or args.i)
    given, wanted = args.pp_pkl_file, {"none": 0, "each": many, "after": 1}[args.postprocessing]
    if given is not None and len(given) != wanted:
        raise EnsembleError(
            f"-pp_pkl_file has {len(given)} file{'s' * (len(given) != 1)}, and --postprocessing {args.postprocessing} takes "
            f"{wanted or 'none'}"
        )
    if not args.m and args.postprocessing != "none" and given is None:
        raise EnsembleError(f"--postprocessing {args.postprocessing} of predictions: name the files with -pp_pkl_file")


def _refuse(args: argparse.Namespace, parser: argparse.ArgumentParser, flags: Sequence[str], where: str) -> None:
    for flag in flags:
        name = flag.lstrip("-").replace("-", "_")
        if getattr(args, name) != parser.get_default(name):
            raise EnsembleError(f"{flag} is of no use {where}: leave it out")
