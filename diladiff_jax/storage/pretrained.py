"""Published networks from files: config.json, model.safetensors and a vocabulary, in a folder or on the Hugging Face hub.

Nothing is downloaded unless a hub name is given where a folder could stand, and no pickled file is ever opened.
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
from diladiff_jax.nn import bert, gpt2

ENCODER_FILES = ("config.json", "vocab.txt", "model.safetensors")
SCORER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")


class PretrainedError(RuntimeError):
    """A published network that is missing or cannot be read: one line that says which file, what is wrong, what would be right."""


def locate(path: str, names: tuple[str, ...]) -> pathlib.Path:
    """The folder `path`; or, where it is a hub name ("owner/name", or "name" for the oldest) and no folder, the hub's files `names`, downloaded.

    Raises:
      PretrainedError: neither, or the download failed.
    """
    folder = files.expand(path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise PretrainedError(
            f"{path} is not a folder; give one with {', '.join(names)}, or a hub name such as google-bert/bert-base-uncased"
        )
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=list(names)))
    except (
        Exception
    ) as error:  # the hub's client, its HTTP library and the system each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise PretrainedError(
            f"{path} is no folder here, and could not be had from the hub under that name ({reason}); give a folder with {', '.join(names)}"
        ) from error


def adopt(path: str, directory: str | os.PathLike[str]) -> None:
    """Copies an encoder's files from `path` (see `locate`) into `directory`, aside and then renamed; one that is there already stays.

    Raises:
      PretrainedError: as `locate`; or a file is missing, or cannot be copied.
    """
    directory = pathlib.Path(directory)
    if directory.exists():
        return
    found = locate(path, ENCODER_FILES)
    aside = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name in ENCODER_FILES:
            if not (found / name).is_file():
                raise PretrainedError(
                    f"{found / name} is missing, or no regular file; an encoder's folder holds {', '.join(ENCODER_FILES)}"
                )
            shutil.copyfile(found / name, aside / name)
        aside.rename(directory)
    except OSError as error:
        raise PretrainedError(
            f"{error.filename} cannot be copied ({error.strerror}); an encoder's folder holds {', '.join(ENCODER_FILES)}"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
      PretrainedError: missing, or not one JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror}); a published network's folder holds config.json and model.safetensors"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not JSON ({error}); restore it") from None
    if not isinstance(config, dict):
        raise PretrainedError(f"{path} holds {type(config).__name__}; it must be one JSON object")
    return config


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """`model.safetensors` of a folder; the format's own reader holds every tensor's place and size against the header.

    Raises:
      PretrainedError: missing, or not a whole safetensors file.
    """
    import safetensors
    from safetensors.numpy import load_file

    path = pathlib.Path(folder) / "model.safetensors"
    try:
        return load_file(path)
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror or error}); weights must be one safetensors file of that name (others are never opened)"
        ) from None
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise PretrainedError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from None


def read_vocabulary(folder: str | os.PathLike[str]) -> list[str]:
    """The pieces of `vocab.txt`, by id.

    Raises:
      PretrainedError: missing, or without [CLS] and [SEP].
    """
    path = pathlib.Path(folder) / "vocab.txt"
    try:
        words = (
            path.read_text(encoding="utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise PretrainedError(
            f"{path} cannot be read ({error}); it must hold one piece a line"
        ) from None
    for word in ("[CLS]", "[SEP]"):
        if word not in words:
            raise PretrainedError(
                f"{path} has no piece {word}; it must be the vocabulary of a BERT"
            )
    return words


def load_encoder(folder: str | os.PathLike[str], dtype: Any) -> bert.Bert:
    """The network of an encoder's folder, without its parameters.

    Raises:
      PretrainedError: files that are missing, damaged, or of another architecture.
    """
    words = read_vocabulary(folder)
    config = read_config(folder)
    specials = {"cls_id": words.index("[CLS]"), "sep_id": words.index("[SEP]")}
    return _in_one_line(
        pathlib.Path(folder) / "config.json",
        lambda: bert.from_config(config, pieces=len(words), dtype=dtype, **specials),
    )


def encoder_parameters(folder: str | os.PathLike[str], network: bert.Bert) -> dict[str, Any]:
    """The encoder's parameters as numpy arrays on the host, float32.

    Raises:
      PretrainedError: weights that are missing, damaged, or not those of `network`.
    """
    tensors = read_tensors(folder)
    return _in_one_line(
        pathlib.Path(folder) / "model.safetensors", lambda: bert.parameters(tensors, network)
    )


def load_scorer(
    folder: str | os.PathLike[str], dtype: Any = np.float32
) -> tuple[gpt2.GPT2, dict[str, Any]]:
    """A GPT-2's network and parameters (numpy arrays on the host, float32).

    Raises:
      PretrainedError: files that are missing, damaged, or of another architecture.
    """
    config, folder = read_config(folder), pathlib.Path(folder)
    network = _in_one_line(folder / "config.json", lambda: gpt2.from_config(config, dtype=dtype))
    tensors = read_tensors(folder)
    return network, _in_one_line(
        folder / "model.safetensors", lambda: gpt2.parameters(tensors, network)
    )


def _in_one_line(path: pathlib.Path, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}") from None
