"""BatchNorm that normalizes across processes on any device, and whose steps may have several forwards."""

from nnunet_norm.layers.batch_renorm import BatchStatisticsNorm


class _BatchNorm(BatchStatisticsNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        sync: str = "full",
    ) -> None:
        closed = {"r_max": 1.0, "d_max": 0.0, "warmup_steps": 0, "ramp_steps": 0}
        super().__init__(num_features, eps, momentum, affine, sync=sync, **closed)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super(BatchStatisticsNorm, self).extra_repr()}, sync={self.sync!r}"


class BatchNorm2d(_BatchNorm):
    """Batch Normalization of images: BatchRenorm whose limits never open.

    What ``torch.nn.BatchNorm2d`` and ``torch.nn.SyncBatchNorm`` compute, and their state dict, key for key, with three
    differences. Several forwards of one optimizer step (micro-batches, activation checkpointing) count as one batch inside
    :func:`nnunet_norm.layers.one_step`. Synchronization works on every device and backend. A batch that makes a running
    statistic non-finite is not taken in, and not counted.

    Shape: ``(N, C, H, W)`` in and out.

    Args:
        num_features: Channels of the input.
        eps: Added to the variance.
        momentum: Share of the newest batch in the running statistics; ``None`` for the plain mean of all batches.
        affine: Whether ``weight`` and ``bias`` are learned, one each per channel.
        sync: What processes share: "full" for the statistics that normalize (SyncBatchNorm), "running" for the running
            statistics alone, or "none". See :class:`nnunet_norm.layers.BatchRenorm2d` for what that asks of the processes.

    Raises:
        LayerError: For another ``sync``, an input of another rank, or, in train mode, an input with one value per channel.

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    ndim = 2


class BatchNorm3d(_BatchNorm):
    """:class:`BatchNorm2d` for volumes. Shape: ``(N, C, D, H, W)`` in and out."""

    ndim = 3
