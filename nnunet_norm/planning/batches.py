"""The batch in parts: shares of processes, micro-batches, and samples that are normalized together."""

import math

from nnunet_norm.errors import PlansError
from nnunet_norm.planning.configurations import Configuration
from nnunet_norm.settings import NormSettings


def check_batches(resolved: Configuration, name: str) -> None:
    """Refuse parts of the batch that do not fit it.

    Raises:
        PlansError: micro-batches larger than the batch, or that cannot be cut into whole groups of
            ``normalization_batch_size``.
    """
    settings = NormSettings.from_configuration(resolved)
    micro, batch, together = settings.micro_batch_size, resolved["batch_size"], settings.normalization_batch_size
    if micro is None:
        return
    if micro > batch:
        raise PlansError(
            f"configuration {name}: micro_batch_size is {micro}, larger than the batch of {batch}; give micro_batch_size of "
            f"at most {batch}"
        )
    if together is not None and micro % together:
        raise PlansError(
            f"configuration {name}: micro_batch_size is {micro}, which normalization_batch_size {together} does not divide; "
            f"give a multiple of {together}, or other groups"
        )


def shares(batch_size: int, processes: int) -> list[int]:
    """Samples per process, the first ones larger: nnU-Net shares a batch out evenly.

    Raises:
        PlansError: fewer samples than processes.
    """
    if batch_size < processes:
        raise PlansError(
            f"num_gpus is {processes}, more than the batch of {batch_size} has samples; give num_gpus of at most "
            f"{batch_size}, or batch_size of at least {processes}"
        )
    return [batch_size // processes + (process < batch_size % processes) for process in range(processes)]


def check_shares(resolved: Configuration, processes: int, name: str) -> list[int]:
    """The :func:`shares` of a configuration.

    Raises:
        PlansError: fewer samples than processes; a share that ``normalization_batch_size`` does not divide; unequal shares
            with ``batch_dice``, for which nnU-Net gathers a row per sample, equally many from all processes; or shares of
            unequally many micro-batches with ``sync="full"``, whose norms exchange statistics in every one of them.
    """
    try:
        parts = shares(resolved["batch_size"], processes)
    except PlansError as error:
        raise PlansError(f"configuration {name}: {error}") from error
    settings = NormSettings.from_configuration(resolved)
    together = settings.normalization_batch_size or 1
    sizes = " or ".join(map(str, sorted(set(parts))))
    batch_size = resolved["batch_size"]
    given = f"configuration {name}: num_gpus is {processes} and batch_size {batch_size}: shares of {sizes} samples"
    if any(part % together for part in parts):
        raise PlansError(
            f"{given}, which normalization_batch_size {together} does not divide; give batch_size as a multiple of "
            f"{processes * together}"
        )
    if resolved.get("batch_dice") and len(set(parts)) > 1:
        raise PlansError(
            f"{given}, and batch_dice needs equal ones; give batch_size as a multiple of {processes}, or another num_gpus"
        )
    if (
        settings.batch_renorm.sync == "full"
        and len({math.ceil(part / (settings.micro_batch_size or part)) for part in parts}) > 1
    ):
        raise PlansError(
            f"{given}, thus unequal numbers of micro-batches, and norms with sync=full wait for each other; give batch_size "
            f"as a multiple of {processes * together}"
        )
    return parts
