"""Statistics of populations of images for every fold of a trained model, stage by stage or in tiles."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_norm.errors import ArchitectureError, InputImageError, OutputError, StatisticsError, TilingError
from nnunet_norm.layers import find_norms, tracks_statistics
from nnunet_norm.layers.domains import get_domain_statistics
from nnunet_norm.prediction.checks import listed, require_finite
from nnunet_norm.prediction.execution import Image, planes
from nnunet_norm.prediction.halo import by, planned_shape
from nnunet_norm.prediction.memory import size
from nnunet_norm.prediction.passes import read_mirrored
from nnunet_norm.prediction.population_tiles import PopulationTiles
from nnunet_norm.prediction.populations import Statistics, require_places, statistics_of
from nnunet_norm.prediction.ways import Way, Wishes, first_way
from nnunet_norm.prediction.workers import PreprocessedCases, Preprocessing
from nnunet_norm.receptive_field import ReceptiveField, trace_at
from nnunet_norm.stages import Scratch, ScratchOnDisk, scratch_folder
from nnunet_norm.stages.regions import Region
from nnunet_norm.statistics import StagedEstimator, blocks_of, estimate_population_statistics
from nnunet_norm.tiling import padded_shape

logger = logging.getLogger(__name__)


@contextmanager
def preprocessed_images(
    preprocessing: Preprocessing,
    cases: Mapping[str, tuple[Sequence[str], str | None]],
    *,
    scratch: Path | None,
    workers: int,
    progress: bool,
) -> Iterator[list[Tensor]]:
    """The preprocessed images (C, x, y, z) of some cases, as memory-mapped files that are gone when the block ends.

    Every fold and every pass reads them again, and together they may be larger than memory.

    Args:
        preprocessing: what every case goes through.
        cases: by name the files, and the previous stage's segmentation.
        scratch: folder for the files; None: the system's folder for temporary files.
        workers: processes for preprocessing; 0 for none.
        progress: show a progress bar.

    Raises:
        StatisticsError: there is no case.
        InputImageError: a case cannot be read, or has values that are not finite; a population without it is another one.
        OutputError: there is no room.
    """
    if not cases:
        raise StatisticsError("the population is empty: give at least one image")
    prepared = PreprocessedCases(
        preprocessing, [(files, previous, name) for name, (files, previous) in cases.items()], workers
    )
    with scratch_folder(scratch or Path(tempfile.gettempdir())) as folder:
        paths: list[Path] = []
        for item in tqdm(prepared, total=len(cases), desc="preprocessing", disable=not progress):
            require_finite(item["data"], f"the preprocessed image of case {item['ofile']!r}")
            paths.append(folder / f"{len(paths)}.npy")
            try:
                np.save(paths[-1], item["data"].numpy())
            except OSError as error:
                raise OutputError(
                    f"preprocessed images cannot be kept in {str(folder.parent)!r} ({error.strerror}): choose a --scratch "
                    "folder with more room"
                ) from error
        if prepared.failures:
            raise InputImageError(
                f"{len(prepared.failures)} of {len(cases)} images of the population cannot be used: "
                f"{listed(prepared.failures)}; mend them, or take them out"
            )
        logger.info(
            f"{len(paths)} preprocessed images, {size(sum(path.stat().st_size for path in paths))}, are kept in "
            f"{folder.parent} meanwhile{'' if scratch else ' (--scratch chooses another folder)'}"
        )
        # Copy-on-write, because torch warns of arrays that cannot be written; nothing writes to them.
        yield [torch.from_numpy(np.load(path, mmap_mode="c")) for path in paths]


@dataclass(frozen=True)
class Estimate:
    """Statistics of a population, and where they come from.

    Attributes:
        statistics: per fold.
        way: how they were found, in a few words.
        num_images: how many images were seen; 0 if the model has the statistics.
        num_voxels: of these images as they are preprocessed, padding included.
    """

    statistics: Sequence[Statistics]
    way: str
    num_images: int
    num_voxels: int


class PopulationEstimator:
    """Estimates statistics of populations for every fold of a model; the model itself stays as it is.

    Whole images go through the network stage by stage, all in step, so that one pass settles every norm, where the
    network's operators are known and scratch for all images fits into memory or on the disk. Else images are cut into tiles,
    and one pass settles one norm after another; what the network pads at the borders of tiles is then in the statistics.

    Args:
        network: without wrappers, and with places for statistics in every norm; it is changed by every estimate.
        weights: per fold; they are not changed.
        patch_size: voxels of a tile, about.
        wishes: where scratch lies, and how much memory there is.
        device: where the network computes.
        on_device: scratch may lie on the device.
        progress: show progress bars.

    Raises:
        StatisticsError: a norm of the network cannot have stored statistics, or there is none.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: Sequence[Mapping[str, Any]],
        *,
        patch_size: Sequence[int],
        wishes: Wishes,
        device: torch.device,
        on_device: bool,
        progress: bool,
    ) -> None:
        require_places(network)
        self.network = network
        self.weights = tuple(weights)
        self.patch_size = tuple(patch_size)
        self.wishes = wishes
        self.device = device
        self.on_device = on_device
        self.progress = progress

    @cached_property
    def field(self) -> ReceptiveField:
        """The network's receptive field, traced once."""
        return trace_at(self._on_device(), self.patch_size)

    @cached_property
    def staged(self) -> StagedEstimator | str:
        """What runs the network stage by stage, or why nothing can; found once."""
        if self.field.only_extent is not None:
            return f"this network takes tiles of {by(self.field.only_extent)} alone"
        try:
            return StagedEstimator(self._on_device())
        except ArchitectureError as error:
            return f"this network cannot be run stage by stage: {error}"

    def of_domain(self, name: str) -> Estimate | None:
        """The statistics that the model has of a domain, if it was trained with statistics per domain and saw that one.

        Args:
            name: of the experimental batch.

        Returns:
            None unless every fold has seen it: one population has one source.
        """
        found = []
        for weights in self.weights:
            self.network.load_state_dict(weights)
            domains = get_domain_statistics(self.network)
            if domains is None or not domains.has_seen(name):
                return None
            domains.select(self.network, name)
            found.append(statistics_of(self.network))
        return Estimate(found, "those of the training, which the model has stored", 0, 0)

    def estimate(self, images: Sequence[Tensor], what: str) -> Estimate:
        """Statistics of images (C, x, y, z) for every fold; a line in the log says before what it takes.

        Args:
            images: preprocessed.
            what: the population, for the log.

        Raises:
            StatisticsError: statistics that are not finite.
            TilingError: the device's memory is too small.
            OutputError: there is no room for scratch.
        """
        network = self._on_device()
        field = self.field
        single = [plane for image in images for _, plane in planes(image, len(field.stride))]
        shapes = [planned_shape(plane.shape[1:], self.patch_size, field) for plane in single]
        extents = [padded_shape(shape, field.stride) for shape in shapes]
        way = self._way(Counter(extents))
        voxels = sum(math.prod(shape) for shape in extents)
        run: Callable[[], None]
        if isinstance(way, Way):
            how = f"stage by stage, all norms in one pass over {len(single)} images or slices"
            run = self._staged_run(way, list(zip(single, extents, strict=True)))
            more = (
                f"; scratch at most {size(way.scratch_bytes)} {'in' if way.place == 'memory' else 'on the'} {way.place}, in "
                f"all about {size(way.memory_bytes)} of memory"
            )
        else:
            tiles = PopulationTiles(single, self.patch_size, field)
            passes = sum(tracks_statistics(norm) for norm in find_norms(network).values())
            how = f"in {len(tiles)} tiles of at most {by(tiles.largest)}, one pass per norm ({passes})"
            counts = "what is padded at borders of tiles counts"
            counts += "" if field.only_extent is None else ", and what two tiles share counts twice"
            more, run = f"; {counts}; because {way}", self._tiled_run(tiles)
        folds = f" x {len(self.weights)} folds" if len(self.weights) > 1 else ""
        logger.info(f"statistics of {what}: {voxels:.3g} voxels; {how}{folds}{more}")
        found = []
        for weights in self.weights:
            network.load_state_dict(weights)
            with self._precision(), _errors_of(what):
                run()
            found.append(statistics_of(network))
        network.cpu()  # what is predicted next may want the device's memory
        return Estimate(found, how, len(images), voxels)

    def _on_device(self) -> nn.Module:
        with torch.inference_mode(False):  # parameters made in inference mode could never be differentiated
            return self.network.to(self.device).eval()

    def _precision(self) -> AbstractContextManager[Any]:
        """As in prediction: half on CUDA."""
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def _way(self, extents: Mapping[tuple[int, ...], int]) -> Way | str:
        staged = self.staged
        if isinstance(staged, str):
            return staged
        return first_way(self.wishes, staged.graph, extents, self.device, self._dtype, on_device=self.on_device)

    def _staged_run(self, way: Way, images: Sequence[tuple[Image, tuple[int, ...]]]) -> Callable[[], None]:
        def reader(plane: Image) -> Callable[[Region], Tensor]:
            return lambda region: read_mirrored(plane, region, ()).to(self._dtype)

        pairs = [(way.schedules[padded], reader(plane)) for plane, padded in images]

        def run() -> None:
            assert isinstance(self.staged, StagedEstimator)
            with ExitStack() as stack:
                scratch = Scratch(self.device if way.place == "device" else torch.device("cpu"))
                if way.place == "disk":
                    assert self.wishes.scratch is not None
                    scratch = ScratchOnDisk(stack.enter_context(scratch_folder(self.wishes.scratch)))
                bar = stack.enter_context(tqdm(total=blocks_of(pairs), desc="statistics", disable=not self.progress))
                self.staged.estimate(pairs, scratch=scratch, device=self.device, progress=bar.update)

        return run

    def _tiled_run(self, tiles: PopulationTiles) -> Callable[[], None]:
        return lambda: estimate_population_statistics(self.network, tiles, exact=True, progress=self.progress)


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Say of which population an error is, and what a full device means."""
    try:
        yield
    except StatisticsError as error:
        raise StatisticsError(f"{what}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise TilingError(
            f"{what}: the device's memory is too small for a tile of the patch size; choose -device cpu"
        ) from error
