"""The same image in two tilings: how far a prediction depends on where the tiles happen to lie.

Two windows of the test image, equal in size and shifted against each other by half a core, are predicted independently.
Their tile grids are alike, so the second tiling is the first one shifted by half a core. Where both windows see the
image (away from the cut by more than the network's reach) a prediction that does not depend on the tiles is the same in
both. The comparison is a black box: it is made in the same way for nnU-Net's Gaussian blending and for the halo.

Runs as a program of its own, ``python -m nnunet_norm.demo.tilings``, since nnU-Net reads its environment on import.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_norm.metrics import TileMismatch, tile_mismatch
from nnunet_norm.tiling import Box, intersection, plan_tiles
from nnunet_norm.writing import written_beside

GAUSSIAN, HALO = "Gaussian blending", "halo"
"""The two ways to predict, as table and figure call them."""

STRIDE = 4
"""Total stride of the demo's network (3 stages)."""

TILE_SIZE = 64
"""Voxels; also the patch of the training, so that InstanceNorm meets tiles of the size that it was trained on."""

HALO_SIZE = 20
"""Voxels on either side: the reach of a U-Net with 3 stages for any voxel is 20 before and 17 after."""

SHIFT = (TILE_SIZE - 2 * HALO_SIZE) // 2
"""Half a core, a multiple of the stride."""


@dataclass(frozen=True)
class Grid:
    """The windows of an image with slices of ``shape`` and the tiles in them, all in coordinates of the image.

    Attributes:
        shape: ``(y, x)``, multiples of :data:`STRIDE`.
    """

    shape: tuple[int, ...]

    @property
    def window(self) -> tuple[int, ...]:
        """The extent of either window."""
        return tuple(n - SHIFT for n in self.shape)

    @property
    def common(self) -> Box:
        """What both windows see with its surroundings: nothing nearer to a cut than the halo."""
        return tuple(slice(SHIFT + HALO_SIZE, n - SHIFT - HALO_SIZE) for n in self.shape)

    def cores(self, shift: int) -> list[Box]:
        """What each tile of the window at ``shift`` writes."""
        tiles = plan_tiles(self.window, (TILE_SIZE, TILE_SIZE), HALO_SIZE, (STRIDE, STRIDE))
        return [tuple(slice(w.start + shift, w.stop + shift) for w in tile.write) for tile in tiles]

    def shared_boxes(self) -> Iterator[Box]:
        """Every part of :attr:`common` that one tile of the first and one of the second tiling predict."""
        for first in self.cores(0):
            for second in self.cores(SHIFT):
                both = intersection(first, second)
                inside = both and intersection(both, self.common)
                if inside:
                    yield inside


def predict_windows(predictor: Any, image: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    """Both windows of ``image`` ``(1, z, y, x)`` as logits ``(C, z, y, x)`` with NaN outside, and the seconds for one.

    Seconds are those of the faster of the two equal passes; loading, preprocessing and export are not in them.
    """
    grid = Grid(tuple(image.shape[2:]))
    results, seconds = [], []
    for shift in (0, SHIFT):
        y, x = (slice(shift, shift + n) for n in grid.window)
        start = time.perf_counter()
        logits = predictor.predict_sliding_window_return_logits(image[:, :, y, x].contiguous()).float().cpu()
        seconds.append(time.perf_counter() - start)
        whole = torch.full((len(logits), *image.shape[1:]), torch.nan)
        whole[:, :, y, x] = logits
        results.append(whole)
    return results, min(seconds)


def compare(first: torch.Tensor, second: torch.Tensor) -> tuple[TileMismatch, float]:
    """Tile mismatch of two tilings ``(C, z, y, x)``, slice by slice, and the share of voxels that change their label."""
    grid = Grid(tuple(first.shape[2:]))
    boxes = [(z, y, x) for z in range(first.shape[1]) for y, x in grid.shared_boxes()]
    pairs = ((first[:, z, y, x], second[:, z, y, x]) for z, y, x in boxes)
    y, x = grid.common
    changed = first[:, :, y, x].argmax(0) != second[:, :, y, x].argmax(0)
    return tile_mismatch(pairs), changed.float().mean().item()


def predictors(model_folder: Path) -> dict[str, Any]:
    """nnU-Net's predictor and the halo predictor with the model of fold 0, without mirroring, on the CPU."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_norm.prediction import HaloPredictor

    options: dict[str, Any] = {"use_mirroring": False, "perform_everything_on_device": False, "allow_tqdm": False}
    both: dict[str, Any] = {
        GAUSSIAN: nnUNetPredictor(device=torch.device("cpu"), **options),
        HALO: HaloPredictor(device=torch.device("cpu"), tile_size=(TILE_SIZE, TILE_SIZE), halo=HALO_SIZE, **options),
    }
    for predictor in both.values():
        predictor.initialize_from_trained_model_folder(str(model_folder), (0,), "checkpoint_final.pth")
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
    if both[HALO].field.tile_statistics:
        both[HALO].population = "tile"
    return both


def preprocess(predictor: Any, image: Path) -> torch.Tensor:
    """The image ``(1, z, y, x)`` as nnU-Net's own preprocessing hands it to the network."""
    manager = predictor.configuration_manager
    data, _, _ = manager.preprocessor_class(verbose=False).run_case(
        [str(image)], None, predictor.plans_manager, manager, predictor.dataset_json
    )
    return torch.from_numpy(np.asarray(data, dtype=np.float32))


def measure(model_folder: Path, image: Path, z: int, output: Path) -> None:
    """Predict and compare with both predictors; write ``output`` (npz): the numbers, and slice ``z`` of the logits."""
    found = predictors(model_folder)
    data = preprocess(found[HALO], image)
    arrays: dict[str, Any] = {"image": data[0, z].numpy()}
    numbers = {}
    for name, predictor in found.items():
        tilings, seconds = predict_windows(predictor, data)
        mismatch, changed = compare(*tilings)
        numbers[name] = {
            "seconds": seconds,
            "mismatch": [float(value) for value in mismatch.per_class],
            "verdict": mismatch.verdict,
            "max_dist": mismatch.max_dist,
            "pairs": mismatch.num_pairs,
            "changed": changed,
        }
        arrays[name] = np.stack([tiling[:, z].numpy() for tiling in tilings])
    with written_beside(output) as beside:
        np.savez_compressed(beside, numbers=np.array(json.dumps(numbers)), **arrays)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments of the program and run :func:`measure`."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--image", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--z", type=int, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # as nnU-Net does when it predicts; tiles this small are not worth sharing out
    measure(args.model, args.image, args.z, args.output)


if __name__ == "__main__":
    main()
