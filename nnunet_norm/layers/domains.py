"""Running statistics of several domains beside one network: affine parameters and weights are shared."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nnunet_norm.errors import LayerError
from nnunet_norm.layers.collecting import SteppingNorm
from nnunet_norm.layers.convert import find_norms, tracking_norms


class DomainStatistics(nn.Module):
    """One set of running statistics per domain, for all norms of a network.

    The network's norms hold the statistics of one domain at a time, in their own buffers, and do not know of this module,
    which is a bystander: it has buffers and goes into checkpoints with the network. Whoever runs the network calls
    :meth:`select` before, and in training :meth:`keep` after every step.

    In training a norm's momentum is 1 (:meth:`listen`), so that its buffers hold the statistics of the last batch alone;
    ``keep`` takes them into those of the batch's domain with the weight ``max(momentum, 1 / t)`` at the domain's step t.
    Nothing remembers initial values, and a batch that is not finite is not taken in, and not counted.

    Args:
        names: The domains.
        network: With the norms whose statistics are kept; it is not held.

    Attributes:
        names: The domains, in the order of the rows.
        momentum: Least weight of a domain's newest batch; None for the plain mean of its batches.
        mean: ``(D, C)``, means of all channels of all norms, in the order of ``find_norms``.
        var: ``(D, C)``, unbiased variances as torch's norms track them.
        num_batches: ``(D,)``, batches that a domain has seen.

    Raises:
        LayerError: No domain, one named twice, or no norm with running statistics.

    References:
        Wu and Johnson 2021, arXiv:2105.07576, section 5.2 (statistics per domain); Lin and Lu 2022, doi
        10.1101/2022.10.14.512286 (a domain is an experimental batch).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> network.domain_statistics = DomainStatistics(["plate_1", "plate_2"], network)
        >>> network.domain_statistics.mean.shape
        torch.Size([2, 4])
    """

    mean: Tensor
    var: Tensor
    num_batches: Tensor

    def __init__(self, names: Sequence[str], network: nn.Module) -> None:
        super().__init__()
        self.names = tuple(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise LayerError(f"domains {list(names)}: give one name or more, each once")
        norms = tracking_norms(network)
        if not norms:
            raise LayerError("a network without norms with running statistics has none to keep per domain")
        self.momentum: float | None = norms[0].momentum
        initial = [_flat(norms, name).expand(len(self.names), -1).clone() for name in ("running_mean", "running_var")]
        self.register_buffer("mean", initial[0])
        self.register_buffer("var", initial[1])
        self._steps: Tensor | None = None
        self.register_buffer("num_batches", torch.zeros(len(self.names), dtype=torch.long, device=initial[0].device))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: a network that is a ``Sequential`` runs whatever it contains."""
        return x

    def index(self, domain: str) -> int:
        """The row of a domain.

        Raises:
            LayerError: There is no such domain.
        """
        if domain not in self.names:
            raise LayerError(f"domain {domain!r} has no statistics of its own; there are {', '.join(self.names)}")
        return self.names.index(domain)

    def has_seen(self, domain: str) -> bool:
        """Whether ``domain`` is one of :attr:`names` and a batch of it has been kept. Waits for the device."""
        return domain in self.names and bool(self.num_batches[self.index(domain)] > 0)

    def listen(self, network: nn.Module) -> None:
        """Have the norms of ``network`` hold the statistics of their last batch alone: their momentum becomes 1."""
        self._steps = _steps_of(tracking_norms(network))
        for norm in find_norms(network).values():
            if isinstance(norm, _NormBase):
                norm.momentum = 1.0

    @torch.no_grad()
    def select(self, network: nn.Module, domain: str) -> None:
        """Copy the statistics of ``domain`` into the norms of ``network``, in place.

        Raises:
            LayerError: There is no such domain.
        """
        row = self.index(domain)
        self._hand_out(network, self.mean[row], self.var[row])

    @torch.no_grad()
    def keep(self, network: nn.Module, domain: str) -> None:
        """Take in the batch that ``network`` has just run in train mode, and select ``domain``.

        The norms must listen. Under DistributedDataParallel all processes must have run a batch of the same domain, and the
        norms must be SyncBatchNorm, whose statistics are those of all of them.

        Raises:
            LayerError: There is no such domain.
        """
        row, norms = self.index(domain), tracking_norms(network)
        batch = torch.stack([_flat(norms, "running_mean"), _flat(norms, "running_var")])
        finite = batch.isfinite().all()
        steps = _steps_of(norms)
        if self._steps is not None and self._steps.shape == steps.shape:
            # Norms of this package leave a batch that is not finite out, and hold on to what was selected before it.
            finite &= (steps != self._steps).all()
        self._steps = steps
        weight = (self.num_batches[row] + 1).reciprocal()
        if self.momentum is not None:
            weight = weight.clamp(min=self.momentum)
        for old, new in zip((self.mean[row], self.var[row]), batch, strict=True):
            old.copy_(torch.where(finite, torch.lerp(old, new, weight.to(old.dtype)), old))
        self.num_batches[row] += finite
        self._hand_out(network, self.mean[row], self.var[row])

    @torch.no_grad()
    def pooled(self, network: nn.Module) -> None:
        """Write into the norms of ``network`` the statistics of all domains together, each weighted by its batches.

        With weights w: ``mean = sum w m`` and ``var = sum w (v + (m - mean)^2)``, which is E[m^2 + v] - E[m]^2 without the
        cancellation. Batches are drawn in proportion to a domain's cases, so w is a domain's share of the training set, too.
        Domains that were never seen have none; if no domain was, the norms stay as they are.
        """
        if not self.num_batches.any():
            return
        weight = (self.num_batches / self.num_batches.sum()).to(self.mean.dtype)[:, None]
        seen = weight > 0  # what an unseen domain holds is no statistic, and may be anything
        mean = torch.where(seen, weight * self.mean, 0).sum(0)
        var = torch.where(seen, weight * (self.var + (self.mean - mean).square()), 0).sum(0)
        self._hand_out(network, mean, var)

    def _hand_out(self, network: nn.Module, mean: Tensor, var: Tensor) -> None:
        norms = tracking_norms(network)
        channels = [norm.num_features for norm in norms]
        buffers = [buffer for name in ("running_mean", "running_var") for buffer in _buffers(norms, name)]
        torch._foreach_copy_(buffers, [*mean.split(channels), *var.split(channels)])

    def extra_repr(self) -> str:
        """The domains."""
        return ", ".join(self.names)


def get_domain_statistics(network: nn.Module) -> DomainStatistics | None:
    """The statistics per domain that ``network`` carries, however it is wrapped; None if it has none."""
    return next((module for module in network.modules() if isinstance(module, DomainStatistics)), None)


def _buffers(norms: Sequence[_NormBase], name: str) -> list[Tensor]:
    return [getattr(norm, name) for norm in norms]


def _steps_of(norms: Sequence[_NormBase]) -> Tensor:
    """What each norm has counted, of those that count only what they take in."""
    like = norms[0].running_mean
    assert like is not None
    counting = [norm for norm in norms if isinstance(norm, SteppingNorm) and norm.counts_steps]
    counts = [norm.num_batches_tracked for norm in counting if norm.num_batches_tracked is not None]
    return torch.stack(counts) if counts else like.new_zeros(0)


def _flat(norms: Sequence[_NormBase], name: str) -> Tensor:
    return torch.cat(_buffers(norms, name))
