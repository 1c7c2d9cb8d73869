"""The settings of a bundle may not point to anything outside it."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from diladiff_jax.config import Config
from diladiff_jax.storage.bundles.format import bundle_error, quoted
from diladiff_jax.storage.errors import CheckpointError

_EMPTY = ("evaluation.scorer", "data.directory")
"""Settings that would make the library download, read or write something unasked."""

_NAME_ONLY = ("data.files", "data.validation_files", "tokenizer.file", "features.path")
"""Settings that keep the last part of a path, for people to read."""

_CORPUS = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)?(:\d[\d.]*)?")
"""A name as TFDS has them, such as "wiki40b/en:1.3.0"."""


def check_settings(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Checks that a stranger's settings stay inside the bundle.

    Raises:
      CheckpointError: a setting would make the library download something, or read or write
        outside the bundle.
    """
    for key in _EMPTY:
        if value := _get(settings, key):
            raise _setting_error(
                folder, key, value, "an empty value, because nothing is downloaded, read or written"
            )
    for key in _NAME_ONLY:
        value = _get(settings, key)
        if "/" in value or "\\" in value or value in (".", "..") or value.startswith("~"):
            raise _setting_error(folder, key, value, "the last part of a path")
    if not _CORPUS.fullmatch(corpus := _get(settings, "data.corpus")):
        raise _setting_error(folder, "data.corpus", corpus, "a name and not a folder")


def portable_settings(config: Config) -> dict[str, Any]:
    """The experiment's settings without the paths of this machine, as `check_settings` wants."""
    settings = config.to_dict()
    for block, name in (key.split(".") for key in _EMPTY):
        settings[block][name] = ""
    for block, name in (key.split(".") for key in _NAME_ONLY):
        last = pathlib.PurePath(settings[block][name]).name
        settings[block][name] = last.replace("\\", "_").lstrip("~")
    corpus = settings["data"]["corpus"]
    if not _CORPUS.fullmatch(corpus):  # the folder of a prepared dataset
        name = re.sub(r"[^\w.+-]", "_", pathlib.PurePath(corpus).name).lstrip(".+-")
        settings["data"]["corpus"] = name or "folder"
    return settings


def _setting_error(folder: pathlib.Path, key: str, value: str, expected: str) -> CheckpointError:
    return bundle_error(folder, f"config.json: {key}: got {quoted(value)}, expected {expected}")


def _get(settings: Mapping[str, Any], key: str) -> Any:
    block, name = key.split(".")
    return settings[block][name]
