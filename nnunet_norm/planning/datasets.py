"""Datasets as nnU-Net finds them, or a refusal in one line."""

from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_norm.errors import SetupError


def require_folders(*folders: Any) -> None:
    """Refuse to go on without nnU-Net's folders.

    Args:
        folders: of ``nnunetv2.paths``.

    Raises:
        SetupError: the variable of one is not set.
    """
    for folder in folders:
        if not folder.is_set():
            raise SetupError(f"{folder.env_var_name} is not set; export it as nnU-Net's documentation says")


def dataset_name(name_or_id: str, said: str = "dataset") -> str:
    """A dataset's full name, by nnU-Net's own conversion.

    Args:
        name_or_id: of the user.
        said: how it was given, for the message.

    Raises:
        SetupError: there is none, or more than one.
    """
    try:
        return str(maybe_convert_to_dataset_name(name_or_id))
    except (RuntimeError, ValueError) as error:  # what nnU-Net raises for no, several or a misspelt dataset
        raise SetupError(f"{said} {name_or_id}: {' '.join(str(error).split())}") from error
