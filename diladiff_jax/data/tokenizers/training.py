"""Trains SentencePiece tokenizers."""

from __future__ import annotations

import collections
import io
import itertools
import re
from collections.abc import Iterable, Iterator

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import TRAINED, TokenizerOptions
from diladiff_jax.data.tokenizers.base import SPECIAL_TEXTS, Tokenizer
from diladiff_jax.data.tokenizers.sentence_piece import SPACE_SYMBOL, SentencePiece

# A constant, because unigram training adds up sums per thread: another number of threads gives
# another vocabulary.
_THREADS = 4


def train(
    documents: Iterable[str],
    options: TokenizerOptions,
    max_documents: int = 100_000,
    max_characters: int = 20_000_000,
) -> Tokenizer:
    """Trains a SentencePiece tokenizer. It is lossless for any Unicode text, unless `lowercase`.

    The same documents give the same vocabulary on any machine. Small corpora may give fewer pieces
    than requested.

    Args:
      documents: read until a limit is reached, so they may be an endless stream.
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


def _trained(text: Iterator[str], words: list[str], options: TokenizerOptions) -> bytes:
    """The model that SentencePiece trains on `text`, in which each of `words` is a piece."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=text,
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
