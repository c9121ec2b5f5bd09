"""Values of given ranks are found exactly in values that come in parts."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_norm.volumes.order import OrderStatistics

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda number: number != 0)


@settings(max_examples=30)
@given(st.lists(NUMBERS, max_size=40), st.integers(0, 10), st.randoms())
def test_ranks_are_those_of_the_sorted_values(numbers: list[float], zeros: int, rng) -> None:
    """Enforces every rank, whatever the signs and magnitudes, with zeros that are only counted."""
    values = np.array(numbers, np.float32)
    every = np.sort(np.concatenate([values, np.zeros(zeros, np.float32)]))
    ranks = sorted(rng.sample(range(len(every)), min(4, len(every))))
    if not ranks:
        return
    order, parts = OrderStatistics(), np.array_split(values, 3)
    for part in parts:
        order.add(part)
    order.choose(ranks, zeros)
    for part in parts:
        order.refine(part)
    assert order.values().tolist() == every[ranks].tolist()
