"""The interface of all tokenizers, and the layout of their ids.

The vocabulary's own ids come first, then ids for those of pad, mask and eot that it lacks, then
unused ids up to a multiple of 128, so that embedding tables divide evenly over devices.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diladiff_jax import files
from diladiff_jax.data.errors import DataError

MASK_TEXT = "[MASK]"
"""How a masked token is written in text."""

SPECIAL_TEXTS = {"pad": "[PAD]", "mask": MASK_TEXT, "eot": "<|endoftext|>"}
"""The special tokens of every tokenizer, and how they are written if a vocabulary lacks them."""

_MULTIPLE = 128


class Tokenizer(abc.ABC):
    """Converts text to token ids and back.

    Attributes:
      kind: 'unigram', 'bpe', 'wordpiece', 'byte_bpe' or 'sentencepiece'.
      lowercase: whether text is converted to lower case before it is encoded.
      vocab_size: the number of ids, rounded up to a multiple of 128.
      pad_id, mask_id, eot_id: the special ids.
      sampleable: bool [vocab_size], the ids that a sampler may emit: text pieces and eot.
    """

    def __init__(
        self,
        kind: str,
        lowercase: bool,
        vocabulary: Mapping[str, bytes],
        size: int,
        specials: Mapping[str, int | None],
        unsampleable: Iterable[int],
    ):
        """Lays out the ids.

        Args:
          kind: see the attributes.
          lowercase: see the attributes.
          vocabulary: the vocabulary files, as bytes by name.
          size: number of ids in the vocabulary itself.
          specials: its ids of 'pad', 'mask' and 'eot'; None for one that it lacks.
          unsampleable: more ids that a sampler must not emit.
        """
        self.kind = kind
        self.lowercase = lowercase
        self._files = dict(vocabulary)
        ids, end = {}, size
        for name in SPECIAL_TEXTS:
            own = specials[name]
            ids[name], end = (end, end + 1) if own is None else (own, end)
        self._size = size
        self.pad_id, self.mask_id, self.eot_id = ids["pad"], ids["mask"], ids["eot"]
        self.vocab_size = math.ceil(end / _MULTIPLE) * _MULTIPLE
        self.sampleable = np.arange(self.vocab_size) < size
        self.sampleable[[*unsampleable, self.pad_id, self.mask_id]] = False
        self.sampleable[self.eot_id] = True
        self.sampleable.flags.writeable = False

    def encode(self, text: str) -> np.ndarray:
        """The token ids of a text: int32 [n], without eot.

        Raises:
          DataError: the text has lone surrogates.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel if the tokenizer supports it. Raises as that does."""
        return [
            np.asarray(ids, np.int32)
            for ids in self._encode([self._checked(t) for t in texts], initial=True)
        ]

    def encode_masked(self, text: str) -> np.ndarray:
        """The token ids of a text with masks: int32 [n].

        Each '[MASK]', together with the space before it, becomes one masked token.

        Raises:
          DataError: the text has lone surrogates.
        """
        first, *rest = map(self._checked, re.split(r" ?\[MASK\]", text))
        ids = list(self._encode([first], initial=True)[0])
        for part in self._encode(rest, initial=False):
            ids += [self.mask_id, *part]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids: masked tokens as '[MASK]', one line per document (eot ends one).

        Raises:
          DataError: ids outside the vocabulary.
        """
        return "\n".join(self.documents(ids))

    def raw_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids with `<|endoftext|>` for each run of eot, as scorers read it.

        Raises:
          DataError: ids outside the vocabulary.
        """
        ids = self._known(ids)
        ends = np.flatnonzero(ids == self.eot_id)
        runs = np.split(ids, ends[np.diff(ends, prepend=-2) > 1])
        return SPECIAL_TEXTS["eot"].join(self.decode(run) for run in runs)

    def documents(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each document, that is, each non-empty run of ids between eots.

        Pad and unused ids are dropped.

        Raises:
          DataError: ids outside the vocabulary.
        """
        ids = self._known(ids)
        ids = ids[self.sampleable[ids] | (ids == self.mask_id)]
        runs = np.split(ids, np.flatnonzero(ids == self.eot_id))
        return [self._text(run) for run in (r[r != self.eot_id] for r in runs) if len(run)]

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The vocabulary entry of each id.

        Raises:
          DataError: ids outside the vocabulary.
        """
        names = {
            self.pad_id: SPECIAL_TEXTS["pad"],
            self.mask_id: SPECIAL_TEXTS["mask"],
            self.eot_id: SPECIAL_TEXTS["eot"],
        }
        return [
            self._piece(i) if i < self._size else names.get(i, "[UNUSED]")
            for i in self._known(ids).tolist()
        ]

    def save(
        self, directory: str | os.PathLike[str], source: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the vocabulary files and `tokenizer.json` to a folder, which appears complete.

        Args:
          directory: the folder to make.
          source: a note in `tokenizer.json` on where the tokenizer came from.

        Raises:
          DataError: the folder exists already.
        """
        directory = files.expand(directory)
        if directory.exists():
            raise DataError(f"{directory} exists already. Save the tokenizer elsewhere.")
        record = {
            "format": 1,
            "kind": self.kind,
            "lowercase": self.lowercase,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "mask_id": self.mask_id,
            "eot_id": self.eot_id,
            "sha256": self.file_hashes(),
            "source": dict(source or {}),
        }
        with files.atomic_folder(directory) as temporary:
            for name, data in self._files.items():
                (temporary / name).write_bytes(data)
            (temporary / "tokenizer.json").write_text(json.dumps(record, indent=2) + "\n")

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of each vocabulary file."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}

    def _checked(self, text: str) -> str:
        """The text that is encoded: valid Unicode, in lower case if `lowercase`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text: got a lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, expected valid Unicode"
            ) from error
        return text.lower() if self.lowercase else text

    def _known(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids, int64 [n], if all are in the vocabulary."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise DataError(
                f"token ids: got {ids.min()} to {ids.max()}, expected 0 to {self.vocab_size - 1}"
            )
        return ids

    def _text(self, ids: np.ndarray) -> str:
        """The text of one document, with masks."""
        first, *rest = np.split(ids, np.flatnonzero(ids == self.mask_id))
        text = self._decode(first.tolist(), initial=True)
        for part in rest:
            text += " " * bool(text and not text[-1].isspace()) + MASK_TEXT
            after = self._decode(part[1:].tolist(), initial=False)
            text += " " * bool(not self._writes_spaces and after[:1].isalnum()) + after
        return text

    _writes_spaces: bool  # whether decoded text keeps the space before its first word

    @abc.abstractmethod
    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        """The ids of each text, which starts a document (`initial`) or follows a mask."""

    @abc.abstractmethod
    def _decode(self, ids: list[int], initial: bool) -> str:
        """The text of ids, which start a document (`initial`) or follow a mask."""

    @abc.abstractmethod
    def _piece(self, index: int) -> str:
        """The vocabulary entry of an id."""
