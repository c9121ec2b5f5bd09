"""nnU-Net's local logger with this package's keys, and a panel of its own in the progress picture."""

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from nnunet_norm.writing import written_beside

DISPARITY_PER_CLASS = "train_eval_disparity"
DISPARITY = "mean_train_eval_disparity"
BATCH_STATISTICS = "batch_statistics_disparity"
CLIPPED = "batch_renorm_clipped"
ABS_LOG_R = "batch_renorm_abs_log_r"
ABS_D = "batch_renorm_abs_d"

EVERY_NORM = (DISPARITY_PER_CLASS, DISPARITY)
BATCH_RENORM = (BATCH_STATISTICS, CLIPPED, ABS_LOG_R, ABS_D)

_SHARES = {
    DISPARITY: ("k", "train/eval disparity"),
    BATCH_STATISTICS: ("r", "disparity against plain batch statistics"),
    CLIPPED: ("b", "share of clipped channels"),
}
_CORRECTIONS = {
    ABS_LOG_R: ("c", "mean |log r|"),
    ABS_D: ("m", "mean |d|"),
}


class NormLogger(LocalLogger):
    """Keeps this package's keys as nnU-Net's logger keeps its own: one value per epoch, in checkpoints, on W&B."""

    def register(self, keys: Iterable[str], num_epochs: int) -> None:
        """Make ``keys`` known; epochs that were trained before a key existed have NaN for it.

        Args:
            keys: Names of the values.
            num_epochs: Epochs already in the log.
        """
        for key in keys:
            values = self.my_fantastic_logging.setdefault(key, [])
            values.extend([float("nan")] * (num_epochs - len(values)))

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw nnU-Net's picture and put a panel with the norm's curves below it."""
        super().plot_progress_png(output_folder)
        path = Path(output_folder) / "progress.png"
        with Image.open(path) as picture:
            above = picture.convert("RGB")
        panel = self._panel(above.width)
        whole = Image.new("RGB", (above.width, above.height + panel.height), "white")
        whole.paste(above, (0, 0))
        whole.paste(panel, (0, above.height))
        with written_beside(path) as beside:
            whole.save(beside, compress_level=1)  # 20 million pixels, after every epoch

    def _panel(self, width: int) -> Image.Image:
        fig, ax = plt.subplots(figsize=(30, 18))
        for axis, curves, ylabel, place in (
            (ax, _SHARES, "1 - Dice, or share of channels", (0, 1)),
            (ax.twinx(), _CORRECTIONS, "mean |log r|, mean |d|", (0.7, 1)),
        ):
            for key, (color, label) in curves.items():
                values = self.my_fantastic_logging.get(key, [])
                if np.isfinite(np.asarray(values, dtype=float)).any():
                    marker = "." * (len(values) == 1)
                    axis.plot(range(len(values)), values, color=color, label=label, linewidth=4, marker=marker)
            axis.set_ylabel(ylabel)
            axis.set_ylim(bottom=0)
            if axis.lines:
                axis.legend(loc=place, ncols=2)
        ax.set_xlabel("epoch")
        plt.tight_layout()
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png")
        plt.close(fig)
        with Image.open(buffer) as panel:
            return panel.convert("RGB").resize((width, panel.height * width // panel.width))
