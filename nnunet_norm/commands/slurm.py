"""SLURM's flags, and ``nnunet-norm predict --slurm``: the parts of a prediction as an array, and a job that verifies them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nnunet_norm.commands.sizes import parse_size
from nnunet_norm.errors import SetupError, SubmissionError
from nnunet_norm.submission import (
    Resources,
    Submitted,
    check_executor,
    last_lines,
    submit_commands,
    wait_for,
)

if TYPE_CHECKING:
    from nnunet_norm.prediction import HaloPredictor

LOGS = "slurm_logs"
"""Folder of the logs, in the output folder: that is one which all machines see."""

PREFIX = "slurm_"
"""Beginning of the names of all values that are for ``--slurm``."""

CPUS = 4
"""Cores of a job unless said otherwise: nnU-Net's three processes for reading are seldom busy while three others write."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--slurm`` and what goes with it."""
    group = parser.add_argument_group("SLURM", "Needs the package submitit (pip install 'nnunet_norm[slurm]').")
    group.add_argument(
        "--slurm",
        action="store_true",
        help="submit the parts (-num_parts; else every case or volume is one) as an array of jobs, and a job that verifies "
        "them; what is finished is left as it is, as with --continue_prediction, so the same command again makes up for what "
        "failed",
    )
    group.add_argument("--slurm_gpus", type=int, metavar="N", help="per job (default: 1 with -device cuda, else 0)")
    add_resource_arguments(group, cpus=f"{CPUS}", minutes=Resources.minutes)


def add_resource_arguments(group: argparse._ArgumentGroup, *, cpus: str, minutes: int) -> None:
    """What a job is to have, but for its GPUs.

    Args:
        group: of arguments.
        cpus: the default of ``--slurm_cpus``, in words.
        minutes: that of ``--slurm_minutes``.
    """
    group.add_argument(
        "--slurm_partition",
        metavar="NAME",
        help="default: the cluster's; for account or QOS set SBATCH_ACCOUNT, SBATCH_QOS",
    )
    group.add_argument("--slurm_cpus", type=int, metavar="N", help=f"per job (default: {cpus})")
    group.add_argument("--slurm_memory", metavar="SIZE", help="per job, for example 32G (default: the cluster's)")
    group.add_argument(
        "--slurm_minutes",
        type=int,
        metavar="N",
        help=f"per job (default: {minutes}); one that needs more is requeued and goes on where it was",
    )
    group.add_argument("--slurm_array_limit", type=int, metavar="N", help="jobs that run at once (default: no limit)")
    group.add_argument(
        "--slurm_setup",
        action="append",
        metavar="LINE",
        help="a line of the shell to run first, for example 'module load cuda'; may be given again",
    )
    group.add_argument("--slurm_wait", action="store_true", help="stay until all jobs have ended, and tell what failed")


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything is loaded.

    Raises:
        SetupError: flags that contradict each other; submitit or SLURM is missing.
        SubmissionError: numbers that no job can have.
    """
    if not args.slurm:
        refuse_resources(args, "--slurm")
        return
    if args.part_id:
        raise SetupError(f"-part_id {args.part_id} and --slurm: all parts are submitted, so leave -part_id out")
    if args.verify_parts:
        raise SetupError(
            "--verify_parts and --slurm: a job that verifies is submitted anyway, so leave one of them out"
        )
    resources = _resources(args)
    if args.device == "cuda" and resources.gpus == 0:
        raise SetupError("--slurm_gpus 0 and -device cuda: ask for a GPU, or predict with -device cpu")
    check_executor()


def submit(
    args: argparse.Namespace, predictor: HaloPredictor, add_flags: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Submit the parts of a prediction that are not finished yet.

    Args:
        args: the flags of ``predict``.
        predictor: with the model, so that all that would be refused is refused now.
        add_flags: what adds the flags of ``predict`` to a parser.

    Raises:
        SubmissionError: the cluster refuses, or (``--slurm_wait``) a part failed.
        Others: as the prediction would before it begins.
    """
    num_parts, missing = _missing_parts(args, predictor)
    if len(missing) < num_parts:
        finished = num_parts - len(missing)
        print(f"{finished} of {num_parts} parts in {args.o} are finished, and left as they are")
    if not missing:
        return
    common = {"num_parts": num_parts, "continue_prediction": True, "disable_progress_bar": True}
    python = [sys.executable, "-m", "nnunet_norm.cli"]
    verification = command_line(args, add_flags, num_parts=num_parts, continue_prediction=True, verify_parts=True)
    submitted = submit_commands(
        [[*python, *command_line(args, add_flags, part_id=part, **common)] for part in missing],
        name=f"nnunet-norm-{Path(args.o).absolute().name}",
        folder=Path(args.o, LOGS),
        resources=_resources(args),
        then=[*python, *verification],
    )
    _tell(submitted, missing, num_parts, verification)
    if args.slurm_wait:
        _wait(submitted, missing, num_parts, progress=not args.disable_progress_bar)


