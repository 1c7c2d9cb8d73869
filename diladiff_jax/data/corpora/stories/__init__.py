"""An endless language of very short stories, with exact oracles.

    Mia found two red kites at the harbour. She sold them to Tom. Tom keeps the red kites from
    the harbour.

Every detail of a story is chosen once, uniformly from many values, and must recur. Single words
are close to unpredictable, so nearly all there is to learn is in the correlations between them. A
sampler that draws words independently of each other is caught at once, by an exact measure:
`check` reports which agreements a text keeps, and `log_likelihood` how probable the text is.

The language is declared as data (`language`) and read by one interpreter (`grammar`). Each word
of a slot asserts *features*, such as ``number=many`` for "kites". A story is written from left to
right: first the variant of a sentence, then its words, each drawn uniformly from those whose
features agree with everything the story has asserted so far. The first mention of a detail is
thus a free choice, and later ones are forced. Sampler, parser, likelihood and entropy all follow
from this one rule, so they cannot disagree with each other.

A *unit* is a word or a full stop. A story has 24 to 30 units, so with a tokenizer of one piece per
unit it fits into 32 tokens, including end-of-text.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from diladiff_jax.data.corpora.base import Corpus, Reader
from diladiff_jax.data.corpora.splitting import SPLITS
from diladiff_jax.data.corpora.stories.grammar import Grammar, Report, units
from diladiff_jax.data.corpora.stories.language import (
    AGREEMENTS,
    SENTENCES,
    SLOTS,
    Features,
    Slot,
    Variant,
)
from diladiff_jax.data.hashing import seed_from
from diladiff_jax.data.options import DataOptions

__all__ = [
    "AGREEMENTS",
    "SENTENCES",
    "SLOTS",
    "Grammar",
    "Report",
    "Slot",
    "Stories",
    "Variant",
    "check",
    "detail_entropy",
    "details",
    "documents",
    "entropy",
    "log_likelihood",
    "units",
    "vocabulary",
]

_GRAMMAR = Grammar()


def documents(count: int, seed: int) -> Iterator[str]:
    """Yields `count` stories; each one depends on the seed and its index only.

    Raises:
      ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count: got {count}, expected at least 0")
    return (_GRAMMAR.sample(random.Random(f"{seed}/{index}")) for index in range(count))


def check(text: str) -> Report:
    """Reports which rules of the language a text keeps; see `Grammar.check`."""
    return _GRAMMAR.check(text)


def log_likelihood(text: str) -> float:
    """The exact log-probability of a text, in nats; -inf if it is not a story."""
    return _GRAMMAR.log_likelihood(text)


def entropy() -> float:
    """The exact entropy of a story, in nats."""
    return _GRAMMAR.entropy()


def details(text: str) -> Features | None:
    """Who, what, where and how many, by feature; None if the text is not a story."""
    return _GRAMMAR.details(text)


def detail_entropy() -> float:
    """The sum of the exact entropies of a story's details, in nats."""
    return _GRAMMAR.detail_entropy()


def vocabulary() -> frozenset[str]:
    """All units that stories are made of."""
    return _GRAMMAR.vocabulary()


class Stories(Corpus):
    """The corpus of sampled stories; every split has a seed of its own."""

    scorer_setting = "scorer_documents"

    def splits(self, options: DataOptions) -> dict[str, Reader]:
        counts = (options.documents, options.validation_documents, options.scorer_documents)
        return {
            split: functools.partial(documents, count, seed_from(f"{options.seed}/{split}") >> 1)
            for split, count in zip(SPLITS, counts, strict=True)
            if count
        }
