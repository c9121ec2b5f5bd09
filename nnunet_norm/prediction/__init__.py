"""Prediction without seams: nnU-Net's predictor with halo-cut tiles in place of overlapping, blended ones."""

from nnunet_norm.prediction.export import export_prediction_atomically
from nnunet_norm.prediction.halo import Decision
from nnunet_norm.prediction.mismatch import measure_tile_pairs
from nnunet_norm.prediction.predictor import HaloPredictor

__all__ = ["Decision", "HaloPredictor", "export_prediction_atomically", "measure_tile_pairs"]
