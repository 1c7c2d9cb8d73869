"""Published vocabularies: those of BERT (WordPiece) and of GPT-2 (byte-level BPE)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.tokenizers.base import SPECIAL_TEXTS, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

_NOT_BYTE_LEVEL = (
    "not a byte-level BPE vocabulary ({}), expected vocab.json and the merges.txt that belongs to"
    " it"
)


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
        from tokenizers import pre_tokenizers

        try:
            ids = json.loads(_utf8(vocabulary, "vocab.json"))
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("ids are not 0, 1, 2 ...")
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise DataError(_NOT_BYTE_LEVEL.format(error)) from error
        self._engine = byte_level_bpe(ids, _utf8(vocabulary, "merges.txt").split("\n"))
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

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int], initial: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _piece(self, index: int) -> str:
        return self._words[index]


def byte_level_bpe(
    ids: Mapping[str, int], merges: Iterable[str], *, split_digits: bool = False
) -> Engine:
    """The engine of a byte-level BPE: GPT-2's, or SmolLM's if `split_digits`.

    Args:
      ids: the id of each piece, whose characters stand for bytes.
      merges: the two pieces of each merge, separated by a space. Empty lines and a first line with
        the version are ignored.
      split_digits: whether each digit is a word of its own.

    Raises:
      DataError: the merges do not belong to the vocabulary.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    try:
        pairs: list[Any] = [
            tuple(line.split(" ")) for line in merges if line and not line.startswith("#version")
        ]
        engine = Engine(models.BPE(dict(ids), pairs))
    except Exception as error:  # the engine raises plain Exceptions
        raise DataError(_NOT_BYTE_LEVEL.format(error)) from error
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.pre_tokenizer = words
    if split_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        engine.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    engine.decoder = decoders.ByteLevel()
    return engine


def _utf8(vocabulary: Mapping[str, bytes], name: str) -> str:
    try:
        return vocabulary[name].decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from error
