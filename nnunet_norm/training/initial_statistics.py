"""Running statistics that do not remember what they were before the training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nnunet_norm.layers import BatchRenorm2d, BatchRenorm3d, tracking_norms


@dataclass(frozen=True)
class InitialStatistics:
    """The running statistics of torch's norms before the first step, to be taken out again after some steps.

    An exponential average with momentum p still has the share ``(1 - p) ** n`` of its initial value after n steps: 35 % after
    10 steps at 0.1. Without that share, rescaled, it is the average of the batches alone (the bias correction of Adam).
    BatchRenorm does without, unless its limits never open: its average starts with the first batch.
    """

    norms: tuple[tuple[_NormBase, dict[str, Tensor]], ...]

    @classmethod
    def of(cls, network: nn.Module) -> "InitialStatistics":
        """Remember the running statistics of every norm of ``network`` that keeps a plain exponential average."""
        return cls(
            tuple(
                (norm, {name: getattr(norm, name).clone() for name in ("running_mean", "running_var")})
                for norm in tracking_norms(network)
                if not _starts_with_the_first_batch(norm) and norm.momentum is not None
            )
        )

    @torch.no_grad()
    def forget(self, num_steps: int) -> None:
        """Take the initial values out of statistics that have seen ``num_steps`` batches since, in place."""
        for norm, initial in self.norms:
            assert norm.momentum is not None
            share = (1 - norm.momentum) ** num_steps
            if share == 1:  # momentum 0 or no step: there is nothing but the initial values
                continue
            for name, value in initial.items():
                buffer = getattr(norm, name)
                corrected = (buffer.cpu().double() - share * value.cpu().double()) / (
                    1 - share
                )  # some devices lack float64
                # Rounding, enlarged by a small momentum, must not make a variance negative.
                buffer.copy_(corrected.clamp(min=0) if name == "running_var" else corrected)


def _starts_with_the_first_batch(norm: nn.Module) -> bool:
    return isinstance(norm, (BatchRenorm2d, BatchRenorm3d)) and (norm.r_max, norm.d_max) != (1, 0)
