"""The table of tokenizer kinds, and how tokenizers are read from files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import FROM_FILE
from diladiff_jax.data.tokenizers.base import Tokenizer
from diladiff_jax.data.tokenizers.published import ByteBPE, WordPiece
from diladiff_jax.data.tokenizers.sentence_piece import SentencePiece
from diladiff_jax.files import expand

KINDS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "unigram": (SentencePiece, ("sentencepiece.model",)),
    "bpe": (SentencePiece, ("sentencepiece.model",)),
    "wordpiece": (WordPiece, ("vocab.txt",)),
    "byte_bpe": (ByteBPE, ("vocab.json", "merges.txt")),
    "sentencepiece": (SentencePiece, ("sentencepiece.model",)),
}
"""For each kind, its class and its vocabulary files."""


def load(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
      DataError: there is none, or its files are damaged or do not belong together.
    """
    directory = expand(directory)
    try:
        record = json.loads((directory / "tokenizer.json").read_text())
        build, names = KINDS[record["kind"]]
        vocabulary = {name: (directory / name).read_bytes() for name in names}
        for name, data in vocabulary.items():
            if hashlib.sha256(data).hexdigest() != record["sha256"][name]:
                raise DataError(
                    f"{directory / name} differs from the file that was saved. "
                    "Restore it, or train again."
                )
        tokenizer = build(record["kind"], record["lowercase"], vocabulary)
        for name in ("vocab_size", "pad_id", "mask_id", "eot_id"):
            if getattr(tokenizer, name) != record[name]:
                raise DataError(
                    f"{directory}: {name} is {getattr(tokenizer, name)}, expected {record[name]} "
                    "as in tokenizer.json"
                )
    except DataError:
        raise
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(
            f"{error.filename}: {reason}, expected a tokenizer saved in {directory}"
        ) from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _not_a_record(directory / "tokenizer.json", error) from error
    return tokenizer


def vocabulary_files(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the vocabulary files of the tokenizer saved in a folder.

    Raises:
      DataError: the folder holds no tokenizer.
    """
    path = Path(directory) / "tokenizer.json"
    try:
        return KINDS[json.loads(path.read_text())["kind"]][1]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise _not_a_record(path, error) from error


def source(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The note on its origin that a tokenizer was saved with; empty if there is none."""
    found = json.loads((Path(directory) / "tokenizer.json").read_text()).get("source")
    return found if isinstance(found, dict) else {}


def from_vocabulary(path: str | os.PathLike[str], kind: str, lowercase: bool = False) -> Tokenizer:
    """A tokenizer from a published vocabulary.

    Args:
      path: vocab.txt ('wordpiece'), NAMEvocab.json beside NAMEmerges.txt ('byte_bpe'), or a .model
        file ('sentencepiece').
      kind: one of these.
      lowercase: convert text to lower case first ('wordpiece': and strip accents).

    Raises:
      DataError: another kind, or files that are missing or not of that kind.
    """
    if kind not in FROM_FILE:
        raise DataError(
            f"tokenizer.kind: got {kind!r}, which is not read from a file, "
            f"expected one of {', '.join(FROM_FILE)}"
        )
    build, names = KINDS[kind]
    path = expand(path)
    paths = [path]
    if kind == "byte_bpe":
        if not path.name.endswith("vocab.json"):
            raise DataError(
                f"tokenizer.file: got {path}, expected a name that ends in vocab.json, "
                "with merges.txt beside it"
            )
        paths.append(path.with_name(path.name.removesuffix("vocab.json") + "merges.txt"))
    try:
        vocabulary = {name: p.read_bytes() for name, p in zip(names, paths, strict=True)}
        return build(kind, lowercase, vocabulary)
    except OSError as error:
        raise DataError(
            f"tokenizer.file={path}: cannot read {error.filename} ({error.strerror})"
        ) from error
    except DataError as error:
        raise DataError(f"tokenizer.file={path}: {error}") from error


def _not_a_record(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not the record of a tokenizer ({type(error).__name__}: {str(error)[:100]})"
    )
