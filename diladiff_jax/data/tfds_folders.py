"""Opens folders that TFDS has prepared, without executing anything that their files name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diladiff_jax.data.errors import DataError

_TRUSTED = "tensorflow_datasets.core.features."


def prepared_folder(folder: Path) -> Any:
    """The TFDS builder of a dataset that was prepared in `folder`.

    TFDS imports the module of every class that `features.json` names, so the file is checked
    before TFDS reads it.

    Raises:
      DataError: `folder` holds no such dataset, or one with features of classes outside TFDS.
    """
    import tensorflow_datasets as tfds

    path = folder / "features.json"
    try:
        foreign = _foreign_classes(json.loads(path.read_text()))
        if not foreign:
            return tfds.builder_from_directory(str(folder))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} is not a dataset that TFDS has prepared "
            f"({type(error).__name__}: {str(error)[:200]}). Prepare it again."
        ) from error
    raise DataError(
        f"{path} names the class {foreign[0][:100]!r}, which would be imported; "
        f"expected only classes of {_TRUSTED}*"
    )


def _foreign_classes(description: Any) -> list[str]:
    """The classes outside TFDS that a features.json names, in its present or its old format."""
    if isinstance(description, str) and description.lstrip().startswith("{"):
        return _foreign_classes(json.loads(description))  # the old format nests JSON in a string
    if isinstance(description, list):
        return [name for part in description for name in _foreign_classes(part)]
    if not isinstance(description, dict):
        return []
    named = [
        description[key]
        for key in ("pythonClassName", "python_class_name", "type")
        if isinstance(description.get(key), str)
    ]
    inner = [name for part in description.values() for name in _foreign_classes(part)]
    return [name for name in named if not name.startswith(_TRUSTED)] + inner
