"""Memory that lives at a time, against sums by hand and across devices."""

import torch
from torch import nn

from nnunet_norm.living import Living


def test_storages_count_while_they_live() -> None:
    """Enforces the peak of tensors that come and go, and that views and changes in place make nothing new."""
    with Living() as living:
        first = torch.empty(100, dtype=torch.float32, device="meta")
        second = first * 2
        second[10:].add_(1)
        third = second.view(10, 10) + 1
        assert (living.now, living.peak) == (1200, 1200)
        del second
        assert (living.now, living.peak) == (800, 1200)
        del first, third
    assert (living.now, living.peak) == (0, 1200)


def test_a_backward_pass_keeps_what_autograd_saves() -> None:
    """Enforces the same peak without data as with data, for a pass with gradients, and that it ends at the gradients."""
    figures = []
    for device in ("cpu", "meta"):
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
        with Living() as living:
            network(torch.ones(5, 8, device=device)).sum().backward()
        figures.append((living.now, living.peak))
    gradients = 4 * (8 * 16 + 16 + 16 * 4 + 4)
    assert figures[0] == figures[1]
    assert figures[0][0] == gradients