def command_line(
    args: argparse.Namespace, add_flags: Callable[[argparse.ArgumentParser], None], **changes: object
) -> list[str]:
    """The command that was called, with other values for some flags and without those of SLURM.

    Args:
        args: what it was called with.
        add_flags: what adds its flags to a parser.
        **changes: by the names in ``args``.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    words = [args.command]
    for action in parser._actions:
        value = changes.get(action.dest, getattr(args, action.dest))
        if value == action.default or action.dest == "slurm" or action.dest.startswith(PREFIX):
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [action.option_strings[-1], *map(str, values)]
    return words


def refuse_resources(args: argparse.Namespace, flag: str) -> None:
    """Refuse SLURM's flags without the one that asks for it.

    Raises:
        SetupError: one of them was given.
    """
    given = [name for name, value in vars(args).items() if name.startswith(PREFIX) and value]
    if given:
        raise SetupError(f"--{given[0]} is for {flag}: add that, or leave it out")


def resources_of(args: argparse.Namespace, *, gpus: int, cpus: int, minutes: int, nodes: int = 1) -> Resources:
    """What a job is to have, by the flags of :func:`add_resource_arguments`.

    Args:
        args: the flags.
        gpus: of a job, per machine.
        cpus: likewise, where ``--slurm_cpus`` was not given.
        minutes: where ``--slurm_minutes`` was not given.
        nodes: machines of a job.

    Raises:
        SubmissionError: numbers that no job can have.
        SetupError: a size that is none.
    """
    return Resources(
        partition=args.slurm_partition,
        gpus=gpus,
        cpus=cpus if args.slurm_cpus is None else args.slurm_cpus,
        memory=None if args.slurm_memory is None else parse_size(args.slurm_memory, "--slurm_memory"),
        minutes=minutes if args.slurm_minutes is None else args.slurm_minutes,
        array_limit=args.slurm_array_limit,
        setup=args.slurm_setup or (),
        nodes=nodes,
    )


def _resources(args: argparse.Namespace) -> Resources:
    gpus = int(args.device == "cuda") if args.slurm_gpus is None else args.slurm_gpus
    return resources_of(args, gpus=gpus, cpus=CPUS, minutes=Resources.minutes)


def _missing_parts(args: argparse.Namespace, predictor: HaloPredictor) -> tuple[int, list[int]]:
    """Into how many parts it is divided, and which of them are not finished."""
    from nnunet_norm.prediction.parts import CaseParts, missing_volume_parts
    from nnunet_norm.prediction.volumes import VolumeOptions, VolumePrediction
    from nnunet_norm.volumes import find_volumes, holds_volumes, is_volume

    if not (is_volume(args.i) or holds_volumes(args.i)):
        cases = CaseParts(predictor, args.i, args.prev_stage_predictions)
        count = len(cases.names)
        num_parts = count if args.num_parts == 1 else min(args.num_parts, count)
        if num_parts < 2:
            raise SubmissionError(f"-i {args.i} holds one case, which cannot be divided: leave --slurm out")
        return num_parts, cases.missing_parts(num_parts, args.o, probabilities=args.save_probabilities)
    num_parts = len(find_volumes(args.i)) if args.num_parts == 1 else args.num_parts
    if num_parts < 2:
        raise SubmissionError(f"-i {args.i} is one volume: say into how many parts (-num_parts), or leave --slurm out")
    options = VolumeOptions(args.level, args.save_probabilities, resume=True, num_parts=num_parts)
    prediction = VolumePrediction(predictor, args.i, args.o, options)
    missing = missing_volume_parts(prediction)
    if not missing:
        prediction.verify()  # a process that was killed after the last part may have left an output without its name
    return num_parts, missing


def _tell(submitted: Submitted, parts: list[int], num_parts: int, verification: list[str]) -> None:
    ids = submitted.ids
    which = f"jobs {ids[0]} to {ids[-1]}" if len(ids) > 1 else f"job {ids[0]}"
    numbers = ", ".join(map(str, parts)) if len(parts) < num_parts else f"0 to {num_parts - 1}"
    print(f"submitted part {numbers} of {num_parts} as {which}")
    all_ids = sorted({job_id.split("_")[0] for job_id in ids})
    if submitted.last is not None:
        print(f"job {submitted.last.job_id} verifies them when all have ended: {submitted.log_of(submitted.last)}")
        all_ids.append(submitted.last.job_id)
    else:
        print(f"the job that verifies them was not submitted ({submitted.refusal}): do it by hand when all have ended")
    print(f"logs: {submitted.folder}; state: squeue --jobs={','.join(all_ids)}")
    print(f"verify: nnunet-norm {shlex.join(verification)}")
    print("if a part fails: the same command again submits what is not finished", flush=True)


def _wait(submitted: Submitted, parts: list[int], num_parts: int, *, progress: bool) -> None:
    """Wait, and tell what failed."""
    jobs = [*submitted.jobs, *([submitted.last] if submitted.last is not None else [])]
    with tqdm(total=len(jobs), unit="job", disable=not progress) as bar:

        def tell(ended: int, states: Mapping[str, str]) -> None:
            found = list(states.values())
            bar.set_postfix_str(", ".join(f"{found.count(state)} {state}" for state in sorted(set(found)) if state))
            bar.update(ended - bar.n)

        failed = wait_for(submitted, tell)
    verified = submitted.last is not None and len(submitted.jobs) not in failed
    if verified or not failed:
        print("all parts are finished" + (" and verified" if verified else ""))
        return
    job = jobs[failed[0]]
    what = f"part {parts[failed[0]]} of {num_parts}" if failed[0] < len(parts) else "the verification"
    print(*last_lines(submitted.log_of(job)), sep="\n", file=sys.stderr)
    lost = [parts[number] for number in failed if number < len(parts)]
    more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
    raise SubmissionError(
        f"{what} failed{more}: its last lines are above, all of them in {submitted.log_of(job)}; the same command again "
        "submits what is not finished"
    )
