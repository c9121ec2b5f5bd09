"""Named recipes over :mod:`nnunet_norm.planning`."""
