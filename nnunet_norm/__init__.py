"""Normalization without seams for nnU-Net.

Trainers that replace InstanceNorm, plans derived from plans, and a predictor without seams. The public names stand in the
subpackages (``nnunet_norm.layers``, ``nnunet_norm.prediction``, ...); importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
