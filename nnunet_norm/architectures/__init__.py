"""Networks that are no U-Net of the plans, by the word that trainers' names have for them."""

from nnunet_norm.architectures.unetr import (
    LEARNING_RATE,
    TOKEN,
    UNETR,
    build_unetr,
    is_unetr,
    refuse_patch,
    trains_unetr,
)

ARCHITECTURES = (UNETR,)
"""What a trainer's name may say behind the norm."""

__all__ = [
    "ARCHITECTURES",
    "LEARNING_RATE",
    "TOKEN",
    "UNETR",
    "build_unetr",
    "is_unetr",
    "refuse_patch",
    "trains_unetr",
]
