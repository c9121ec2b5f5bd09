"""Descriptions in JSON, or a refusal in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nnunet_norm.errors import NnunetNormError


def read_object(path: str | os.PathLike[str], refusal: type[NnunetNormError], remedy: str) -> dict[str, Any]:
    """A JSON file that holds an object: a plans.json or dataset.json.

    Args:
        path: of the file.
        refusal: what is raised.
        remedy: how its message ends.

    Raises:
        NnunetNormError: of the kind ``refusal``: the file is missing, cannot be read, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise refusal(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except ValueError as error:
        raise refusal(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise refusal(f"{path} is JSON, but no description of plans or a dataset: {remedy}")
    return found
