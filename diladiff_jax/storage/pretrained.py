"""Published networks from files: config.json, model.safetensors and a vocabulary.

The files come from a folder or from the Hugging Face hub. Nothing is downloaded unless a hub name
is given in place of a folder, and no pickled file is ever opened.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from diladiff_jax import files
from diladiff_jax.nn import bert
from diladiff_jax.storage.errors import PretrainedError

ENCODER_FILES = ("config.json", "vocab.txt", "model.safetensors")
SCORER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_REASON_LENGTH = 200


def locate(path: str, names: tuple[str, ...]) -> pathlib.Path:
    """Finds a published network's folder, and downloads it if `path` is a hub name.

    Args:
      path: a folder; or a hub name, "owner/name" or just "name" for the oldest models.
      names: the files to download.

    Returns:
      The folder, or the hub client's local copy.

    Raises:
      PretrainedError: `path` is neither, or the download failed.
    """
    folder = files.expand(path)
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(path):
        raise PretrainedError(
            f"{path} is not a folder, expected one with {', '.join(names)}, "
            f"or a hub name such as google-bert/bert-base-uncased."
        )
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=list(names)))
    except Exception as error:  # the hub client, its HTTP library and the OS all raise their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PretrainedError(
            f"{path} is not a folder, and downloading it from the hub failed "
            f"({lines[0][:_REASON_LENGTH]}). Give a folder with {', '.join(names)}."
        ) from error


def adopt(path: str, directory: str | os.PathLike[str]) -> None:
    """Copies a published encoder's files into `directory`; does nothing if that exists.

    Args:
      path: a folder or hub name, see `locate`.
      directory: the folder to create.

    Raises:
      PretrainedError: as `locate`; or a file is missing or cannot be copied.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        return
    source = locate(path, ENCODER_FILES)
    expected = f"an encoder's folder has {', '.join(ENCODER_FILES)}"
    try:
        with files.atomic_folder(directory) as temporary:
            for name in ENCODER_FILES:
                if not (source / name).is_file():
                    raise PretrainedError(
                        f"{source / name} is missing or not a regular file; {expected}."
                    )
                shutil.copyfile(source / name, temporary / name)
    except OSError as error:
        raise PretrainedError(
            f"{error.filename or directory} cannot be copied ({error.strerror}); {expected}."
        ) from None


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `config.json` of a published network's folder.

    Raises:
      PretrainedError: the file is missing, or is not one JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror}); a published network's folder has "
            f"config.json and model.safetensors."
        ) from None
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not JSON ({error}). Restore it.") from None
    if not isinstance(config, dict):
        raise PretrainedError(f"{path}: got {type(config).__name__}, expected one JSON object.")
    return config


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads `model.safetensors` of a published network's folder.

    The safetensors library validates each tensor's offset and size against the header.

    Returns:
      The tensors by name, as arrays on the host.

    Raises:
      PretrainedError: the file is missing, or is not a complete safetensors file.
    """
    import safetensors
    from safetensors.numpy import load_file

    path = pathlib.Path(folder) / "model.safetensors"
    try:
        return load_file(path)
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror or error}), expected all weights in one "
            f"safetensors file of that name. Other formats are not supported."
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise PretrainedError(
            f"{path} is not a complete safetensors file ({error}). Copy or download it again."
        ) from None


def read_vocabulary(folder: str | os.PathLike[str]) -> list[str]:
    """Reads the pieces in `vocab.txt`, in the order of their ids.

    Raises:
      PretrainedError: the file is missing, or lacks [CLS] or [SEP].
    """
    path = pathlib.Path(folder) / "vocab.txt"
    try:
        words = (
            path.read_text(encoding="utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainedError(
            f"{path} cannot be read ({error}), expected one piece per line."
        ) from None
    for word in ("[CLS]", "[SEP]"):
        if word not in words:
            raise PretrainedError(f"{path} has no piece {word}, expected the vocabulary of a BERT.")
    return words


def load_encoder(folder: str | os.PathLike[str], dtype: Any) -> bert.Bert:
    """Builds the network of an encoder's folder, without its parameters.

    Args:
      folder: a folder with `ENCODER_FILES`.
      dtype: the dtype to compute in.

    Raises:
      PretrainedError: a file is missing or damaged, or the architecture is not supported.
    """
    words = read_vocabulary(folder)
    config = read_config(folder)
    specials = {"cls_id": words.index("[CLS]"), "sep_id": words.index("[SEP]")}
    return in_one_line(
        pathlib.Path(folder) / "config.json",
        lambda: bert.from_config(config, pieces=len(words), dtype=dtype, **specials),
    )


def encoder_parameters(folder: str | os.PathLike[str], network: bert.Bert) -> dict[str, Any]:
    """Reads an encoder's parameters as float32 numpy arrays on the host.

    Raises:
      PretrainedError: the weights are missing or damaged, or do not fit `network`.
    """
    tensors = read_tensors(folder)
    return in_one_line(
        pathlib.Path(folder) / "model.safetensors", lambda: bert.parameters(tensors, network)
    )


def in_one_line(path: pathlib.Path, build: Callable[[], Any]) -> Any:
    """Turns what a network's own checks raise into an error that names the file.

    Raises:
      PretrainedError: `build` raises a ValueError.
    """
    try:
        return build()
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}") from None
