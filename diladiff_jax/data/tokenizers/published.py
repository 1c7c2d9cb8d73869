"""Published vocabularies: those of BERT (WordPiece) and of GPT-2 (byte-level BPE)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.tokenizers.base import SPECIAL_TEXTS, Tokenizer


class WordPiece(Tokenizer):
    """BERT's vocab.txt with BERT's own splitting of words.

    `lowercase` also strips accents, as BERT's uncased models do.
    """

    _writes_spaces = False

    def __init__(self, kind: str, lowercase: bool, vocabulary: Mapping[str, bytes]):
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        words = _utf8(vocabulary, "vocab.txt").replace("\r\n", "\n").removesuffix("\n").split("\n")
        ids = {word: i for i, word in enumerate(words)}
        if "[UNK]" not in ids or len(ids) != len(words):
            raise DataError("vocab.txt: expected one distinct token per line, [UNK] among them")
        # [UNK] is sampleable: it occurs in text, whose loss would be infinite otherwise.
        unsampleable = [
            i for w, i in ids.items() if re.fullmatch(r"\[(unused\d+|CLS|SEP|PAD|MASK)\]", w)
        ]
        super().__init__(
            kind,
            lowercase,
            vocabulary,
            len(words),
            {"pad": ids.get("[PAD]"), "mask": ids.get("[MASK]"), "eot": ids.get("[SEP]")},
            unsampleable,
        )
        self._words = words
        self._engine = Engine(models.WordPiece(ids, unk_token="[UNK]"))
        self._engine.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self._engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._engine.decoder = decoders.WordPiece()

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int], initial: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _piece(self, index: int) -> str:
        return self._words[index]


class ByteBPE(Tokenizer):
    """GPT-2's vocab.json and merges.txt, which are lossless for all Unicode text."""

    _writes_spaces = True

    def __init__(self, kind: str, lowercase: bool, vocabulary: Mapping[str, bytes]):
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers

        try:
            ids = json.loads(_utf8(vocabulary, "vocab.json"))
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("ids are not 0, 1, 2 ...")
            lines = _utf8(vocabulary, "merges.txt").split("\n")
            merges: list[Any] = [
                tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
            ]
            self._engine = Engine(models.BPE(ids, merges))
        except Exception as error:  # the engine raises plain Exceptions
            raise DataError(
                f"not a byte-level BPE vocabulary ({error}), "
                "expected vocab.json and the merges.txt that belongs to it"
            ) from error
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if not set(alphabet) <= ids.keys():
            missing = len(set(alphabet) - ids.keys())
            raise DataError(f"vocab.json lacks {missing} of the 256 byte symbols")
        super().__init__(
            kind,
            lowercase,
            vocabulary,
            len(ids),
            {"pad": None, "mask": None, "eot": ids.get(SPECIAL_TEXTS["eot"])},
            [],
        )
        self._words = sorted(ids, key=ids.__getitem__)
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._engine.decoder = decoders.ByteLevel()

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int], initial: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _piece(self, index: int) -> str:
        return self._words[index]


def _utf8(vocabulary: Mapping[str, bytes], name: str) -> str:
    try:
        return vocabulary[name].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from error
