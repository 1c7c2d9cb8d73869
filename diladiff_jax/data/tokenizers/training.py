"""Trains SentencePiece tokenizers."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import TRAINED, TokenizerOptions
from diladiff_jax.data.tokenizers.base import SPECIAL_TEXTS, Tokenizer
from diladiff_jax.data.tokenizers.sentence_piece import SPACE_SYMBOL, SentencePiece

# A constant, because unigram training adds up sums per thread: another number of threads gives
# another vocabulary.
_THREADS = 4

MAX_DOCUMENTS = 100_000
MAX_CHARACTERS = 6_000_000
"""What a tokenizer is trained on at most, so that training ends within two minutes on two cores."""

_SECONDS = 15.0  # between lines of progress
_SHARE = 64  # a single document is at most this fraction of the characters, 1 in 64
_log = logging.getLogger(__name__)


def train(
    documents: Iterable[str],
    options: TokenizerOptions,
    max_documents: int = MAX_DOCUMENTS,
    max_characters: int = MAX_CHARACTERS,
) -> Tokenizer:
    """Trains a SentencePiece tokenizer. It is lossless for any Unicode text, unless `lowercase`.

    The same documents give the same vocabulary on any machine. Small corpora may give fewer pieces
    than requested.

    Args:
      documents: read in order until a limit is reached, so they may be an endless stream.
        `spread_sample` chooses documents from all parts of a corpus.
      options: `kind` ('unigram' or 'bpe'); `vocab_size`, which counts 256 bytes, unknown, pad, mask
        and eot, before it is rounded up to a multiple of 128; `lowercase`; and `whole_words`, the
        number of most frequent words that become pieces whatever the training prefers. The latter
        suits languages of few words, where one piece per word is wanted.
      max_documents: the number of documents that are read at most.
      max_characters: the number of characters that are read at most.

    Raises:
      DataError: a kind that cannot be trained, a vocabulary too small for the bytes and
        characters, or no text.
    """
    if options.kind not in TRAINED:
        raise DataError(
            f"tokenizer.kind: got {options.kind!r}, which cannot be trained, "
            f"expected one of {', '.join(TRAINED)}"
        )
    documents = itertools.islice(documents, max_documents)
    text = _training_text(documents, options.lowercase, max_characters)
    words: list[str] = []
    if options.whole_words:
        parts = list(text)  # their total size is limited
        words, text = _frequent_words(parts, options.whole_words), iter(parts)
    first = next(text, None)
    if first is None:
        raise DataError("no text to train a tokenizer on")
    model = _trained(itertools.chain([first], text), words, options)
    return SentencePiece(options.kind, options.lowercase, {"sentencepiece.model": model})


class Corpus(Protocol):
    """Documents that can be read in any order."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        """The documents with these indices."""
        ...


def spread_sample(
    documents: Corpus, max_documents: int = MAX_DOCUMENTS, max_characters: int = MAX_CHARACTERS
) -> list[str]:
    """Documents from all parts of a corpus, in its order; all of them if they are few enough.

    It is the same on every machine. The documents are chosen in an order whose every beginning is
    spread evenly over the corpus, so a file is sampled by its share of the documents, wherever it
    is in the corpus. Of a very long document, some parts from all over it are taken.

    Args:
      documents: the corpus.
      max_documents: number of documents at most.
      max_characters: number of characters at most, except that the last document is complete.
    """
    chosen: dict[int, str] = {}
    left, order = max_characters, iter(_spread_order(len(documents)))
    while left > 0 and len(chosen) < max_documents:
        batch = list(itertools.islice(order, min(1024, max_documents - len(chosen))))
        if not batch:
            break
        for index, text in zip(batch, documents.__getitems__(batch), strict=True):
            if left > 0:
                chosen[index] = text
                left -= min(len(text), max_characters // _SHARE)
    if left > 0 and sum(map(len, chosen.values())) <= max_characters:
        return [text for _, text in sorted(chosen.items())]
    limit = max_characters // _SHARE
    return [_parts_of(text, limit) for _, text in sorted(chosen.items())]


def _spread_order(count: int) -> Iterator[int]:
    """0 to `count - 1`, by their bits in reverse: van der Corput's sequence."""
    bits = max(count - 1, 0).bit_length()
    for i in range(1 << bits):
        if (index := int(f"{i:0{bits}b}"[::-1], 2) if bits else 0) < count:
            yield index


def _parts_of(text: str, limit: int, parts: int = 8) -> str:
    """A document, or `limit` of its characters in equally spaced parts."""
    if len(text) <= limit:
        return text
    size, gap = limit // parts, len(text) // parts
    return "\n".join(text[i * gap : i * gap + size] for i in range(parts))


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Logs what is being done and, every `_SECONDS`, for how long."""
    done, began = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(_SECONDS):
            _log.info("%s: %.0f s", what, time.monotonic() - began)

    _log.info("%s", what)
    thread = threading.Thread(target=report, name="tokenizer progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _trained(text: Iterator[str], words: list[str], options: TokenizerOptions) -> bytes:
    """The model that SentencePiece trains on `text`, in which each of `words` is a piece."""
    import sentencepiece

    model, parts = io.BytesIO(), list(text)
    characters = sum(map(len, parts))
    try:
        with _reported(f"training the tokenizer on {characters:,} characters"):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(parts),
                model_writer=model,
                model_type=options.kind,
                vocab_size=options.vocab_size - len(SPECIAL_TEXTS),
                hard_vocab_limit=False,
                byte_fallback=True,
                user_defined_symbols=words,
                character_coverage=0.99995,  # rarer characters are spelled in bytes
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=_THREADS,
                minloglevel=2,
            )
    except RuntimeError as error:
        reason = re.sub(r"^.*\)\] ", "", str(error))  # without the position in its source
        if small := re.search(r"required_chars\. (\d+) vs (\d+)", reason):
            raise DataError(
                f"tokenizer.vocab_size: got {options.vocab_size}, expected at least "
                f"{int(small[2]) + len(SPECIAL_TEXTS)}: 256 bytes, special ids, and every "
                f"character of the text that is not very rare. Raise it."
            ) from error
        raise DataError(
            f"tokenizer.vocab_size={options.vocab_size}: SentencePiece cannot train it ({reason})"
        ) from error
    return model.getvalue()


def _frequent_words(parts: list[str], count: int) -> list[str]:
    """The most frequent words with the space before them, as SentencePiece writes it."""
    counts = collections.Counter(word for part in parts for word in re.findall(r" \w+", part))
    # By count and then by spelling, so that ties do not depend on the order of the documents.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word.replace(" ", SPACE_SYMBOL) for word, _ in ranked[:count]]


def _training_text(documents: Iterable[str], lowercase: bool, max_characters: int) -> Iterator[str]:
    """The documents as `encode` sees them, cut before spaces to what SentencePiece accepts.

    SentencePiece skips sentences of more than 4,192 bytes.
    """
    left = max_characters
    for document in documents:
        text = " " + (document.lower() if lowercase else document)[:left]
        left -= len(text)
        for part in text.split(SPACE_SYMBOL):
            yield from re.findall(r"(?s).{1,1000}(?= |\Z)|.{1,1000}", part)
        if left <= 0:
            return
