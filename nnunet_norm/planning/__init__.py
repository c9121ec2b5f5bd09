"""Deriving plans from plans: see :func:`derive_plans`, :func:`load_plans` and :func:`save_plans`."""

from nnunet_norm.planning.configurations import cascade, check_configuration, resolve_configuration
from nnunet_norm.planning.derive import derive_plans
from nnunet_norm.planning.files import load_plans, save_plans

__all__ = ["cascade", "check_configuration", "derive_plans", "load_plans", "resolve_configuration", "save_plans"]
