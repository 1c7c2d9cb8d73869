"""Trained models that come with the package, by name."""

from __future__ import annotations

import pathlib

from diladiff_jax import files

FOLDER = pathlib.Path(__file__).parents[1] / "released"
"""One bundle per model, each with a model card, `README.md`."""


def models() -> tuple[str, ...]:
    """Names of the trained models that come with the package, for `load`."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/bundle.json")))


def locate(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder that a path or the name of a released model means.

    A folder of that name in the current directory takes precedence.
    """
    path = files.expand(workdir)
    if str(workdir) in models() and not path.exists():
        return FOLDER / str(workdir)
    return path
