"""Divides a stream of documents into splits by the hash of their text."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping

from diladiff_jax.data import text_files
from diladiff_jax.data.options import DataOptions

SPLITS = ("train", "validation", "scorer")


def divide(
    everything: Callable[[], Iterator[str]], options: DataOptions
) -> dict[str, Callable[[], Iterator[str]]]:
    """For each split of a stream, a function that begins a pass over its documents.

    With `validation_files`, documents that also appear in those files word for word are left out
    of the other splits. With `validation_last`, the last documents are held out as they are, and
    hashes divide the rest.

    Args:
      everything: begins a pass over all documents.
      options: the fractions, and what replaces the validation fraction.
    """
    limits = {
        "validation": options.held_out_fraction,
        "scorer": options.scorer_fraction,
        "train": 1.0,
    }
    result: dict[str, Callable[[], Iterator[str]]] = {}
    held_out: Callable[[], set[bytes]] = set
    if options.validation_files:
        own = functools.partial(text_files.documents, options.validation_files, options.field)
        held_out = functools.cache(lambda: {_digest(text) for text in own()})
        result["validation"] = own
    rest, last = everything, options.validation_last
    if last:
        result["validation"] = lambda: iter(collections.deque(everything(), last))
        rest = lambda: _all_but_last(everything(), last)

    def assigned(split: str) -> Iterator[str]:
        for text in rest():
            digest = _digest(text)
            if _split_of(digest, limits) == split and digest not in held_out():
                yield text

    return result | {
        split: functools.partial(assigned, split) for split, limit in limits.items() if limit > 0
    }


def _all_but_last(documents: Iterator[str], count: int) -> Iterator[str]:
    """All documents but the last `count`; that many are kept in memory."""
    waiting: collections.deque[str] = collections.deque()
    for document in documents:
        waiting.append(document)
        if len(waiting) > count:
            yield waiting.popleft()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _split_of(digest: bytes, limits: Mapping[str, float]) -> str:
    """The split whose interval of [0, 1) the digest falls into; `limits` are their lengths."""
    place = int.from_bytes(digest, "big") / 2**64
    for split, bound in zip(limits, itertools.accumulate(limits.values()), strict=True):
        if place < bound:
            return split
    raise AssertionError(f"the limits {limits} leave no split for the rest")
