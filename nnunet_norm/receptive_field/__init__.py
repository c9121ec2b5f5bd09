"""How far a network looks: its theoretical reach, traced through the real module, and its effective one, measured."""

from nnunet_norm.receptive_field.effective import EffectiveField, effective, measure_effective
from nnunet_norm.receptive_field.trace import ReceptiveField, theoretical, trace, trace_at

__all__ = ["EffectiveField", "ReceptiveField", "effective", "measure_effective", "theoretical", "trace", "trace_at"]
