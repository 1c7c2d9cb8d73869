"""How much of a text occurs in the training text: shared word n-grams and nearest documents.

Words are maximal runs of letters, digits and apostrophes, in lower case, so that spacing and
punctuation hide no copy. n-grams are compared by 64-bit hashes; with a billion n-grams, a chance
match of any of a thousand texts' n-grams has a probability below one in ten thousand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse

from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate

COPIED, OVERLAP = 8, 3
"""Words in an n-gram that counts as copied, and in one that nearest documents share."""

WORDS = "runs of letters, digits and apostrophes, in lower case"

_BATCH = 1024  # documents compared at a time
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


@dataclasses.dataclass(frozen=True)
class Memorization:
    """What n texts share with the training text.

    Attributes:
      copied: the number of word 8-grams of each text that occur in the training text, `[n]`.
      total: the number of word 8-grams of each text, `[n]`.
      overlap: the largest share of a text's different word 3-grams that occur in one training
        document, `[n]`; 0 for texts without any.
      nearest: that document of each text; "" if no document shares a 3-gram.
    """

    copied: np.ndarray
    total: np.ndarray
    overlap: np.ndarray
    nearest: list[str]

    def measures(self) -> dict[str, Estimate]:
        """`copied_8grams`, over all 8-grams of all texts, and `nearest_overlap`, averaged."""
        found = {"nearest_overlap": intervals.mean(self.overlap)}
        if self.total.sum():
            copied, total = (x.astype(np.float64) for x in (self.copied, self.total))
            found["copied_8grams"] = intervals.ratio(copied, total)
        return found

    def part(self, start: int, end: int) -> Memorization:
        """The texts from `start` to `end`."""
        return Memorization(
            self.copied[start:end],
            self.total[start:end],
            self.overlap[start:end],
            self.nearest[start:end],
        )


def memorization(texts: Sequence[str], training: Iterable[str]) -> Memorization:
    """Compares texts with a training text, which is read once and document by document.

    Args:
      texts: the texts to judge.
      training: the documents of the training text.
    """
    code = _WordCodes()
    words = [code.of_text(text) for text in texts]
    long = [_hashes(codes, COPIED) for codes in words]
    known_long = np.unique(np.concatenate([*long, np.zeros(0, np.uint64)]))
    found = np.zeros(len(known_long), bool)
    short = [np.unique(_hashes(codes, OVERLAP)) for codes in words]
    known_short = np.unique(np.concatenate([*short, np.zeros(0, np.uint64)]))
    in_texts = _occurrences(known_short, short)
    best, nearest = np.zeros(len(texts), np.int64), [""] * len(texts)
    stream = iter(training)
    while documents := list(itertools.islice(stream, _BATCH)):
        words = [code.of_text(document) for document in documents]
        for codes in words:
            found[_positions(known_long, _hashes(codes, COPIED))] = True
        in_documents = _occurrences(known_short, [np.unique(_hashes(w, OVERLAP)) for w in words])
        shared = (in_texts @ in_documents.T).tocsr()
        most = shared.max(axis=1).toarray().ravel()
        for i in np.flatnonzero(most > best):
            best[i], nearest[i] = most[i], documents[int(shared[i].toarray().argmax())]
    copied = [int(found[_positions(known_long, hashes)].sum()) for hashes in long]
    return Memorization(
        copied=np.array(copied, np.int64),
        total=np.array([len(hashes) for hashes in long], np.int64),
        overlap=best / np.maximum([len(hashes) for hashes in short], 1),
        nearest=nearest,
    )


class _WordCodes(dict[str, bytes]):
    """64-bit codes of words, which do not depend on the process; each is computed once."""

    def __missing__(self, word: str) -> bytes:
        code = self[word] = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return code

    def of_text(self, text: str) -> np.ndarray:
        """The codes of a text's words, uint64 `[words]`."""
        return np.frombuffer(b"".join([self[w] for w in _WORD.findall(text.lower())]), np.uint64)


def _hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each n-gram, in order: a polynomial in an odd number, modulo 2^64."""
    count = max(0, len(codes) - n + 1)
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):
            total = total * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]
    return total


def _occurrences(known: np.ndarray, hashes: Sequence[np.ndarray]) -> scipy.sparse.csr_array:
    """Which of the `known` hashes each text has, `[texts, known]`."""
    columns = [_positions(known, each) for each in hashes]
    starts = np.cumsum([0, *(len(each) for each in columns)])
    indices = np.concatenate([*columns, np.zeros(0, np.int64)])
    ones = np.ones(len(indices), np.int64)
    return scipy.sparse.csr_array((ones, indices, starts), shape=(len(hashes), len(known)))


def _positions(known: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Where in the sorted `known` those `hashes` are that it has."""
    if not len(known):
        return np.zeros(0, np.int64)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return places[known[places] == hashes]
