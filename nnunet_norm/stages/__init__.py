"""A network run block by block over a whole image, with a halo per stage instead of one for the whole network."""

from nnunet_norm.stages.graph import Graph, read_network
from nnunet_norm.stages.pieces import divide, reach
from nnunet_norm.stages.run import run, run_population, smaller
from nnunet_norm.stages.schedule import Schedule, make_schedule
from nnunet_norm.stages.scratch import Scratch, ScratchOnDisk, scratch_folder
from nnunet_norm.stages.verify import read_verified

__all__ = [
    "Graph",
    "Schedule",
    "Scratch",
    "ScratchOnDisk",
    "divide",
    "make_schedule",
    "reach",
    "read_network",
    "read_verified",
    "run",
    "run_population",
    "scratch_folder",
    "smaller",
]
