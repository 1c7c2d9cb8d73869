"""What a corpus is: splits of documents that can be read again and again."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from diladiff_jax.data.corpora.splitting import divide
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import DataOptions

Reader = Callable[[], Iterator[str]]
"""Begins a pass over some documents."""


class Corpus(abc.ABC):
    """One kind of corpus; `register_corpus` gives it the name that `data.corpus` selects it by.

    A corpus has up to three splits that share no document: 'train', 'validation' and 'scorer'.
    The last one trains an autoregressive scorer, on text that the models neither train on nor are
    evaluated on.

    Attributes:
      scorer_setting: the setting in the `data` block that makes a scorer split if it is above 0.
    """

    scorer_setting: str

    @abc.abstractmethod
    def splits(self, options: DataOptions) -> dict[str, Reader]:
        """For each split, a function that begins a pass over its documents.

        Raises:
          DataError: the corpus does not exist. The functions raise it for unreadable documents.
        """

    def conflicts(self, options: DataOptions) -> Iterator[tuple[str, str]]:
        """Yields (setting, what would be valid) for settings this corpus cannot be read with."""
        del options
        return iter(())

    def sources(self, options: DataOptions) -> Iterator[str]:
        """Lines for the log that say what exactly is read, where the settings do not.

        Raises:
          DataError: it cannot be read.
        """
        del options
        return iter(())

    def fingerprint(self, options: DataOptions) -> dict[str, Any]:
        """What the text depends on besides the settings, as JSON values. Prepared text with
        another fingerprint is not reused.

        Raises:
          DataError: the corpus does not exist.
        """
        del options
        return {}


class StreamCorpus(Corpus):
    """A corpus without splits of its own: a stream of documents that the settings divide.

    The hash of a document's text decides its split, so duplicates stay together, and the split of
    a document does not depend on the rest of the corpus.
    """

    scorer_setting = "scorer_fraction"

    @abc.abstractmethod
    def open(self, options: DataOptions) -> Reader:
        """A function that begins a pass over all documents.

        Raises:
          DataError: the corpus does not exist. The function raises it for unreadable documents.
        """

    def origin(self, options: DataOptions) -> str:
        """Names the corpus in an error message."""
        return f"data.corpus={options.corpus!r}"

    def splits(self, options: DataOptions) -> dict[str, Reader]:
        begin, origin = self.open(options), self.origin(options)
        limit = options.max_documents or None
        return divide(lambda: _not_empty(itertools.islice(begin(), limit), origin), options)

    def conflicts(self, options: DataOptions) -> Iterator[tuple[str, str]]:
        if options.validation_last and options.validation_files:
            yield "validation_last", "0 when data.validation_files is given"
        replaced = options.validation_files or options.validation_last
        if options.validation_fraction == 0 and not replaced:
            yield (
                "validation_fraction",
                "above 0, unless data.validation_files or data.validation_last holds out documents",
            )
        if options.scorer_fraction + options.held_out_fraction >= 1:
            yield "scorer_fraction", "below 1 - data.validation_fraction"


def _not_empty(documents: Iterator[str], origin: str) -> Iterator[str]:
    """The documents; raises DataError if there are none."""
    for first in documents:
        return itertools.chain([first], documents)
    raise DataError(f"{origin} holds no text, expected at least one document that is not blank")
