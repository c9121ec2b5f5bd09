"""What every test starts from: none of the user's nnU-Net settings, no window for a figure, and one thread."""

import os

import pytest

# At import, because nnU-Net reads its variables once, when it is first imported.
for _variable in [name for name in os.environ if name.startswith("nnUNet_")]:
    del os.environ[_variable]
os.environ["MPLBACKEND"] = "Agg"
# Threads that spin while they wait make two busy processes on two cores more than ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays in tests are too small to be worth sharing out."""
    import torch  # after the variables above, which OpenMP reads when it is loaded

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
