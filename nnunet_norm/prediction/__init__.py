"""Prediction without seams: nnU-Net's predictor with halos, per stage or per tile, in place of blended tiles."""

from nnunet_norm.prediction.export import export_prediction_atomically
from nnunet_norm.prediction.mismatch import measure_block_pairs, measure_tile_pairs
from nnunet_norm.prediction.predictor import HaloPredictor
from nnunet_norm.prediction.stages_plan import StagesPlan
from nnunet_norm.prediction.tiles_plan import TilesPlan

__all__ = [
    "HaloPredictor",
    "StagesPlan",
    "TilesPlan",
    "export_prediction_atomically",
    "measure_block_pairs",
    "measure_tile_pairs",
]
