import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_networks import unet
from torch import nn

from nnunet_norm.prediction.tile_memory import CHANNELS_PER_GROUP, tile_memory

MEASURED = """
import sys, threading, time
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn
from nnunet_norm.prediction.memory import anonymous_memory
from nnunet_norm.prediction.tile_memory import tile_memory

torch.set_num_threads(1)
network = PlainConvUNet(
    1, 2, [16, 16], nn.Conv3d, 3, [1, 2], 1, 3, 1, conv_bias=True, norm_op=nn.BatchNorm3d, norm_op_kwargs={},
    nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
).eval()
counted = tile_memory(network, (96, 96, 96), 1, torch.float32).peak_bytes
peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_memory())
        time.sleep(0.002)

with torch.inference_mode():
    network(torch.zeros(1, 1, 32, 32, 32))
    before = anonymous_memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    network(torch.zeros(1, 1, 96, 96, 96))
    done = True
    watcher.join()
print((peak - before) / counted)
"""


class Branches(nn.Module):
    """One map is kept while another is made and dropped: what lives at a time is known by hand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        kept = self.first(x)
        return kept + torch.exp(torch.exp(kept))


def test_the_peak_is_what_lives_at_a_time():
    """Input, two maps and a third that is being made; of the convolution before, its work in whole groups of channels."""
    found = tile_memory(Branches().eval(), (8, 8), 1, torch.float32)
    assert (found.input_bytes, found.output_bytes, found.classes, found.largest_numbers) == (256, 512, 2, 128)
    weights, at_work = 3 * 4, 2 * CHANNELS_PER_GROUP * 64 * 4
    assert found.peak_bytes == pytest.approx(256 + 512 + at_work, abs=weights)
    tall = tile_memory(nn.Sequential(nn.Identity(), *[nn.Softplus() for _ in range(3)]), (8, 8), 2, torch.float32)
    assert tall.peak_bytes == 3 * 512  # the input, which the caller holds, and two maps


def test_it_grows_with_the_voxels():
    """Eight times the voxels of a network without global layers take eight times the memory, but for the weights."""
    network = unet([(1, 1, 1), (2, 2, 2)]).float()
    small, large = (tile_memory(network, (n, n, n), 1, torch.float32) for n in (16, 32))
    assert large.peak_bytes == pytest.approx(8 * small.peak_bytes, rel=0.05)
    assert large.largest_numbers == 8 * small.largest_numbers


def test_nothing_is_computed_and_nothing_is_changed():
    """Weights and statistics keep their values, and a tile of a terabyte is counted as well."""
    network = unet([(1, 1, 1), (2, 2, 2)])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert tile_memory(network, (4096, 4096, 4096), 1, torch.float64).peak_bytes > 2**40
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    class Keeping(nn.Module):
        kept = None

        def forward(self, x):
            self.kept = torch.zeros_like(x) if self.kept is None else self.kept
            return x + self.kept

    keeping = Keeping()
    assert not isinstance(tile_memory(keeping, (8, 8), 1, torch.float32), str)
    assert keeping.kept is None


def test_a_tile_that_the_network_cannot_take_is_told_with_the_reason():
    """An odd extent that a skip connection cannot join, an embedding of fixed size, and an output of another extent."""
    assert "Sizes of tensors must match" in tile_memory(unet([(1, 1), (2, 2)]), (15, 15), 1, torch.float64)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(1, 1, 16, 16))

        def forward(self, x):
            return x + self.place

    assert isinstance(tile_memory(Fixed(), (8, 8), 1, torch.float32), str)
    assert not isinstance(tile_memory(Fixed(), (16, 16), 1, torch.float32), str)
    assert tile_memory(nn.Conv2d(1, 1, 3), (8, 8), 1, torch.float32) == "it turns (8, 8) into (6, 6)"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_the_count_is_what_a_process_takes():
    """Anonymous memory of a process that runs a U-Net, beside the count: between two thirds and one and a half."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.67 < float(done.stdout.split()[-1]) < 1.5
